"""Every field of PEFT's settings with another value: it acts as in PEFT, or is refused by its name."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import graft.models.load as models
from graft.adapters.attach import adapters_of, detach
from graft.adapters.peft_config import _PLACEMENT, _WITHOUT_EFFECT
from graft.adapters.peft_dialects import DIALECTS, Dialect
from graft.adapters.peft_format import load_adapter, save_adapter
from graft.errors import AdapterError

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

IDS = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(3))

BASICS: dict[str, dict[str, Any]] = {
    "LoraConfig": {"r": 4},
    "LoHaConfig": {"r": 2},
    "LoKrConfig": {"r": 2},
    "OFTConfig": {"oft_block_size": 8, "use_cayley_neumann": False},
    "VeraConfig": {"r": 8},
    "IA3Config": {"feedforward_modules": []},
    "AdaLoraConfig": {"init_r": 4, "target_r": 2, "total_step": 10},
    "TrainableTokensConfig": {"token_indices": [int(IDS[0, 3]), int(IDS[1, 5])]},
}
"""What differs from PEFT's defaults in all of a class's cases."""

COMMON: dict[str, Any] = {
    "task_type": "FEATURE_EXTRACTION",
    "auto_mapping": {"base_model_class": "LlamaForCausalLM"},
    "peft_version": "0.3.0",
    "base_model_name_or_path": "org/other",
    "revision": "0123abc",
    "inference_mode": True,
    "target_modules": ["o_proj", "up_proj"],
    "exclude_modules": ["layers.0.self_attn.q_proj"],
    "modules_to_save": ["norm"],
    "layers_to_transform": [1],
    "layers_pattern": "layers",
    "fan_in_fan_out": True,
    "bias": "all",
    "init_weights": False,
    "rank_pattern": {"q_proj": 3},
    "alpha_pattern": {"down_proj": 3},
    "alpha": 5,
    "rank_dropout": 0.2,
    "module_dropout": 0.2,
    "use_effective_conv2d": True,
}
"""Values that are no defaults, of fields that several classes have."""

OWN: dict[str, dict[str, Any]] = {
    "LoraConfig": {
        "peft_type": "PREFIX_TUNING",
        "r": 3,
        "lora_alpha": 5,
        "lora_dropout": 0.3,
        "use_rslora": True,
        "init_lora_weights": "gaussian",
        "megatron_config": {"tensor_model_parallel_size": 2},
        "megatron_core": "megatron.other",
        "trainable_token_indices": [3, 4],
        "loftq_config": {"loftq_bits": 4},
        "eva_config": {"rho": 1.0},
        "corda_config": {"cache_file": "x"},
        "lora_ga_config": {"direction": "ArB2r"},
        "use_dora": True,
        "velora_config": {"num_groups": 8},
        "alora_invocation_tokens": [5, 6],
        "use_qalora": True,
        "qalora_group_size": 8,
        "monteclora_config": {"num_samples": 4},
        "layer_replication": [[0, 2], [1, 2]],
        "runtime_config": {"ephemeral_gpu_offload": True},
        "lora_bias": True,
        "target_parameters": ["experts.down_proj"],
        "use_bdlora": {"nblocks": 2},
        "arrow_config": {"top_k": 2},
        "kasa_config": {"beta": 0.1},
        "ensure_weight_tying": True,
    },
    "LoHaConfig": {"peft_type": "HRA", "r": 3},
    "LoKrConfig": {
        "peft_type": "BOFT",
        "r": 3,
        "init_weights": "lycoris",
        "decompose_both": True,
        "decompose_factor": 4,
        "rank_dropout_scale": True,
    },
    "OFTConfig": {
        "peft_type": "POLY",
        "r": 4,
        "oft_block_size": 4,
        "coft": True,
        "eps": 1e-3,
        "block_share": True,
        "use_cayley_neumann": True,
        "num_cayley_neumann_terms": 3,
    },
    "VeraConfig": {
        "peft_type": "FOURIERFT",
        "r": 12,
        "projection_prng_key": 3,
        "save_projection": False,
        "vera_dropout": 0.2,
        "d_initial": 0.3,
    },
    "IA3Config": {"peft_type": "LN_TUNING", "feedforward_modules": ["down_proj"], "init_ia3_weights": False},
}
"""Of the other fields."""

OWN["AdaLoraConfig"] = {
    **OWN["LoraConfig"],
    "peft_type": "XLORA",
    "init_lora_weights": "gaussian",
    "target_r": 3,
    "init_r": 6,
    "tinit": 2,
    "tfinal": 3,
    "deltaT": 2,
    "beta1": 0.8,
    "beta2": 0.8,
    "orth_reg_weight": 0.1,
    "total_step": 20,
}
OWN["TrainableTokensConfig"] = {
    "peft_type": "CPT",
    "token_indices": [int(IDS[0, 8])],
    "target_modules": ["model.embed_tokens"],
    "exclude_modules": ["layers.0"],
}

FILES_OF_LORA = ("lora_fa", "qa_lora", "qat")
"""Methods whose files PEFT takes for those of LoRA."""

SAME_FUNCTION = frozenset({*_WITHOUT_EFFECT, "base_model_name_or_path", "revision", "runtime_config"})
"""Fields that say how a file came about, what base it is for, or where PEFT computes."""

CASES = [
    (dialect.method, kind, item.name)
    for dialect in DIALECTS
    for kind in BASICS
    if dialect.peft_type == getattr(peft, kind)(**BASICS[kind]).peft_type
    and dialect.method not in FILES_OF_LORA
    for item in dataclasses.fields(getattr(peft, kind))
]
every_field = pytest.mark.parametrize(("method", "kind", "name"), CASES)


def sample(kind: str, name: str) -> Any:
    """A value that is not PEFT's default; a field without one is new to these tests."""
    return OWN[kind][name] if name in OWN[kind] else COMMON[name]


def dialect_of(method: str) -> Dialect:
    return next(dialect for dialect in DIALECTS if dialect.method == method)


def options(method: str, kind: str, name: str) -> dict[str, Any]:
    """The settings in which one field is as in `sample`, with what it takes to act."""
    more = {"layers_to_transform": [0]} if name == "layers_pattern" else {}
    more |= {"use_dora": True} if method == "dora" else {}
    targets = ["embed_tokens"] if kind == "TrainableTokensConfig" else ["q_proj", "v_proj", "down_proj"]
    return {"target_modules": targets, **BASICS[kind], **more, name: sample(kind, name)}


class Side:
    """The base on both sides."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self.ours = models.load(directory).model
        self.plain = logits(self.theirs)

    def written(self, out: Path, kind: str, given: dict[str, Any]) -> Tensor:
        """What PEFT saves, trained, and what it computes with that."""
        config = getattr(peft, kind)(**{"task_type": "CAUSAL_LM", **given})
        model = peft.get_peft_model(copy.deepcopy(self.theirs), config).eval()
        generator = torch.Generator().manual_seed(11)
        for tensor in (tensor for tensor in model.parameters() if tensor.requires_grad):
            tensor.data += 0.05 * torch.randn(tensor.shape, generator=generator)
        model.save_pretrained(out)
        return logits(model)

    def read(self, directory: Path, **how: Any) -> Tensor:
        for adapter in list(adapters_of(self.ours)):
            detach(self.ours, adapter)
        load_adapter(self.ours, directory, **how)
        return logits(self.ours)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
        return found


@pytest.fixture(scope="module")
def side(tiny_dir: Callable[..., Path]) -> Side:
    return Side(tiny_dir("llama"))


def change(directory: Path, **options: Any) -> Path:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))
    return directory


@every_field
def test_a_field_is_of_one_kind(method: str, kind: str, name: str) -> None:
    dialect = dialect_of(method)
    groups = {
        "placement": _PLACEMENT - dialect.lacks,
        "without effect": _WITHOUT_EFFECT,
        "honoured": dialect.honoured,
        "idle": dialect.idle,
        "training": dialect.in_training,
        "refused": frozenset(dialect.refused),
    }
    assert len([group for group, held in groups.items() if name in held]) == 1, name


ACTING = [case for case in CASES if case[::2] != ("adalora", "rank_pattern")]
"""PEFT only heeds that one as it loads a file: test_peft_adalora has it."""


@pytest.mark.parametrize(("method", "kind", "name"), ACTING)
def test_a_field_acts_or_is_refused(side: Side, method: str, kind: str, name: str, tmp_path: Path) -> None:
    dialect, value = dialect_of(method), sample(kind, name)
    default = getattr(getattr(peft, kind)(**BASICS[kind]), name)
    assert value != BASICS[kind].get(name, default), "the sample is nothing new"
    # This base has no stacks of experts that could be targets: test_peft_matrix has them.
    refused = name in dialect.refused or name in ("peft_type", "target_parameters")
    if not refused and name not in SAME_FUNCTION:
        expected = side.written(tmp_path, kind, options(method, kind, name))
    else:
        given = {key: kept for key, kept in options(method, kind, name).items() if key != name}
        expected = side.written(tmp_path, kind, {**BASICS[kind], **given})
        change(tmp_path, **{name: value})
    if refused:
        with pytest.raises(AdapterError, match=name) as caught:
            side.read(tmp_path)
        assert name in caught.value.where
        return
    live = side.read(tmp_path)
    assert (live - side.plain).abs().max() > 1e-3
    torch.testing.assert_close(live, expected, atol=1e-5, rtol=1e-5)


IN_TRAINING = [case for case in CASES if case[2] in dialect_of(case[0]).in_training]


@pytest.mark.parametrize(("method", "kind", "name"), IN_TRAINING)
def test_what_acts_in_training_alone_is_not_trained_further(
    side: Side, method: str, kind: str, name: str, tmp_path: Path
) -> None:
    side.written(tmp_path, kind, options(method, kind, name))
    side.read(tmp_path)
    with pytest.raises(AdapterError, match=name):
        side.read(tmp_path, trainable=True)
    side.read(change(tmp_path, **{name: 0}), trainable=True)


@pytest.mark.parametrize("kind", sorted(set(peft.PeftType) - {dialect.peft_type for dialect in DIALECTS}))
def test_methods_that_are_not_here_are_refused_by_name(side: Side, kind: str, tmp_path: Path) -> None:
    config = {"peft_type": str(kind.value if hasattr(kind, "value") else kind)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=f"peft_type .{config['peft_type']}") as caught:
        side.read(tmp_path)
    assert "peft_type" in caught.value.where


INITS = [
    "pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica", "something-new", 7, ["pissa"],
]  # fmt: skip


@pytest.mark.parametrize("init", INITS, ids=str)
def test_starts_that_change_the_base_are_refused(side: Side, init: Any, tmp_path: Path) -> None:
    side.written(tmp_path, "LoraConfig", {"r": 4, "target_modules": ["q_proj"]})
    with pytest.raises(AdapterError, match="init_lora_weights") as caught:
        side.read(change(tmp_path, init_lora_weights=init))
    assert "init_lora_weights" in caught.value.where


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_that_was_converted_to_plain_lora_is_read(side: Side, init: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init, task_type="CAUSAL_LM")
    model = peft.get_peft_model(copy.deepcopy(side.theirs), config).eval()
    model.save_pretrained(tmp_path / "start")
    for tensor in (tensor for tensor in model.parameters() if tensor.requires_grad):
        tensor.data += 0.05 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(2))
    expected = logits(model)
    start = str(tmp_path / "start")
    raw = json.loads((tmp_path / "start" / "adapter_config.json").read_text())
    (tmp_path / "start" / "adapter_config.json").write_text(json.dumps({**raw, "init_lora_weights": True}))
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=start)
    torch.testing.assert_close(side.read(tmp_path / "plain"), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("value", [{"rho": 2.0, "tau": 0.99}, None], ids=["settings", "none"])
def test_ranks_that_eva_chose_are_read(side: Side, value: Any, tmp_path: Path) -> None:
    given = {"r": 4, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"layers.0.self_attn.q_proj": 6}}
    expected = side.written(tmp_path, "LoraConfig", given)
    live = side.read(change(tmp_path, init_lora_weights="eva", eva_config=value))
    torch.testing.assert_close(live, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("terms", [0, 1, 2])
def test_a_series_that_is_no_rotation_is_refused(side: Side, terms: int, tmp_path: Path) -> None:
    given = {"oft_block_size": 8, "target_modules": ["q_proj"], "num_cayley_neumann_terms": terms}
    config = {**given, "peft_type": "OFT", "use_cayley_neumann": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="num_cayley_neumann_terms") as caught:
        side.read(tmp_path)
    assert "num_cayley_neumann_terms" in caught.value.where


def test_a_layer_that_the_method_does_not_adapt_is_refused_by_its_kind(side: Side, tmp_path: Path) -> None:
    given = {"target_modules": ["lm_head"], "token_indices": [3]}
    side.written(tmp_path, "TrainableTokensConfig", given)
    with pytest.raises(
        AdapterError, match="lm_head is of kind linear, which trainable_tokens does not adapt"
    ):
        side.read(tmp_path)


def test_pickles_are_not_opened(side: Side, tmp_path: Path) -> None:
    side.written(tmp_path, "LoraConfig", {"r": 4, "target_modules": ["q_proj"]})
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"adapter_model\.bin is a pickle"):
        side.read(tmp_path)


def test_adapters_with_names(side: Side, tmp_path: Path) -> None:
    """PEFT keeps names in folders, not in keys; keys with one are refused, with the nearest told."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(side.theirs), config, adapter_name="other").eval()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(side.read(tmp_path / "other"), logits(model), atol=1e-5, rtol=1e-5)
    path = tmp_path / "other" / "adapter_model.safetensors"
    named = {key.replace(".weight", ".other.weight"): tensor for key, tensor in load_file(path).items()}
    save_file(named, path, {"format": "pt"})
    with pytest.raises(AdapterError, match=r"tensors are missing.*lora_A\.other\.weight"):
        side.read(tmp_path / "other")


class Nested(nn.Module):
    """Containers with numbers, one in the other."""

    def __init__(self) -> None:
        super().__init__()

        def block() -> nn.ModuleDict:
            return nn.ModuleDict({"parts": nn.ModuleList(nn.ModuleDict({"lin": linear()}) for _ in range(2))})

        def linear() -> nn.Linear:
            made = nn.Linear(4, 4)
            nn.init.normal_(made.weight, generator=torch.Generator().manual_seed(0))
            nn.init.zeros_(made.bias)
            return made

        self.body = nn.ModuleDict({"blocks": nn.ModuleList(block() for _ in range(3))})

    def forward(self, x: Tensor) -> Tensor:
        for block in self.body["blocks"]:  # type: ignore[union-attr]
            for part in block["parts"]:
                x = part["lin"](x).sin()
        return x


@pytest.mark.parametrize(("pattern", "number"), [("blocks", 2), ("parts", 1), (None, 2)])
def test_blocks_are_counted_in_the_container_that_is_named(
    pattern: str | None, number: int, tmp_path: Path
) -> None:
    config = peft.LoraConfig(
        r=2, target_modules=["lin"], layers_to_transform=[number], layers_pattern=pattern
    )
    other = peft.get_peft_model(Nested(), config)
    for tensor in (tensor for tensor in other.parameters() if tensor.requires_grad):
        tensor.data += 0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3))
    other.save_pretrained(tmp_path / "theirs")
    model, rows = Nested(), torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    made = load_adapter(model, tmp_path / "theirs")
    assert len(made.targets) == (3 if pattern == "parts" else 2)
    torch.testing.assert_close(model(rows), other(rows), atol=1e-5, rtol=1e-5)
    save_adapter(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(Nested(), tmp_path / "ours")
    torch.testing.assert_close(again(rows), model(rows), atol=1e-5, rtol=1e-5)
