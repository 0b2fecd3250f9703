"""Which tensors have a learning rate of their own, and which do not decay."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from graft.adapters.adapted import SavedModule
from graft.adapters.attach import attach
from graft.adapters.attached import adapter_tensors
from graft.adapters.lora import LoraConfig
from graft.config import build, read_assignments
from graft.errors import ConfigError
from graft.models.load import load
from graft.training.build import run_from_config
from graft.training.config import RunConfig, TrainingConfig
from graft.training.groups import Treatment, treatments
from graft.training.optim import Optimizer


def test_rates_of_an_adapter(tiny_dir: Callable[..., Path]) -> None:
    base = load(str(tiny_dir("llama")))
    config = LoraConfig(
        rank=2, target_modules=("q_proj", "embed_tokens"), modules_to_save=("lm_head", "norm")
    )
    attach(base.model, config)
    asked = TrainingConfig(lora_plus_ratio=4.0, embedding_learning_rate=1e-5)
    found = treatments(base.model, adapter_tensors(base.model), asked, peak=1e-3)
    for name, each in found.items():
        apart = "embed_tokens" in name or name in ("lm_head.weight", "model.norm.weight")
        wanted = 1e-2 if apart else 4.0 if "lora_B" in name else 1.0
        assert each.rate == pytest.approx(wanted), name
        assert each.decays == (name != "model.norm.weight")
    without = treatments(base.model, adapter_tensors(base.model), TrainingConfig(lora_plus_ratio=4.0), 1e-3)
    assert without["model.embed_tokens.lora_embedding_B"].rate == 4.0
    assert without["lm_head.weight"].rate == 1.0


def test_whole_models(tiny_dir: Callable[..., Path]) -> None:
    model = load(str(tiny_dir("llama"))).model
    parameters = dict(model.named_parameters())
    found = treatments(model, parameters, TrainingConfig(embedding_learning_rate=2e-6), peak=1e-5)
    embeddings = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    for name, each in found.items():
        assert each.rate == pytest.approx(0.2 if id(parameters[name]) in embeddings else 1.0), name
        is_input = parameters[name] is model.get_input_embeddings().weight
        assert each.float32_state == is_input
        assert each.decays == (parameters[name].ndim >= 2 and not is_input), name


@pytest.mark.parametrize(
    "field",
    [
        "lora_plus_ratio",
        "embedding_learning_rate",
        "head_learning_rate",
        "lora_A_learning_rate",
        "lora_B_learning_rate",
        "magnitude_learning_rate",
        "head_weight_decay",
        "embedding_weight_decay",
    ],
)
def test_a_rate_for_nothing_is_refused(field: str, tiny_dir: Callable[..., Path]) -> None:
    model = load(str(tiny_dir("llama"))).model
    vectors = {name: p for name, p in model.named_parameters() if p.ndim == 1}
    with pytest.raises(ConfigError, match=f"training.{field} = 0.5, but no") as caught:
        treatments(model, vectors, TrainingConfig(**{field: 0.5}), 1e-4)
    assert caught.value.where == f"training.{field}"


@pytest.mark.parametrize(
    "field", ["lora_plus_ratio", "lora_A_learning_rate", "lora_B_learning_rate", "magnitude_learning_rate"]
)
def test_a_rate_of_adapters_without_one_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=rf"{field} = 4.0 without an adapter"):
        build(RunConfig, read_assignments([f"training.{field}=4.0"]))


def test_two_rates_for_lora_b_are_refused() -> None:
    with pytest.raises(ConfigError, match="left out with lora_B_learning_rate"):
        TrainingConfig(lora_plus_ratio=2.0, lora_B_learning_rate=1e-3)


@pytest.mark.parametrize("more", [(), ("training.lora_plus_ratio=4",), ("training.lora_plus_ratio=0.25",)])
def test_a_run_uses_them(more: tuple[str, ...], tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    """After one step of sgd, lora_B has moved in proportion to its learning rate."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "one and one: ", "completion": "two"}) + "\n")

    def moved(out: str, *words: str) -> dict[str, torch.Tensor]:
        given = [f"model.name={tiny_dir('llama')}", f"data.train={rows}", f"output={tmp_path / out}"]
        given += ["adapter.rank=2", "training.max_steps=1", "data.max_length=64", "training.optimizer=sgd"]
        given += ["training.learning_rate=0.1", "training.warmup_steps=0", *words]
        run = run_from_config(build(RunConfig, read_assignments(given)))
        return load_file(run.directory / "adapter" / "adapter_model.safetensors")

    ratio = float(more[0].split("=")[1]) if more else 1.0
    plain, found = moved("plain"), moved("found", *more)
    for name, value in plain.items():
        if "lora_B" in name:  # begins at zero
            assert torch.allclose(found[name], ratio * value, rtol=1e-6, atol=0), name
            assert value.abs().max() > 0


@pytest.mark.parametrize(
    ("theirs", "ours"), [("adamw_torch", "adamw"), ("adamw_bnb_8bit", "adamw_8bit"), ("lion_32bit", "lion")]
)
def test_other_tools_names(theirs: str, ours: str) -> None:
    words = [f"training.optim={theirs}", "training.learning_rate=1e-4", "adapter.rank=2"]
    settings = read_assignments([*words, "training.loraplus_lr_ratio=16", "training.embedding_lr=1e-6"])
    config = build(RunConfig, settings).training
    assert (config.optimizer, config.lora_plus_ratio, config.embedding_learning_rate) == (ours, 16.0, 1e-6)
    assert f"training.optimizer: {theirs} (--set training.optim) is {ours} here" in settings.notes


def test_every_group_has_its_rate(tiny_dir: Callable[..., Path]) -> None:
    base = load(str(tiny_dir("llama")))
    saved = ("lm_head", "norm")
    attach(base.model, LoraConfig(rank=2, target_modules=("q_proj", "embed_tokens"), modules_to_save=saved))
    parameters = dict(adapter_tensors(base.model))
    parameters["model.layers.0.self_attn.q_proj.lora_magnitude_vector.weight"] = nn.Parameter(torch.ones(32))
    asked = TrainingConfig(
        lora_A_learning_rate=1e-3,
        lora_B_learning_rate=2e-3,
        magnitude_learning_rate=3e-3,
        head_learning_rate=4e-3,
        embedding_learning_rate=5e-3,
        weight_decay=0.1,
        head_weight_decay=0.2,
        embedding_weight_decay=0.3,
    )
    found = treatments(base.model, parameters, asked, peak=1e-2)
    wanted = {
        "model.embed_tokens.lora_embedding_A": ("embedding", 5e-3, True, 0.3),
        "model.embed_tokens.lora_embedding_B": ("embedding", 5e-3, True, 0.3),
        "lm_head.weight": ("head", 4e-3, True, 0.2),
        "model.norm.weight": ("saved", 5e-3, False, None),
        "model.layers.0.self_attn.q_proj.lora_magnitude_vector.weight": ("magnitude", 3e-3, False, None),
        "model.layers.1.self_attn.q_proj.lora_A.weight": ("lora_A", 1e-3, True, None),
        "model.layers.1.self_attn.q_proj.lora_B.weight": ("lora_B", 2e-3, True, None),
    }
    for name, (group, rate, decays, decay) in wanted.items():
        each = found[name]
        assert (each.group, each.decays, each.weight_decay) == (group, decays, decay), name
        assert each.rate == pytest.approx(rate / 1e-2), name
    assert set(found) - set(wanted) == {
        f"model.layers.0.self_attn.q_proj.lora_{letter}.weight" for letter in "AB"
    }
    # Without a rate of its own the head goes with the embeddings.
    other = treatments(base.model, parameters, TrainingConfig(embedding_learning_rate=5e-3), peak=1e-2)
    assert other["lm_head.weight"].rate == pytest.approx(0.5)


@pytest.mark.parametrize("leaf", ["score", "classifier"])
@pytest.mark.parametrize("saved", [True, False])
def test_classification_heads(leaf: str, saved: bool) -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(3, 3)
            head: nn.Module = nn.Linear(3, 2)
            if saved:
                head = SavedModule(head)
                head.add_copy("default")
            setattr(self, leaf, head)

    model = Classifier()
    found = treatments(
        model,
        dict(model.named_parameters()),
        TrainingConfig(head_learning_rate=1e-3, head_weight_decay=0.5),
        1e-4,
    )
    for name, each in found.items():
        of_head = name.startswith(leaf) and ".original." not in name
        if ".original." in name:
            continue
        assert each.group == ("head" if of_head else "rest"), name
        assert each.rate == pytest.approx(10.0 if of_head else 1.0), name
        assert each.weight_decay == (0.5 if of_head and name.endswith("weight") else None), name


def test_input_embeddings_decay_when_asked(tiny_dir: Callable[..., Path]) -> None:
    model = load(str(tiny_dir("llama"))).model
    parameters = dict(model.named_parameters())
    asked = TrainingConfig(embedding_weight_decay=0.3, weight_decay=0.1, head_weight_decay=0.0)
    found = treatments(model, parameters, asked, peak=1e-5)
    optimizer = Optimizer(parameters, asked, found)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    for p in parameters.values():
        p.grad = torch.zeros_like(p)
    optimizer.step(0.5, 0.0)
    own = {"model.embed_tokens.weight": 0.3, "lm_head.weight": 0.0}
    for name, p in parameters.items():
        decay = own.get(name, 0.1 if p.ndim >= 2 else 0.0)
        assert torch.allclose(p, before[name] * (1 - 0.5 * decay), rtol=1e-6), name


def test_groups_are_clipped_one_by_one_and_then_together() -> None:
    """By the definition: each group's gradients to the norm, then what is left to that of all."""
    treated = {"a": Treatment(group="lora_A"), "b": Treatment(group="lora_B"), "c": Treatment(group="lora_B")}
    for most, of_group in ((0.0, 2.0), (2.5, 2.0), (1.0, 0.0), (0.0, 0.0), (100.0, 100.0), (1.0, 2.0)):
        params = {name: nn.Parameter(torch.zeros(4)) for name in treated}
        given = {"a": torch.ones(4) * 0.5, "b": torch.ones(4) * 3, "c": torch.ones(4) * 4}  # norms 1, 6, 8
        config = TrainingConfig(
            optimizer="sgd", learning_rate=1.0, max_grad_norm=most, group_max_grad_norm=of_group
        )
        optimizer = Optimizer(params, config, treated)
        for name, p in params.items():
            p.grad = given[name].clone()
        norm = optimizer.gradient_norm()
        assert norm == pytest.approx(101**0.5), "before any clipping"
        optimizer.step(1.0, norm)
        left = {name: value.double() for name, value in given.items()}
        for names in ("a", "bc"):
            total = torch.cat([left[name] for name in names]).norm()
            for name in names:
                left[name] *= min(1.0, of_group / float(total)) if of_group else 1.0
        total = torch.cat(list(left.values())).norm()
        for name, p in params.items():
            wanted = -left[name] * (min(1.0, most / float(total)) if most else 1.0)
            assert torch.allclose(p.detach().double(), wanted, rtol=1e-6), (name, most, of_group)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("field", ["group_max_grad_norm", "head_weight_decay", "lora_A_learning_rate"])
def test_bad_values(field: str, value: float) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainingConfig(**{field: value})
    assert caught.value.where == f"training.{field}"


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("paged_adamw_32bit", "adamw"), ("paged_adamw_8bit", "adamw_8bit"), ("paged_lion_32bit", "lion")],
)
def test_other_tools_paged_optimizers_ask_for_a_budget(theirs: str, ours: str) -> None:
    with pytest.raises(ConfigError, match="optimizer_memory") as caught:
        build(RunConfig, read_assignments([f"training.optim={theirs}"]))
    assert ours in caught.value.fix
