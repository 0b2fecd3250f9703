"""Options of PEFT's adapters in combinations: we compute with what PEFT writes, PEFT with what we write."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import graft.models.load as models
from graft.adapters.attach import adapters_of, detach
from graft.adapters.peft_format import load_adapter, save_adapter

pytestmark = [
    # PEFT warns when it corrects fan_in_fan_out, saves embeddings that are targeted, or meets tied weights.
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*grouped_mm.*"),
]

TOLERANCE = 1e-5
"""fp32 logits of order one; the two sides sum in another order."""

IDS = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(3))

MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
SIZES: dict[str, dict[str, Any]] = {
    "mixtral": {**MIXTURE, "num_local_experts": 4},
    "qwen3_moe": {**MIXTURE, "num_experts": 4, "head_dim": 8},
    "gpt_oss": {**MIXTURE, "num_local_experts": 4, "head_dim": 8},
}


@dataclass(frozen=True)
class Names:
    """What a family calls its parts."""

    attention: str
    """A linear of the attention."""
    inner: str
    """A linear of the feed-forward network."""
    blocks: str = "layers"
    parts: tuple[str, str] = ("self_attn", "mlp")
    embedding: str = "embed_tokens"
    norm: str = "norm"
    head: str = "lm_head"


NAMES = {
    "llama": Names("q_proj", "down_proj"),
    "mistral": Names("v_proj", "up_proj"),
    "qwen2": Names("k_proj", "gate_proj"),
    "qwen3": Names("o_proj", "down_proj"),
    "gemma2": Names("q_proj", "up_proj"),
    "gemma3_text": Names("v_proj", "down_proj"),
    "phi3": Names("qkv_proj", "gate_up_proj"),
    "gpt2": Names("c_attn", "c_fc", "h", ("attn", "mlp"), "wte", "ln_f"),
    "gpt_neox": Names(
        "query_key_value", "dense_h_to_4h", "layers", ("attention", "mlp"), "embed_in", "final_layer_norm"
    ),
}

PLACES: dict[str, Callable[[Names], dict[str, Any]]] = {
    "names": lambda n: {"target_modules": [n.attention, n.inner]},
    "endings": lambda n: {
        "target_modules": [f"{n.parts[0]}.{n.attention}", f"1.{n.parts[1]}.{n.inner}"]
    },
    "expression": lambda n: {"target_modules": rf".*\.{n.blocks}\.[01]\..*\.({n.attention}|{n.inner})"},
    "all-linear": lambda n: {"target_modules": "all-linear"},
    "excluded": lambda n: {
        "target_modules": [n.attention, n.inner],
        "exclude_modules": [f"0.{n.parts[0]}.{n.attention}"],
    },
    "excluded-expression": lambda n: {
        "target_modules": "all-linear", "exclude_modules": rf".*\.1\..*|.*\.{n.inner}",
    },
    "one-block": lambda n: {"target_modules": [n.attention, n.inner], "layers_to_transform": [1]},
    "a-number": lambda n: {"target_modules": [n.attention, n.inner], "layers_to_transform": 0},
    "pattern": lambda n: {
        "target_modules": [n.attention, n.inner], "layers_to_transform": [0], "layers_pattern": n.blocks,
    },
    "patterns": lambda n: {
        "target_modules": [n.inner], "layers_to_transform": [1, 7], "layers_pattern": ["no", n.blocks],
    },
    "saved": lambda n: {"target_modules": [n.attention], "modules_to_save": [n.norm]},
    "saved-head": lambda n: {"target_modules": [n.inner], "modules_to_save": [n.head]},
    "saved-embedding": lambda n: {"target_modules": [n.inner], "modules_to_save": [n.embedding]},
    "embedding": lambda n: {"target_modules": [n.embedding, n.attention]},
    "embedding-and-head": lambda n: {"target_modules": [n.embedding, n.head]},
}  # fmt: skip
"""Where an adapter goes."""

METHODS: dict[str, tuple[str, Callable[[Names], dict[str, Any]]]] = {
    "lora": ("LoraConfig", lambda n: {"r": 4, "lora_alpha": 8}),
    "lora-rs": ("LoraConfig", lambda n: {"r": 5, "lora_alpha": 3, "use_rslora": True}),
    # PEFT's files sort the patterns by their text: of two that fit a layer, the first by that must be meant.
    "lora-ranks": ("LoraConfig", lambda n: {"r": 4, "rank_pattern": {rf".*{n.attention}": 2, "[a-z_]*": 3}}),
    "lora-alphas": ("LoraConfig", lambda n: {"r": 3, "alpha_pattern": {rf".*1\..*{n.inner}": 9, n.inner: 1}}),
    "lora-patterns": (
        "LoraConfig",
        lambda n: {
            "r": 6, "lora_alpha": 5, "use_rslora": True, "lora_dropout": 0.3,
            "rank_pattern": {rf"{n.parts[1]}\.{n.inner}": 9, f"^{n.attention}": 1},
            "alpha_pattern": {f"{n.parts[0]}.{n.attention}": 11},
        },
    ),
    "lora-gaussian": ("LoraConfig", lambda n: {"r": 4, "init_lora_weights": "gaussian"}),
    "lora-orthogonal": ("LoraConfig", lambda n: {"r": 4, "init_lora_weights": "orthogonal"}),
    "lora-random": ("LoraConfig", lambda n: {"r": 4, "init_lora_weights": False, "fan_in_fan_out": True}),
    "dora": ("LoraConfig", lambda n: {"r": 4, "lora_alpha": 8, "use_dora": True}),
    "dora-patterns": (
        "LoraConfig",
        lambda n: {
            "r": 4, "lora_alpha": 3, "use_dora": True, "use_rslora": True, "lora_dropout": 0.2,
            "rank_pattern": {n.inner: 7}, "alpha_pattern": {n.attention: 2},
        },
    ),
    "loha": ("LoHaConfig", lambda n: {"r": 3, "alpha": 5}),
    "loha-patterns": (
        "LoHaConfig",
        lambda n: {"r": 3, "rank_pattern": {n.attention: 2}, "alpha_pattern": {rf".*{n.inner}": 4}},
    ),
    "lokr": ("LoKrConfig", lambda n: {"r": 2, "alpha": 5}),
    "lokr-both": ("LoKrConfig", lambda n: {"r": 1, "decompose_both": True, "decompose_factor": 4}),
    "lokr-factor": (
        "LoKrConfig",
        lambda n: {"r": 16, "decompose_factor": 8, "rank_pattern": {n.inner: 2}, "init_weights": "lycoris"},
    ),
    "oft": ("OFTConfig", lambda n: {"oft_block_size": 8, "use_cayley_neumann": False}),
    "oft-small": ("OFTConfig", lambda n: {"oft_block_size": 4, "use_cayley_neumann": False}),
    "oft-series": ("OFTConfig", lambda n: {"oft_block_size": 8}),
    "oft-terms": ("OFTConfig", lambda n: {"oft_block_size": 16, "num_cayley_neumann_terms": 8}),
    "vera": ("VeraConfig", lambda n: {"r": 12, "projection_prng_key": 5, "vera_dropout": 0.1}),
    "vera-drawn": (
        "VeraConfig",
        lambda n: {"r": 8, "save_projection": False, "projection_prng_key": 9, "d_initial": 0.4},
    ),
    "ia3": ("IA3Config", lambda n: {"feedforward_modules": []}),
    "ia3-inner": ("IA3Config", lambda n: {"feedforward_modules": [n.inner]}),
    "ia3-expression": ("IA3Config", lambda n: {"feedforward_modules": rf".*\.{n.inner}"}),
}  # fmt: skip
"""What is put there."""


@dataclass(frozen=True)
class Row:
    """One combination of options."""

    family: str
    kind: str
    """Name of PEFT's class of settings."""
    options: dict[str, Any]
    edit: Callable[[Path], None] | None = None
    """What another tool, or another version, would have written differently."""


def fits(method: str, place: str, family: str) -> bool:
    """Whether PEFT has the combination."""
    name, chosen = method.partition("-")[0], PLACES[place](NAMES["llama"])
    known = {item.name for item in dataclasses.fields(getattr(peft, METHODS[method][0]))}
    if "embedding" in place and place != "saved-embedding" and name not in ("lora", "dora"):
        return False
    if method == "lora-orthogonal" and place.startswith("embedding"):
        return False
    if family == "gpt2" and name in ("loha", "lokr", "oft"):
        return False
    targets = chosen["target_modules"]
    return chosen.keys() <= known and (
        method != "ia3-inner" or isinstance(targets, str) or NAMES["llama"].inner in targets
    )


def made_row(family: str, method: str, place: str, **more: Any) -> Row:
    kind, options = METHODS[method]
    return Row(family, kind, {**options(NAMES[family]), **PLACES[place](NAMES[family]), **more})


def product() -> Iterator[tuple[str, Row]]:
    """In one family every method at every place, variants at some; elsewhere half of them, each at one."""
    for number, family in enumerate(NAMES):
        for step, method in enumerate(METHODS):
            places = [place for place in PLACES if fits(method, place, family)]
            if family != "llama":
                places = places[(3 * number + step) % max(len(places), 1) :][: (number + step) % 2]
            elif "-" in method:
                places = places[step % 3 :: 3]
            for place in places:
                yield f"{family}-{method}-{place}", made_row(family, method, place)


def edited(**changes: Any) -> Callable[[Path], None]:
    """Change options of an adapter_config.json; those that become `...` are taken out."""

    def edit(directory: Path) -> None:
        path = directory / "adapter_config.json"
        made = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in made.items() if value is not ...}))

    return edit


def only(*kept: str, **added: Any) -> Callable[[Path], None]:
    """Leave of an adapter_config.json what PEFT wrote when it was young."""

    def edit(directory: Path) -> None:
        path = directory / "adapter_config.json"
        raw = json.loads(path.read_text())
        path.write_text(json.dumps({**{key: raw[key] for key in kept}, **added}))

    return edit


def in_dtype(dtype: torch.dtype) -> Callable[[Path], None]:
    """Store the tensors in another dtype."""

    def edit(directory: Path) -> None:
        path = directory / "adapter_model.safetensors"
        save_file({key: value.to(dtype) for key, value in load_file(path).items()}, path, {"format": "pt"})

    return edit


FIRST_FIELDS = ("base_model_name_or_path", "peft_type", "r", "target_modules", "task_type")
"""Of PEFT 0.2, but for those of one method."""


def specials() -> Iterator[tuple[str, Row]]:
    """Combinations with more than a method and a place to them."""
    for family in ("llama", "qwen2", "gpt2"):
        lora = {"r": 4, "lora_alpha": 8}
        yield f"{family}-lora-default", Row(family, "LoraConfig", lora)
        yield f"{family}-ia3-default", Row(family, "IA3Config", {})
        yield f"{family}-vera-default", Row(family, "VeraConfig", {"r": 8})
        for flag in (False, True):
            more = {"fan_in_fan_out": flag}
            yield f"{family}-lora-fan-in-{flag}", made_row(family, "lora", "all-linear", **more)
            yield f"{family}-dora-fan-in-{flag}", made_row(family, "dora", "names", **more)
            yield f"{family}-ia3-fan-in-{flag}", made_row(family, "ia3-inner", "names", **more)
            yield f"{family}-vera-fan-in-{flag}", made_row(family, "vera", "names", **more)
    for family in ("qwen2", "gemma3_text", "gpt2"):  # embedding and head are tied
        for method in ("lora-rs", "dora"):
            for place in ("embedding", "embedding-and-head", "saved-head", "saved-embedding"):
                yield f"tied-{family}-{method}-{place}", made_row(family, method, place)
    for method in ("lora", "dora", "loha", "lokr", "oft", "vera", "ia3-inner"):
        base = made_row("llama", method, "names")
        kept = {"r"} & base.options.keys()
        own = [key for key in base.options if key not in ("r", "target_modules")]
        fields = [name for name in FIRST_FIELDS if name != "r"]
        edits = {
            "half": in_dtype(torch.float16),
            "bfloat16": in_dtype(torch.bfloat16),
            "no-names": edited(base_model_name_or_path=None, revision=None, task_type=None, peft_version=...),
            "revision": edited(revision="0123456789abcdef"),
            "other-base": edited(base_model_name_or_path="org/other", inference_mode=False),
            "young": only(*fields, *kept, *own),
            "younger": only(
                *fields, *kept, *own, merge_weights=False, enable_lora=None, modules_to_save=None
            ),
            "newer": edited(an_option_to_come=None, another={}),
        }
        for name, edit in edits.items():
            yield f"llama-{method}-{name}", dataclasses.replace(base, edit=edit)
    for terms in (3, 4, 6):
        more = {"num_cayley_neumann_terms": terms}
        yield f"llama-oft-{terms}-terms", made_row("llama", "oft-series", "all-linear", **more)
    for family in SIZES:
        for name, stacks in {
            "both": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "one": ["experts.down_proj"],
            "bare": ["gate_up_proj"],
        }.items():
            for how, more in {
                "alone": {"target_modules": []},
                "beside": {"target_modules": ["q_proj", "o_proj"], "lora_alpha": 7},
                "patterns": {
                    "target_modules": ["v_proj"],
                    "rank_pattern": {f".*{stacks[0].rpartition('.')[2]}": 2},
                    "alpha_pattern": {f".*{stacks[0].rpartition('.')[2]}": 3},
                },
                "one-block": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
                "layers": {
                    "target_modules": ["v_proj"],
                    "rank_pattern": {f"layers.1.mlp.experts.{stacks[-1].rpartition('.')[2]}": 2},
                    "alpha_pattern": {f"layers.1.mlp.experts.{stacks[0].rpartition('.')[2]}": 5},
                    "use_rslora": True,
                },
            }.items():
                options = {"r": 3, "target_parameters": stacks, **more}
                yield f"{family}-stacks-{name}-{how}", Row(family, "LoraConfig", options)


ROWS: dict[str, Row] = {**dict(product()), **dict(specials())}


class Bases:
    """The base of every family on both sides, loaded once."""

    def __init__(self, directory: Callable[..., Path]) -> None:
        self.directory = directory
        self.known: dict[str, tuple[Any, Any]] = {}

    def __call__(self, family: str) -> tuple[Any, Any]:
        """A copy of the base for PEFT, and the model of `graft.load`, without adapters."""
        if family not in self.known:
            from transformers import AutoModelForCausalLM

            path = self.directory(family, **SIZES.get(family, {}))
            theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            self.known[family] = theirs, models.load(path).model
        theirs, ours = self.known[family]
        for name in list(adapters_of(ours)):
            detach(ours, name)
        return copy.deepcopy(theirs), ours


@pytest.fixture(scope="module")
def bases(tiny_dir: Callable[..., Path]) -> Bases:
    return Bases(tiny_dir)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
        return found


def shake(tensors: Any, scale: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for tensor in tensors:
            tensor.add_(scale * torch.randn(tensor.shape, generator=generator))


def written_by_peft(base: Any, row: Row, out: Path) -> Tensor:
    """An adapter directory, and the logits that PEFT gets with it."""
    config = getattr(peft, row.kind)(task_type="CAUSAL_LM", **row.options)
    theirs = peft.get_peft_model(base, config).eval()
    shake(tensor for tensor in theirs.parameters() if tensor.requires_grad)
    theirs.save_pretrained(out)
    return logits(theirs)


@pytest.mark.parametrize("name", ROWS)
def test_both_ways(bases: Bases, name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    base, ours = bases(row.family)
    plain = logits(ours)
    expected = written_by_peft(base, row, tmp_path / "theirs")
    if row.edit is not None:
        row.edit(tmp_path / "theirs")
        expected = logits(peft.PeftModel.from_pretrained(bases(row.family)[0], tmp_path / "theirs").eval())
    load_adapter(ours, tmp_path / "theirs")
    live = logits(ours)
    assert (live - plain).abs().max() > 1e-3, "the adapter has no effect"
    torch.testing.assert_close(live, expected, atol=TOLERANCE, rtol=TOLERANCE)
    save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(bases(row.family)[0], tmp_path / "ours").eval()
    torch.testing.assert_close(logits(again), live, atol=TOLERANCE, rtol=TOLERANCE)


def test_the_matrix_is_large(record_property: Callable[[str, object], None]) -> None:
    record_property("combinations", len(ROWS))
    assert len(ROWS) >= 200
    assert {row.family for row in ROWS.values()} == NAMES.keys() | SIZES.keys()
    assert {row.kind for row in ROWS.values()} == {kind for kind, _ in METHODS.values()}
