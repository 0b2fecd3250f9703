"""Starts beside PEFT's own: the same first factors, the same training, files that either side reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graft.models.load as models
from graft.adapters.attach import adapters_of, attach
from graft.adapters.attached import trained_tensors
from graft.adapters.lora import LoraConfig
from graft.adapters.peft_format import load_adapter, save_adapter

pytestmark = [
    # PEFT warns when it corrects fan_in_fan_out, or when ranks leave layers out.
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

IDS = torch.randint(3, 259, (4, 24), generator=torch.Generator().manual_seed(3))
LINEARS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"]}


def theirs(directory: Path, init: Any, family: str, **more: Any) -> Any:
    import peft
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=12,
        target_modules=LINEARS[family],
        init_lora_weights=init,
        fan_in_fan_out=family == "gpt2",
        **more,
    )
    return peft.get_peft_model(AutoModelForCausalLM.from_pretrained(directory), config).eval()


def ours(directory: Path, init: Any, family: str, **more: Any) -> Any:
    model = models.load(directory).model
    attach(model, LoraConfig(rank=4, alpha=12, target_modules=tuple(LINEARS[family]), init=init), **more)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def train(model: Any, parameters: Any) -> None:
    """Plain descent: its steps are the same whichever way singular vectors point."""
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def their_parameters(model: Any) -> list[Any]:
    return [p for p in model.parameters() if p.requires_grad]


def pairs(mine: Any, other: Any) -> Any:
    for path in adapters_of(mine)["default"].targets:
        layer: Any = mine.get_submodule(path).adapters["default"]
        module = other.base_model.model.get_submodule(path)
        yield path, layer, module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach()


# Their OLoRA decomposes the weight of a Conv1D as it is stored, (in, out), and so another matrix.
@pytest.mark.parametrize(("init", "family"), [("pissa", "llama"), ("pissa", "gpt2"), ("olora", "llama")])
def test_first_factors_training_and_files_are_the_same(
    tiny_dir: Callable[..., Path], family: str, init: str, tmp_path: Path
) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    directory = tiny_dir(family)
    mine, other = ours(directory, init, family), theirs(directory, init, family)
    for path, layer, down, up in pairs(mine, other):
        torch.testing.assert_close(layer.lora_B @ layer.lora_A, up @ down, atol=1e-5, rtol=1e-5, msg=path)
        signs = (layer.lora_A * down).sum(1).sign()  # of singular vectors: a pair may point either way
        torch.testing.assert_close(layer.lora_A, signs[:, None] * down, atol=1e-4, rtol=1e-4, msg=path)
        torch.testing.assert_close(layer.lora_B, signs * up, atol=1e-4, rtol=1e-4, msg=path)
    plain = logits(mine)
    torch.testing.assert_close(plain, logits(other), atol=1e-4, rtol=1e-4)
    other.peft_config["default"].init_lora_weights = True
    other.save_pretrained(tmp_path / "start")
    other.peft_config["default"].init_lora_weights = init
    train(mine, trained_tensors(mine).values())
    train(other, their_parameters(other))
    assert float((logits(mine) - plain).abs().max()) > 1e-2
    torch.testing.assert_close(logits(mine), logits(other), atol=1e-3, rtol=1e-3)

    save_adapter(mine, tmp_path / "mine")
    read = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory), tmp_path / "mine")
    torch.testing.assert_close(logits(read.eval()), logits(mine), atol=1e-4, rtol=1e-4)
    start = str(tmp_path / "start")
    other.save_pretrained(tmp_path / "other", path_initial_model_for_weight_conversion=start)
    back = models.load(directory).model
    load_adapter(back, tmp_path / "other")
    torch.testing.assert_close(logits(back), logits(other), atol=1e-4, rtol=1e-4)


def test_a_randomized_svd_leaves_no_more_than_theirs(tiny_dir: Callable[..., Path]) -> None:
    mine = models.load(tiny_dir("llama")).model
    config = LoraConfig(rank=4, alpha=12, target_modules=("down_proj",), init="pissa", init_iterations=2)
    attach(mine, config, seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        other = theirs(tiny_dir("llama"), "pissa_niter_2", "llama")
    for path, layer, down, up in pairs(mine, other):
        weight = mine.get_submodule(path).base.dense_weight()
        left = [float((weight - 3 * b @ a).norm()) for a, b in ((layer.lora_A, layer.lora_B), (down, up))]
        best = float(torch.linalg.svdvals(weight)[4:].norm())
        assert best * (1 - 1e-5) <= left[0] <= left[1]
        assert left[0] <= 1.01 * best


def test_eva_finds_their_directions_and_ranks(tiny_dir: Callable[..., Path]) -> None:
    """On layers whose inputs all differ: theirs breaks ties as it comes."""
    import peft

    names = {"llama": ["q_proj", "o_proj", "gate_proj", "down_proj"]}
    directory = tiny_dir("llama")
    labels = IDS.clone()
    labels[:, :7] = -100
    batch = {"input_ids": IDS, "labels": labels, "attention_mask": torch.ones_like(IDS)}
    mine = models.load(directory).model
    made = attach(
        mine, LoraConfig(rank=4, alpha=12, target_modules=tuple(names["llama"]), init="eva"), batches=[batch]
    )
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=12,
        target_modules=names["llama"],
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=2.0),
    )
    from transformers import AutoModelForCausalLM

    other = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(directory).eval(), config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        peft.initialize_lora_eva_weights(other, [batch, batch], show_progress_bar=False)
    written = other.peft_config["default"]
    ranks = {path: written.rank_pattern.get(path, 4) for path in made.targets}
    assert {path: made.config.at(path).rank for path in made.targets} == ranks
    assert len(set(ranks.values())) > 1
    assert sum(ranks.values()) == 4 * 8
    for path, layer, down, up in pairs(mine, other):
        assert not up.any()
        assert layer.scaling == pytest.approx(other.base_model.model.get_submodule(path).scaling["default"])
        # Their decomposition is a randomized one: the spans, and the leading direction.
        inside = (layer.lora_A @ down.T).square().sum() / len(down)
        assert float(inside) > 0.99, path
        assert abs(float(layer.lora_A[0] @ down[0])) > 0.999, path


def test_the_orthogonal_start_has_the_size_of_theirs(tiny_dir: Callable[..., Path]) -> None:
    directory = tiny_dir("llama")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        other = theirs(directory, "orthogonal", "llama")
    mine = ours(directory, "orthogonal", "llama", seed=1)
    sizes = [[float(t.square().sum()) for t in (layer.lora_A, layer.lora_B, down, up)]
             for _, layer, down, up in pairs(mine, other)]  # fmt: skip
    down, up, their_down, their_up = (sum(column) for column in zip(*sizes, strict=True))
    assert down == pytest.approx(their_down, rel=0.2)
    assert up == pytest.approx(their_up, rel=0.2)
    for _, layer, down, up in pairs(mine, other):
        for one, two in ((layer.lora_A, layer.lora_B), (down, up)):
            assert float((two @ one).norm()) < 1e-5 * float(one.norm() * two.norm())
