"""Every adapter method in whole models: what each must do, and a method from outside the package."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import graft.models.load as models
from graft.adapters.adalora import AdaLoraConfig
from graft.adapters.attach import adapter_tensors, adapters_of, attach, detach, disabled, set_active
from graft.adapters.attached import base_state, fixed_tensors, stays_tied, trained_tensors
from graft.adapters.base import METHODS, check_adapter_method, frozen_tensors, kinds_of, ships_quantized
from graft.adapters.dora import DoraConfig
from graft.adapters.fold import merge_into
from graft.adapters.ia3 import Ia3Config
from graft.adapters.in_place import merge_in_place, unmerge
from graft.adapters.loha import LohaConfig
from graft.adapters.lokr import LokrConfig
from graft.adapters.lora import LoraConfig
from graft.adapters.lora_fa import LoraFaConfig
from graft.adapters.merge import merge
from graft.adapters.oft import OftConfig
from graft.adapters.peft_format import load_adapter, save_adapter
from graft.adapters.qa_lora import QaLoraConfig
from graft.adapters.qat import QatConfig
from graft.adapters.targets import base_layers, tied_pair
from graft.adapters.trainable_tokens import TrainableTokensConfig
from graft.adapters.vera import VeraConfig
from graft.errors import AdapterError, TargetError
from graft.models.layers import BaseLayer


@dataclass(frozen=True, kw_only=True)
class ShiftConfig:
    """Of a method from outside: W + 1 a', one number for each input."""

    SHORTHAND = "method"

    method: Literal["shift"] = "shift"
    target_modules: str | tuple[str, ...] = "all-linear"
    exclude_modules: str | tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    modules_to_save: tuple[str, ...] = ()
    factor: float = 2.0

    def at(self, path: str) -> ShiftConfig:
        return self


class ShiftLayer(nn.Module):
    def __init__(self, in_features: int, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.a = nn.Parameter(torch.zeros(in_features))

    @property
    def num_parameters(self) -> int:
        return self.a.numel()

    def tensors(self) -> dict[str, nn.Parameter]:
        return {"shift_a": self.a}

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        return base_output + (self.factor * (x * self.a).sum(-1, keepdim=True)).to(base_output.dtype)

    def merged_weight(self, base: BaseLayer, weight: Tensor) -> Tensor:
        return weight + self.factor * self.a.detach()


class ShiftMethod:
    name = "shift"
    config_class = ShiftConfig
    kinds = ("linear", "conv1d")

    def tensor_shapes(self, base: BaseLayer, config: ShiftConfig) -> dict[str, tuple[int, ...]]:
        return {"shift_a": (base.in_features,)}

    def build_layer(
        self, base: BaseLayer, config: ShiftConfig, generator: torch.Generator | None
    ) -> ShiftLayer:
        return ShiftLayer(base.in_features, config.factor)


NAMES = {"llama": ("k_proj", "v_proj", "down_proj"), "gpt2": ("c_attn", "mlp.c_proj")}
IDS = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(3))

TOKENS = tuple(sorted({*IDS[0].tolist(), 5, 200}, reverse=True))
"""Rows of the embedding that train: the tokens of one text, and two more."""


def low_rank(kind: type) -> Callable[[str], Any]:
    return lambda family: kind(rank=4, alpha=8, target_modules=NAMES[family])


CONFIGS: dict[str, Callable[[str], Any]] = {
    "lora": low_rank(LoraConfig),
    "dora": low_rank(DoraConfig),
    "lora_fa": low_rank(LoraFaConfig),
    "vera": lambda family: VeraConfig(rank=12, target_modules=NAMES[family]),
    "ia3": lambda family: Ia3Config(target_modules=NAMES[family], feedforward_modules=NAMES[family][-1:]),
    "loha": lambda family: LohaConfig(rank=3, target_modules=NAMES[family]),
    "lokr": lambda family: LokrConfig(rank=2, target_modules=NAMES[family]),
    "oft": lambda family: OftConfig(block_size=8, target_modules=NAMES[family]),
    "adalora": lambda family: AdaLoraConfig(rank=4, target_rank=2, target_modules=NAMES[family]),
    "trainable_tokens": lambda family: TrainableTokensConfig(token_indices=TOKENS),
    "qa_lora": lambda family: QaLoraConfig(rank=4, group_size=8, target_modules=NAMES[family]),
    "qat": low_rank(QatConfig),
    "shift": lambda family: ShiftConfig(target_modules=NAMES[family]),
}

SIZES = {"llama": ((16, 32), (16, 32), (32, 64)), "gpt2": ((96, 32), (32, 128))}
"""(out, in) of the targets in one of two blocks: width 32, 2 of 4 heads for keys, inner width 64 or 128."""

COUNTS: dict[str, Callable[[int, int, bool], int]] = {
    "lora": lambda out, into, last: 4 * (out + into),
    "dora": lambda out, into, last: 4 * (out + into) + out,
    "lora_fa": lambda out, into, last: 4 * out,
    "vera": lambda out, into, last: out + 12,
    "ia3": lambda out, into, last: into if last else out,
    "loha": lambda out, into, last: 2 * 3 * (out + into),
    # Divided as near to the root as goes: 16 = 4 4, 32 = 4 8, 64 = 8 8, 96 = 8 12, 128 = 8 16. The first
    # factors are dense, the second ones of rank 2 where half of their longer side is above that.
    "lokr": lambda out, into, last: {
        (16, 32): 4 * 4 + 2 * (4 + 8),
        (32, 64): 4 * 8 + 2 * (8 + 8),
        (96, 32): 8 * 4 + 2 * (12 + 8),
        (32, 128): 4 * 8 + 2 * (8 + 16),
    }[out, into],
    "oft": lambda out, into, last: into // 8 * (8 * 7 // 2),
    "adalora": lambda out, into, last: 4 * (out + into + 1),
    # Rows 32 wide, of one embedding: half of them counted at the last target of each of two blocks.
    "trainable_tokens": lambda out, into, last: len(TOKENS) * 32 // 2 if last else 0,
    "qa_lora": lambda out, into, last: 4 * (out + into // 8),
    "qat": lambda out, into, last: 4 * (out + into),
    "shift": lambda out, into, last: into,
}
"""Numbers that train for a layer (out, in); `last` for the last of NAMES."""


@pytest.fixture(autouse=True)
def _outside() -> Iterator[None]:
    METHODS["shift"] = ShiftMethod()
    yield
    del METHODS["shift"]


def test_every_method_is_in_the_matrix() -> None:
    assert CONFIGS.keys() == COUNTS.keys() == METHODS.keys()


def test_a_method_from_outside_keeps_the_contract() -> None:
    check_adapter_method(METHODS["shift"])


BESIDE = [name for name in CONFIGS if name == "shift" or not ships_quantized(METHODS[name])]
"""Methods that change what a base layer puts out; the others put another layer in its place."""

every = pytest.mark.parametrize("name", CONFIGS)
linears = pytest.mark.parametrize("name", [name for name in CONFIGS if name != "trainable_tokens"])
"""Methods that go over linear layers."""
families = pytest.mark.parametrize("family", NAMES)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def shake(tensors: Any, scale: float = 0.05, seed: int = 11) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in tensors:
            tensor.add_(scale * torch.randn(tensor.shape, generator=generator))


def made(directory: Path, name: str, family: str = "llama", **how: Any) -> Any:
    base = models.load(directory, **how)
    attach(base.model, CONFIGS[name](family), seed=3)
    return base.model


@every
@families
def test_counts_start_and_disable(tiny_dir: Callable[..., Path], name: str, family: str) -> None:
    plain = logits(models.load(tiny_dir(family)).model)
    model = made(tiny_dir(family), name, family)
    assert torch.equal(logits(model), plain) == (name in BESIDE)
    expected = 2 * sum(
        COUNTS[name](out, into, place == len(SIZES[family]) - 1)
        for place, (out, into) in enumerate(SIZES[family])
    )
    adapter = adapters_of(model)["default"]
    assert adapter.num_trainable == expected
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    config, method = adapter.config, METHODS[name]
    shapes = [
        math.prod(shape)
        for path, base in base_layers(model).items()
        if path in adapter.targets
        for leaf, shape in method.tensor_shapes(base, config.at(path)).items()
        if leaf not in frozen_tensors(method)
    ]
    assert sum(shapes) == expected
    shake(trained_tensors(model).values())
    assert (logits(model) - plain).abs().max() > 1e-3
    with disabled(model):
        assert torch.equal(logits(model), plain)
    detach(model)
    assert torch.equal(logits(model), plain)


@every
@families
def test_a_few_steps_lower_the_loss_and_leave_what_is_fixed(
    tiny_dir: Callable[..., Path], name: str, family: str
) -> None:
    model = made(tiny_dir(family), name, family)
    trained = trained_tensors(model)
    before = {key: tensor.detach().clone() for key, tensor in fixed_tensors(model).items()}
    start = {key: tensor.detach().clone() for key, tensor in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=2e-2, weight_decay=0)
    losses = []
    for _ in range(6):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert not any(torch.equal(tensor, start[key]) for key, tensor in trained.items())
    assert all(torch.equal(tensor, before[key]) for key, tensor in fixed_tensors(model).items())


@every
@families
def test_saved_and_loaded_is_the_same(
    tiny_dir: Callable[..., Path], name: str, family: str, tmp_path: Path
) -> None:
    model = made(tiny_dir(family), name, family)
    shake(trained_tensors(model).values())
    save_adapter(model, tmp_path / "a")
    other = models.load(tiny_dir(family)).model
    loaded = load_adapter(other, tmp_path / "a", trainable=True)
    assert torch.equal(logits(other), logits(model))
    wanted = adapters_of(model)["default"]
    assert type(loaded.config) is type(wanted.config)
    assert loaded.num_trainable == wanted.num_trainable
    assert sum(p.numel() for p in other.parameters() if p.requires_grad) == wanted.num_trainable
    save_adapter(other, tmp_path / "b")
    one, two = ((tmp_path / side / "adapter_model.safetensors").read_bytes() for side in "ab")
    assert one == two


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "shift"])  # which has no `idle`
def test_a_fresh_adapter_is_refused_for_use(tiny_dir: Callable[..., Path], name: str, tmp_path: Path) -> None:
    save_adapter(made(tiny_dir("llama"), name), tmp_path / "a")
    with pytest.raises(AdapterError, match="changes any output"):
        load_adapter(models.load(tiny_dir("llama")).model, tmp_path / "a")


@every
@families
def test_merged_is_live(tiny_dir: Callable[..., Path], name: str, family: str) -> None:
    model = made(tiny_dir(family), name, family)
    shake(trained_tensors(model).values())
    live = logits(model)
    merge_into(model)
    assert not adapters_of(model)
    torch.testing.assert_close(logits(model), live, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize(("family", "quantization"), [("llama", "nf4"), ("gpt2", None)])
def test_merged_files_are_live(
    tiny_dir: Callable[..., Path], name: str, family: str, quantization: str | None, tmp_path: Path
) -> None:
    model = made(tiny_dir(family), name, family, quantization=quantization)
    shake(trained_tensors(model).values())
    save_adapter(model, tmp_path / "a")
    report = merge(tmp_path / "a", tmp_path / "m")
    assert report.folded_into == ("dense" if quantization is None else "dequantized")
    torch.testing.assert_close(logits(models.load(tmp_path / "m").model), logits(model), atol=1e-5, rtol=1e-5)


@every
@families
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_in_place_is_live_and_unmerged_is_the_base_to_the_bit(
    tiny_dir: Callable[..., Path], name: str, family: str, dtype: str
) -> None:
    model = made(tiny_dir(family), name, family, dtype=dtype)
    base = {key: (tensor.clone(), tensor) for key, tensor in base_state(model)}
    shake(trained_tensors(model).values())
    live = logits(model)
    merge_in_place(model)
    changed = [key for key, tensor in base_state(model) if not torch.equal(tensor, base[key][0])]
    touched = set(adapters_of(model)["default"].targets)
    if stays_tied(model, "default"):  # the head shows the same weight
        touched |= set(tied_pair(model) or ())
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert {key.rpartition(".")[0] for key in changed} == touched
    # 8 bits: every product of the live model is rounded apart, of the merged one together.
    tolerance = 1e-5 if dtype == "float32" else 0.1 * float(live.abs().max())
    torch.testing.assert_close(logits(model), live, atol=tolerance, rtol=1e-5)
    unmerge(model)
    for key, tensor in base_state(model):
        assert torch.equal(tensor, base[key][0]), key
        assert tensor.data_ptr() == base[key][1].data_ptr(), key
    assert torch.equal(logits(model), live)


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("other", BESIDE)
def test_several_adapters_add_what_each_changes(tiny_dir: Callable[..., Path], name: str, other: str) -> None:
    """Of one linear layer, whose output is linear in its weight: the sum of both changes."""
    model = made(tiny_dir("llama"), name)
    attach(model, CONFIGS[other]("llama"), "second", seed=4)
    for number, which in enumerate(("default", "second")):
        shake(trained_tensors(model, which).values(), seed=number)
    path = "model.layers.0.mlp.down_proj"
    layer: Any = model.get_submodule(path)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))

    def output(*names: str) -> Tensor:
        set_active(model, names)
        with torch.no_grad():
            return layer(x)

    plain = output()
    expected = plain + (output("default") - plain) + (output("second") - plain)
    torch.testing.assert_close(output("default", "second"), expected, atol=1e-5, rtol=1e-5)
    first = output("default")
    detach(model, "second")
    assert torch.equal(output("default"), first)


def test_a_merge_that_would_change_another_adapter_is_refused(tiny_dir: Callable[..., Path]) -> None:
    model = made(tiny_dir("llama"), "lora")
    attach(model, CONFIGS["dora"]("llama"), "second")
    with pytest.raises(AdapterError, match="also carries second"):
        merge_into(model, "default")
    detach(model, "second")
    merge_into(model, "default")


@pytest.mark.parametrize(
    ("name", "how"),
    [
        (name, how)
        for name in CONFIGS
        for how in ("nf4", "bfloat16")
        if name != "trainable_tokens" and (name in BESIDE or how != "nf4")
    ],
)
def test_on_coarse_bases_the_formula_holds(tiny_dir: Callable[..., Path], name: str, how: str) -> None:
    """Each layer's output is that of its merged weight, within the rounding of what the base computes in."""
    options: dict[str, Any] = {"quantization": "nf4"} if how == "nf4" else {"dtype": "bfloat16"}
    if how == "nf4":
        options["dtype"] = "float32"
    model = made(tiny_dir("llama"), name, **options)
    before = logits(model)
    with disabled(model):
        assert torch.equal(logits(model), before) == (name in BESIDE)
    shake(trained_tensors(model).values())
    for path in adapters_of(model)["default"].targets:
        layer: Any = model.get_submodule(path)
        x = torch.randn(5, layer.base.in_features, generator=torch.Generator().manual_seed(0))
        x = x.to(torch.bfloat16 if how == "bfloat16" else torch.float32)
        with torch.no_grad():
            weight = layer.adapters["default"].merged_weight(layer.base, layer.base.dense_weight())
            live = layer(x)
        assert live.dtype == x.dtype
        # 8 bits: a few roundings of outputs up to about 4.
        tolerance = 1e-5 if how == "nf4" else 5e-2
        expected = functional.linear(x.float(), weight)
        torch.testing.assert_close(live.float(), expected, atol=tolerance, rtol=tolerance)
    model(IDS, labels=IDS).loss.backward()
    for key, tensor in trained_tensors(model).items():
        assert tensor.grad is not None, key
        assert tensor.grad.dtype == torch.float32
        assert bool(tensor.grad.any()), key


@linears
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(
    tiny_dir: Callable[..., Path], name: str, reentrant: bool
) -> None:
    from torch.utils.checkpoint import checkpoint

    config = CONFIGS[name]("llama")
    if hasattr(config, "dropout"):
        config = dataclasses.replace(config, dropout=0.3)
    model = models.load(tiny_dir("llama")).model
    attach(model, config, seed=3)
    shake(trained_tensors(model).values())
    model.train()
    layer: Any = model.get_submodule("model.layers.0.mlp.down_proj")
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found = []
    for wrapped in (False, True):
        model.zero_grad()
        x.grad = None
        torch.manual_seed(4)
        output = checkpoint(layer, x, use_reentrant=reentrant) if wrapped else layer(x)
        output.square().sum().backward()
        found.append([x.grad, *(tensor.grad for tensor in layer.adapters.parameters())])
    for one, two in zip(*found, strict=True):
        assert (one is None and two is None) or torch.equal(one, two)


@pytest.mark.parametrize(
    "name", [name for name in CONFIGS if name not in ("lora", "dora", "trainable_tokens")]
)
def test_layers_that_a_method_does_not_adapt_are_refused(tiny_dir: Callable[..., Path], name: str) -> None:
    assert "embedding" not in kinds_of(METHODS[name])
    changed: dict[str, Any] = {"target_modules": ("embed_tokens",)}
    if name == "ia3":
        changed["feedforward_modules"] = ()
    config = dataclasses.replace(CONFIGS[name]("llama"), **changed)
    model = models.load(tiny_dir("llama")).model
    with pytest.raises(TargetError, match="embed_tokens"):
        attach(model, config)
    assert adapters_of(model) == {}


def test_frozen_first_factors_keep_no_input(tiny_dir: Callable[..., Path]) -> None:
    """LoRA-FA and VeRA keep A x of each token, LoRA the whole input."""
    kept: dict[str, set[tuple[int, ...]]] = {}
    for name in ("lora", "lora_fa", "vera"):
        model = made(tiny_dir("llama"), name)
        layer: Any = model.get_submodule("model.layers.0.mlp.down_proj")
        shapes = kept[name] = set()

        def pack(t: Tensor, shapes: set[tuple[int, ...]] = shapes) -> Tensor:
            shapes.add(tuple(t.shape))
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            layer(torch.randn(7, 64, requires_grad=True))
    assert (7, 64) in kept["lora"]
    assert (7, 64) not in kept["lora_fa"] | kept["vera"]
    assert (7, 4) in kept["lora_fa"]
    assert (7, 12) in kept["vera"]


def test_one_projection_serves_all_layers_of_an_adapter(tiny_dir: Callable[..., Path]) -> None:
    import copy

    model = copy.deepcopy(made(tiny_dir("llama"), "vera"))
    layers = [m for m in model.modules() if type(m).__name__ == "VeraLayer"]
    assert len({id(layer.shared) for layer in layers}) == 1
    assert layers[0].shared.vera_A.shape == (12, 64)
    assert layers[0].shared.vera_B.shape == (32, 12)
    assert not any("vera_A" in key for key in nn.Module.state_dict(model))
    assert len(adapter_tensors(model)) == 2 * len(layers)
