"""The contract of an adapter method, the methods there are, and a check that anyone can run on a new one."""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING, Any, Protocol

from graft.adapters.dora import DoraMethod
from graft.adapters.ia3 import Ia3Method
from graft.adapters.loha import LohaMethod
from graft.adapters.lokr import LokrMethod
from graft.adapters.lora import LoraMethod
from graft.adapters.lora_fa import LoraFaMethod
from graft.adapters.oft import OftMethod
from graft.adapters.vera import VeraMethod
from graft.errors import ConfigError

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
    - `merged_bias(base, bias)`: the bias of the plain layer, where it is another one than the base's.
    - `idle(base)`: whether the layer leaves every output as it is, as far as that can be told cheaply.
    - `reference_forward(x, base_output, base)`: the same in plain differentiable operations, which the
      gradients of `forward` are checked against; without it they are checked by finite differences.
    - `start()`: tensors by name that the update is measured from, and `begin_at(lora_A, lora_B, subtract=)`,
      which sets them; see `LoraLinear`. Checkpoints hold them, files do not.
    - `share(shared)`: takes what `AdapterMethod.build_shared` made.
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

    - `kinds`: the kinds of base layers that it adapts; all where missing. Others are refused as targets.
    - `frozen_tensors`: names from `tensor_shapes` that are saved with the adapter and never train.
    - `build_shared(bases, config)`: an `nn.Module` whose buffers, by their names in files, belong to all
      layers of one adapter together. They never train, and follow from the settings and the layers alone.
    - `shared_shapes(bases, config)`: their names and shapes, without making them; needed beside it.
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
        check_layer(method, config, base, x)
