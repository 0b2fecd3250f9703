"""The contract of an adapter method, the methods there are, and a check that anyone can run on a new one."""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING, Any, Protocol

from graft.adapters.adalora import AdaLoraMethod
from graft.adapters.dora import DoraMethod
from graft.adapters.ia3 import Ia3Method
from graft.adapters.loha import LohaMethod
from graft.adapters.lokr import LokrMethod
from graft.adapters.lora import LoraMethod
from graft.adapters.lora_fa import LoraFaMethod
from graft.adapters.oft import OftMethod
from graft.adapters.qa_lora import QaLoraMethod
from graft.adapters.trainable_tokens import TrainableTokensMethod
from graft.adapters.vera import VeraMethod
from graft.errors import ConfigError, TargetError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from graft.models.layers import BaseLayer


class AdapterConfig(Protocol):
    """Settings of a method: a frozen dataclass with at least these fields."""

    @property
    def method(self) -> str:
        """Key of METHODS."""

    @property
    def target_modules(self) -> str | tuple[str, ...]:
        """Layers that get an adapter."""

    @property
    def exclude_modules(self) -> str | tuple[str, ...]:
        """Layers taken out of them."""

    @property
    def layers(self) -> tuple[int, ...] | None:
        """Blocks that get adapters; None for all."""

    @property
    def modules_to_save(self) -> tuple[str, ...]:
        """Modules trained in full."""

    def at(self, path: str) -> Any:
        """The settings of the layer at a path."""


class AdapterLayer(Protocol):
    """What a method puts over one base layer: an `nn.Module` whose own fp32 parameters are the adapter.

    It may have more, each of which is asked for only where it is there:

    - `additive` (a class attribute, true where missing): `forward` adds an update that depends on neither
      the base output nor the base weight. Updates of several such layers are added in place; a layer that is
      not additive gets the plain base output, and a merge that would change the weight under it is refused.
    - `adapt_input(x)`: what the base layer and `forward` are given in place of x. Not additive.
    - `begin(x)`: the part of `forward` that needs no base output; see `LoraLinear.begin`. Additive only.
    - `update_factors()`: (down (n, in), up (out, n)) whose product is the whole update, its scaling included,
      where that is no dearer than the (out, in) matrix. Additive only; composing goes through it.
    - `merged_bias(base, bias)`: the bias of the plain layer, where it may be another one than the base's,
      which may be None.
    - `idle(base)`: whether the layer leaves every output as it is, as far as that can be told cheaply.
    - `update_values()`: the singular values of the update, falling, float64, where there is a cheaper way to
      them than the update itself. Additive only; `graft inspect` asks for them.
    - `reference_forward(x, base_output, base)`: the same in plain differentiable operations, which the
      gradients of `forward` are checked against; without it they are checked by finite differences.
    - `start()`: tensors by name that the update is measured from, and `begin_at(lora_A, lora_B, subtract=)`,
      which sets them; see `LoraLinear`. Checkpoints hold them, files do not.
    - `share(shared)`: takes what `AdapterMethod.build_shared` made.
    - `plain_factors()`: A (rank, in) and B (out, rank) of an update `scaling` B A that has other tensors.
    - `state_tensors()`: by name, what neither trains nor follows from the base and the settings.
    - `block_update(block)`: (out, in / block), what an update adds to all weights of each block of a row;
      None where it differs within a block. A merge then moves the shifts of an affine quantized base.
    - `may_wait`: whether its gradients may be zero for now, and its effect too.
    - `tied_layer()`: of an embedding, a layer without tensors of its own that does the same in the output
      head that shares the weight.
    """

    @property
    def num_parameters(self) -> int:
        """Numbers that train."""

    def tensors(self) -> dict[str, nn.Parameter]:
        """The parameters by the names that they have in files, those that never train among them."""

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """The new output in the dtype of base_output, which it may overwrite; no state is left behind."""

    def merged_weight(self, base: BaseLayer, weight: Tensor) -> Tensor:
        """The weight (out, in), fp32, of a plain layer that does the same; `weight` stays as it is."""


class AdapterMethod(Protocol):
    """One way to adapt a layer. It sees a `BaseLayer`, never a quantizer.

    It may have more, each of which is asked for only where it is there:

    - `kinds`: the kinds of base layers that it adapts; where missing, linear, conv1d and embedding. Others
      are refused as targets, as are those for which `tensor_shapes` raises a TargetError.
    - `frozen_tensors`: names from `tensor_shapes` that are saved with the adapter and never train.
    - `build_shared(bases, config)`: an `nn.Module` whose buffers, by their names in files, belong to all
      layers of one adapter together. They never train, and follow from the settings and the layers alone.
    - `shared_shapes(bases, config)`: their names and shapes, without making them; needed beside it.
    - `steer(layers, config, num_steps, settled=...)`: the `Steering` of a run over its layers by path;
      `settled` in a later phase, which changes nothing more.
    - `resolved(config, targets)`: the settings with what follows from the layers filled in.
    - `stored_shapes(base, config)` and `restored(base, config, leaf, value, where)`: the shapes of the
      tensors in files where they are others, and a tensor made of what a file holds.
    - `stored(layers, config)`: what files hold where that is not what the layers hold: the settings to be
      written and the tensors of each layer by their names; layers that are missing there are left out.
    """

    @property
    def name(self) -> str:
        """Key of METHODS, and the value of its config's `method`."""

    @property
    def config_class(self) -> type:
        """Its settings; see AdapterConfig."""

    def tensor_shapes(self, base: BaseLayer, config: Any) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what one layer adds, without making it."""

    def build_layer(self, base: BaseLayer, config: Any, generator: torch.Generator | None) -> nn.Module:
        """The layer module over `base`, on the CPU.

        Args:
            base: The layer below.
            config: The settings of that layer (`AdapterConfig.at`).
            generator: Where all random values come from; None leaves the tensors to be filled from a file.
        """


class Steering(Protocol):
    """What a method does between the steps of a run, besides what the gradients do; the loop calls it."""

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it, by name; copied back in place when a run goes on."""

    def regularization(self) -> Tensor | None:
        """What is added to the loss of a step, once, differentiable; None for nothing."""

    def before_update(self, step: int) -> None:
        """With the gradients of the whole step there, as they are before clipping; steps count from 1."""

    def after_step(self, step: int) -> None:
        """With the step made, skipped ones too."""

    def figures(self) -> dict[str, float]:
        """Figures of the step for the log, finite, and none of the clock's."""


METHODS: dict[str, AdapterMethod] = {
    method.name: method
    for method in (
        LoraMethod(),
        DoraMethod(),
        LoraFaMethod(),
        VeraMethod(),
        Ia3Method(),
        LohaMethod(),
        LokrMethod(),
        OftMethod(),
        AdaLoraMethod(),
        TrainableTokensMethod(),
        QaLoraMethod(),
    )
}
"""The methods by name; one of your own joins them with `METHODS[method.name] = method`."""


def config_classes() -> dict[str, type]:
    """The settings classes of all methods by the method's name, LoRA's first."""
    return {name: method.config_class for name, method in METHODS.items()}


def frozen_tensors(method: AdapterMethod) -> frozenset[str]:
    """Names of a method's tensors that are saved and never train."""
    return frozenset(getattr(method, "frozen_tensors", ()))


def kinds_of(method: AdapterMethod) -> tuple[str, ...]:
    """The kinds of base layers that a method adapts."""
    return tuple(getattr(method, "kinds", ("linear", "conv1d", "embedding")))


def is_additive(layer: Any) -> bool:
    """Whether a layer adds an update that depends on neither base output nor base weight."""
    return bool(getattr(type(layer), "additive", True))


def method_of(config: AdapterConfig) -> AdapterMethod:
    """The method that a config belongs to.

    Raises:
        ConfigError: There is no such method, or these are not its settings.
    """
    name = getattr(config, "method", None)
    if isinstance(name, str) and name not in METHODS:
        raise ConfigError(
            f"unknown adapter method {name!r}", where="adapter.method", fix=f"one of: {', '.join(METHODS)}"
        )
    method = METHODS.get(name) if isinstance(name, str) else None
    if method is None or not isinstance(config, method.config_class):
        others = ", ".join(known.config_class.__name__ for name, known in METHODS.items() if name != "lora")
        raise ConfigError(
            f"{reprlib.repr(config)} is not the settings of an adapter method but a {type(config).__name__}",
            where="config",
            fix=f"give a graft.LoraConfig(rank=8, ...), or one of {others}",
        )
    return method


def check_adapter_method(method: AdapterMethod, config: Any = None) -> None:
    """Run a method through the contract on small layers of every kind that it adapts.

    Tried on each: names and shapes, the first output, where first values come from, gradients (in float64,
    against `reference_forward` or finite differences), what must not change, and that a merge does the same.

    Args:
        method: The method to check; it need not be in METHODS.
        config: Settings to check with; its defaults where None.

    Raises:
        AssertionError: The first promise that is not kept, in words.
    """
    from graft.adapters.checks import check_layer, sample_layers

    config = method.config_class() if config is None else config
    assert config.method == method.name, f"the config's method is {config.method!r}, not {method.name!r}"
    samples = [(base, x) for base, x in sample_layers() if base.kind in kinds_of(method)]
    assert samples, f"{method.name} adapts no kind of layer: {kinds_of(method)}"
    for base, x in samples:
        try:
            method.tensor_shapes(base, config.at("layer"))
        except TargetError:  # a form of its kind that it refuses
            continue
        check_layer(method, config, base, x)
