"""Convolutions: PEFT loads our adapters on them and we load PEFT's, with the same outputs and gradients."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

import graft
from graft.adapters.attach import attach, disabled
from graft.adapters.attached import adapters_of, trained_tensors
from graft.adapters.base import METHODS
from graft.adapters.fold import merge_into
from graft.adapters.peft_format import load_adapter, save_adapter
from graft.errors import AdapterError, TargetError

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

TOLERANCE = 1e-5

IMAGES = torch.randn(2, 3, 9, 7, generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    """Convolutions of several forms, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.tall = nn.Conv2d(8, 12, (3, 1), stride=2, padding=(1, 0), bias=False)
        self.point = nn.Conv2d(12, 12, 1)
        self.grouped = nn.Conv2d(12, 8, 3, padding=2, dilation=2, groups=4)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.tall, self.point, self.grouped):
            x = functional.gelu(layer(x))
        result: Tensor = self.head(x.mean((-2, -1)))
        return result


def net() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        made = Net().eval()
    for parameter in made.parameters():
        parameter.data *= 2.5  # so that what the first layers do is seen at the end
    return made


PLAIN = ("first", "tall", "point")
GROUPED = (*PLAIN, "grouped")


@dataclass(frozen=True)
class Case:
    """The same settings on both sides."""

    ours: Any
    kind: str
    theirs: dict[str, Any]


def low_rank(method: type, targets: tuple[str, ...] = PLAIN, **more: Any) -> Any:
    return method(rank=4, alpha=6, target_modules=targets, **more)


def theirs(targets: tuple[str, ...] = PLAIN, **more: Any) -> dict[str, Any]:
    return {"r": 4, "target_modules": list(targets), **more}


CASES = {
    "lora": Case(low_rank(graft.LoraConfig), "LoraConfig", theirs(lora_alpha=6)),
    "lora-mixed": Case(
        low_rank(graft.LoraConfig, ("first", "head"), use_rslora=True, modules_to_save=("point",)),
        "LoraConfig",
        theirs(("first", "head"), lora_alpha=6, use_rslora=True, modules_to_save=["point"]),
    ),
    "lora-ranks": Case(
        low_rank(graft.LoraConfig, rank_pattern=("tall=2",), alpha_pattern=("first=1",)),
        "LoraConfig",
        theirs(lora_alpha=6, rank_pattern={"tall": 2}, alpha_pattern={"first": 1}),
    ),
    "lora_fa": Case(low_rank(graft.LoraFaConfig), "LoraConfig", theirs(lora_alpha=6)),
    "dora": Case(low_rank(graft.DoraConfig), "LoraConfig", theirs(lora_alpha=6, use_dora=True)),
    "dora-mixed": Case(
        low_rank(graft.DoraConfig, ("tall", "head")),
        "LoraConfig",
        theirs(("tall", "head"), lora_alpha=6, use_dora=True),
    ),
    "loha": Case(low_rank(graft.LohaConfig, GROUPED), "LoHaConfig", theirs(GROUPED, alpha=6)),
    "lokr": Case(
        graft.LokrConfig(rank=1, alpha=6, target_modules=GROUPED),
        "LoKrConfig",
        {"r": 1, "alpha": 6, "target_modules": list(GROUPED)},
    ),
    "lokr-dense": Case(low_rank(graft.LokrConfig, GROUPED), "LoKrConfig", theirs(GROUPED, alpha=6)),
    "lokr-both": Case(
        graft.LokrConfig(rank=1, decompose_both=True, decompose_factor=4, target_modules=GROUPED),
        "LoKrConfig",
        {"r": 1, "decompose_both": True, "decompose_factor": 4, "target_modules": list(GROUPED)},
    ),
    "ia3": Case(
        graft.Ia3Config(target_modules=GROUPED, feedforward_modules=()),
        "IA3Config",
        {"target_modules": list(GROUPED), "feedforward_modules": []},
    ),
    "ia3-inner": Case(
        graft.Ia3Config(target_modules=(*GROUPED, "head"), feedforward_modules=("grouped", "tall")),
        "IA3Config",
        {"target_modules": [*GROUPED, "head"], "feedforward_modules": ["grouped", "tall"]},
    ),
}

every = pytest.mark.parametrize("name", CASES)


def output(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IMAGES)
        return found


def shake(tensors: Any) -> None:
    generator = torch.Generator().manual_seed(11)
    for tensor in tensors:
        tensor.data += 0.1 * torch.randn(tensor.shape, generator=generator)


def adapted(name: str) -> Any:
    model = net()
    attach(model, CASES[name].ours)
    shake(trained_tensors(model).values())
    return model


@every
def test_peft_loads_ours_with_the_same_gradients(name: str, tmp_path: Path) -> None:
    model = adapted(name)
    save_adapter(model, tmp_path)
    other = peft.PeftModel.from_pretrained(net(), tmp_path, is_trainable=True).eval()
    torch.testing.assert_close(output(other), output(model), atol=TOLERANCE, rtol=TOLERANCE)
    with disabled(model):
        assert (output(model) - output(net())).abs().max() == 0
    assert (output(model) - output(net())).abs().max() > 1e-2
    for side in (model, other):
        side(IMAGES).square().sum().backward()
    grads = {
        key.replace(".default.weight", "" if "magnitude" in key else ".weight").replace(".default", ""): p
        for key, p in other.named_parameters()
        if p.grad is not None
    }
    for key, tensor in trained_tensors(model).items():
        place = f"base_model.model.{key}".replace("point.", "point.modules_to_save.")
        grad = grads[place if place in grads else f"base_model.model.{key}"].grad
        torch.testing.assert_close(tensor.grad, grad, atol=1e-5, rtol=1e-4)


@every
def test_we_load_peft(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    other = peft.get_peft_model(net(), getattr(peft, case.kind)(**case.theirs)).eval()
    shake(tensor for tensor in other.parameters() if tensor.requires_grad)
    other.save_pretrained(tmp_path / "theirs")
    model = net()
    load_adapter(model, tmp_path / "theirs")
    torch.testing.assert_close(output(model), output(other), atol=TOLERANCE, rtol=TOLERANCE)
    save_adapter(model, tmp_path / "ours")
    one, two = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


@every
def test_a_merge_does_the_same_and_a_step_lowers_the_loss(name: str) -> None:
    model = adapted(name)
    live = output(model)
    merged = copy.deepcopy(model)
    merge_into(merged)
    assert not adapters_of(merged)
    torch.testing.assert_close(output(merged), live, atol=TOLERANCE, rtol=TOLERANCE)
    optimizer = torch.optim.SGD(trained_tensors(model).values(), lr=1e-3)
    losses = []
    for _ in range(2):
        loss = (model(IMAGES) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0]


def test_all_linear_leaves_convolutions_alone() -> None:
    assert attach(net(), graft.LoraConfig(rank=2)).targets == ("head",)


@pytest.mark.parametrize("method", ["vera", "oft"])
def test_methods_without_convolutions_say_so(method: str) -> None:
    model = net()
    with pytest.raises(TargetError, match=f"first is of kind conv2d, which {method} does not adapt"):
        attach(model, METHODS[method].config_class(target_modules=("head", "first")))
    assert not adapters_of(model)
    assert type(model.head) is nn.Linear


@pytest.mark.parametrize("method", ["lora", "lora_fa", "dora"])
def test_groups_are_refused_before_anything_changes(method: str) -> None:
    model = net()
    with pytest.raises(TargetError, match="in 4 groups"):
        attach(model, METHODS[method].config_class(target_modules=("first", "grouped")))
    assert not adapters_of(model)
    assert type(model.first) is nn.Conv2d


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"init": "pissa"}, "no start 'pissa'"), ({"lora_bias": True}, "bias"), ({"bias": "all"}, "bias")],
)
def test_what_only_linears_have_is_refused(settings: dict[str, Any], told: str) -> None:
    model = net()
    with pytest.raises(TargetError, match=told):
        attach(model, graft.LoraConfig(rank=2, target_modules=("head", "first"), **settings))
    assert not adapters_of(model)
    assert type(model.head) is nn.Linear


@pytest.mark.parametrize("kind", ["LoHaConfig", "LoKrConfig"])
def test_kernels_of_their_own_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    config = getattr(peft, kind)(r=1, target_modules=["tall"], use_effective_conv2d=True)
    peft.get_peft_model(net(), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="use_effective_conv2d"):
        load_adapter(net(), tmp_path)
    config = getattr(peft, kind)(r=2, target_modules=["point"], use_effective_conv2d=True)
    other = peft.get_peft_model(net(), config).eval()  # no kernel: the option has no effect
    shake(tensor for tensor in other.parameters() if tensor.requires_grad)
    other.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_effective_conv2d"]
    model = net()
    load_adapter(model, tmp_path)
    torch.testing.assert_close(output(model), output(other), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_dilation_and_padding_of_any_mode(method: str) -> None:
    """PEFT's LoRA leaves both out; here the update has the form of the layer, as a merge shows."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=2, dilation=2, padding_mode="reflect"))
    attach(model, METHODS[method].config_class(rank=2, target_modules=("0",)))
    shake(trained_tensors(model).values())
    live = output(model)
    merge_into(model)
    torch.testing.assert_close(output(model), live, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(output(model)[0], model(IMAGES[0]), atol=TOLERANCE, rtol=TOLERANCE)


@every
def test_outputs_keep_the_dtype_of_the_base(name: str) -> None:
    model = net().bfloat16()
    attach(model, CASES[name].ours)
    shake(trained_tensors(model).values())
    with torch.no_grad():
        made = model(IMAGES.bfloat16())
    assert made.dtype == torch.bfloat16
    # 8 bits: a few roundings of outputs up to about 1.
    torch.testing.assert_close(made.float(), output(adapted(name)), atol=5e-2, rtol=5e-2)
