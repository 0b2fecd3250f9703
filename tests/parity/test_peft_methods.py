"""Methods besides LoRA: PEFT loads our files and we load PEFT's, with the same logits and gradients."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import graft.models.load as models
from graft.adapters.adalora import AdaLoraConfig
from graft.adapters.attach import adapter_tensors, attach, disabled
from graft.adapters.attached import fixed_tensors, trained_tensors
from graft.adapters.dora import DoraConfig
from graft.adapters.ia3 import Ia3Config
from graft.adapters.loha import LohaConfig
from graft.adapters.lokr import LokrConfig
from graft.adapters.lora import LoraConfig
from graft.adapters.lora_fa import LoraFaConfig
from graft.adapters.oft import OftConfig
from graft.adapters.peft_format import load_adapter, save_adapter
from graft.adapters.steering import steering_of
from graft.adapters.trainable_tokens import TrainableTokensConfig
from graft.adapters.vera import VeraConfig
from graft.errors import AdapterError

pytestmark = [
    # PEFT warns when it corrects fan_in_fan_out, saves embeddings that are targeted, or drops a projection.
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

TOLERANCE = 1e-5
"""fp32 logits of order one; the two sides sum in another order."""

IDS = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(3))
TOKENS = tuple(sorted({*IDS[0].tolist(), 5, 200}, reverse=True))
"""The tokens of one text and two more, not in order."""

FAMILIES = ("llama", "qwen2", "gpt2", "gemma3_text")
"""Plain linears; with biases and a tied head; Conv1D; a scaled embedding."""

LINEARS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "qwen2": ["q_proj", "k_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "gemma3_text": ["o_proj", "up_proj"],
}


def embedding(family: str) -> str:
    return "wte" if family == "gpt2" else "embed_tokens"


def peft_config(kind: str, **settings: Any) -> Any:
    import peft

    return getattr(peft, kind)(task_type="CAUSAL_LM", **settings)


class Case:
    """A method on both sides.

    Args:
        ours: Our settings for a family.
        kind: Name of PEFT's class of settings.
        theirs: Its settings for a family.
        families: Where both sides have it.
    """

    def __init__(
        self,
        ours: Callable[[str], Any],
        kind: str,
        theirs: Callable[[str], dict[str, Any]],
        families: tuple[str, ...] = FAMILIES,
    ) -> None:
        self.ours, self.kind, self.theirs, self.families = ours, kind, theirs, families


CASES: dict[str, Case] = {
    "dora": Case(
        lambda family: DoraConfig(rank=4, alpha=12, target_modules=tuple(LINEARS[family])),
        "LoraConfig",
        lambda family: {"r": 4, "lora_alpha": 12, "use_dora": True, "target_modules": LINEARS[family]},
    ),
    "dora-all-linear": Case(
        lambda family: DoraConfig(rank=3, alpha=4, use_rslora=True, rank_pattern=(".*proj=2", "c_.*=2")[:1]),
        "LoraConfig",
        lambda family: {
            "r": 3, "lora_alpha": 4, "use_rslora": True, "use_dora": True, "target_modules": "all-linear",
            "rank_pattern": {".*proj": 2},
        },
        ("llama",),
    ),
    "dora-embedding": Case(
        lambda family: DoraConfig(rank=4, target_modules=(embedding(family), "lm_head")),
        "LoraConfig",
        lambda family: {"r": 4, "use_dora": True, "target_modules": [embedding(family), "lm_head"]},
        ("llama", "gemma3_text"),
    ),
    "lora-bias-of-targets": Case(
        lambda family: LoraConfig(rank=4, alpha=12, bias="lora_only", target_modules=tuple(LINEARS[family])),
        "LoraConfig",
        lambda family: {"r": 4, "lora_alpha": 12, "bias": "lora_only", "target_modules": LINEARS[family]},
        ("qwen2", "gpt2"),
    ),
    "lora-bias-of-all": Case(
        lambda family: LoraConfig(rank=4, alpha=12, bias="all", target_modules=tuple(LINEARS[family])),
        "LoraConfig",
        lambda family: {"r": 4, "lora_alpha": 12, "bias": "all", "target_modules": LINEARS[family]},
        ("qwen2", "gpt2"),
    ),
    "lora-bias-of-b": Case(
        lambda family: LoraConfig(rank=4, alpha=12, lora_bias=True, target_modules=tuple(LINEARS[family])),
        "LoraConfig",
        lambda family: {"r": 4, "lora_alpha": 12, "lora_bias": True, "target_modules": LINEARS[family]},
    ),
    "lora_fa": Case(
        lambda family: LoraFaConfig(rank=4, alpha=12, target_modules=tuple(LINEARS[family])),
        "LoraConfig",
        lambda family: {"r": 4, "lora_alpha": 12, "target_modules": LINEARS[family]},
    ),
    "vera": Case(
        lambda family: VeraConfig(rank=16, target_modules=tuple(LINEARS[family]), projection_seed=5),
        "VeraConfig",
        lambda family: {"r": 16, "target_modules": LINEARS[family], "projection_prng_key": 5},
    ),
    "ia3": Case(
        lambda family: Ia3Config(
            target_modules=tuple(LINEARS[family]), feedforward_modules=(LINEARS[family][-1],)
        ),
        "IA3Config",
        lambda family: {"target_modules": LINEARS[family], "feedforward_modules": [LINEARS[family][-1]]},
    ),
    "ia3-some-blocks": Case(
        lambda family: Ia3Config(
            target_modules=("q_proj", "down_proj"),
            feedforward_modules=("layers.0.mlp.down_proj",),
            exclude_modules=("layers.0.self_attn.q_proj",),
        ),
        "IA3Config",
        lambda family: {
            "target_modules": ["layers.1.self_attn.q_proj", "layers.0.mlp.down_proj", "1.mlp.down_proj"],
            "feedforward_modules": ["layers.0.mlp.down_proj"],
        },
        ("llama",),
    ),
    "loha": Case(
        lambda family: LohaConfig(rank=3, alpha=5, target_modules=tuple(LINEARS[family])),
        "LoHaConfig",
        lambda family: {"r": 3, "alpha": 5, "target_modules": LINEARS[family]},
        ("llama", "qwen2"),
    ),
    "loha-large": Case(
        lambda family: LohaConfig(rank=12, alpha=5, target_modules=tuple(LINEARS[family])),
        "LoHaConfig",
        lambda family: {"r": 12, "alpha": 5, "target_modules": LINEARS[family]},
        ("llama",),
    ),
    "lokr": Case(
        lambda family: LokrConfig(rank=2, alpha=5, target_modules=tuple(LINEARS[family])),
        "LoKrConfig",
        lambda family: {"r": 2, "alpha": 5, "target_modules": LINEARS[family]},
        ("llama", "qwen2"),
    ),
    "lokr-both": Case(
        lambda family: LokrConfig(
            rank=1, decompose_both=True, decompose_factor=4, target_modules=tuple(LINEARS[family])
        ),
        "LoKrConfig",
        lambda family: {
            "r": 1, "decompose_both": True, "decompose_factor": 4, "target_modules": LINEARS[family],
        },
        ("llama",),
    ),
    "lokr-dense": Case(
        lambda family: LokrConfig(rank=16, decompose_factor=8, target_modules=tuple(LINEARS[family])),
        "LoKrConfig",
        lambda family: {"r": 16, "decompose_factor": 8, "target_modules": LINEARS[family]},
        ("llama",),
    ),
    "oft": Case(
        lambda family: OftConfig(block_size=8, target_modules=tuple(LINEARS[family])),
        "OFTConfig",
        lambda family: {
            "oft_block_size": 8, "use_cayley_neumann": False, "target_modules": LINEARS[family],
        },
        ("llama", "qwen2", "gemma3_text"),
    ),
    "trainable_tokens": Case(
        lambda family: TrainableTokensConfig(token_indices=TOKENS),
        "TrainableTokensConfig",
        lambda family: {"token_indices": list(TOKENS)},
    ),
    "lora-and-tokens": Case(
        lambda family: LoraConfig(
            rank=4, alpha=12, trainable_token_indices=TOKENS, target_modules=tuple(LINEARS[family])
        ),
        "LoraConfig",
        lambda family: {
            "r": 4, "lora_alpha": 12, "trainable_token_indices": list(TOKENS),
            "target_modules": LINEARS[family],
        },
    ),
    "adalora": Case(
        lambda family: AdaLoraConfig(rank=5, target_rank=3, alpha=7, target_modules=tuple(LINEARS[family])),
        "AdaLoraConfig",
        lambda family: {
            "init_r": 5, "target_r": 3, "lora_alpha": 7, "total_step": 10, "target_modules": LINEARS[family],
        },
    ),
}  # fmt: skip

PLACES = [(name, family) for name, case in CASES.items() for family in case.families]
places = pytest.mark.parametrize(("name", "family"), PLACES)


def plain(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def shake(tensors: Any, scale: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for tensor in tensors:
            tensor.add_(scale * torch.randn(tensor.shape, generator=generator))


def theirs_over(directory: Path, adapter: Path, **how: Any) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(plain(directory), adapter, **how).eval()


@places
def test_peft_loads_ours(tiny_dir: Callable[..., Path], name: str, family: str, tmp_path: Path) -> None:
    directory = tiny_dir(family)
    base = models.load(directory)
    attach(base.model, CASES[name].ours(family))
    shake(trained_tensors(base.model).values())
    save_adapter(base.model, tmp_path / "a")
    live = logits(base.model)
    with disabled(base.model):
        assert (logits(base.model) - live).abs().max() > 1e-2, "the adapter has no effect"
    other = logits(theirs_over(directory, tmp_path / "a"))
    torch.testing.assert_close(live, other, atol=TOLERANCE, rtol=TOLERANCE)


@places
def test_we_load_peft(tiny_dir: Callable[..., Path], name: str, family: str, tmp_path: Path) -> None:
    from peft import get_peft_model

    directory, case = tiny_dir(family), CASES[name]
    theirs = get_peft_model(plain(directory), peft_config(case.kind, **case.theirs(family))).eval()
    shake(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path / "a")
    base = models.load(directory)
    before = logits(base.model)
    adapter = load_adapter(base.model, tmp_path / "a")
    live = logits(base.model)
    assert (before - live).abs().max() > 1e-2, "the adapter has no effect"
    torch.testing.assert_close(live, logits(theirs), atol=TOLERANCE, rtol=TOLERANCE)
    # A file of LoRA-FA that PEFT wrote is one of LoRA: only graft.json says what is frozen.
    assert adapter.config.method == case.ours(family).method.replace("lora_fa", "lora")
    # Written again by us, the file holds the same tensors.
    save_adapter(base.model, tmp_path / "b")
    one, other = (load_file(tmp_path / which / "adapter_model.safetensors") for which in "ab")
    assert other.keys() <= one.keys()  # PEFT adds the weights of embeddings that are targeted
    assert all("embed" in key or "lm_head" in key for key in one.keys() - other.keys())  # and tied rows twice
    assert all(torch.equal(one[key], other[key]) for key in other)


@places
def test_gradients_are_those_of_peft(
    tiny_dir: Callable[..., Path], name: str, family: str, tmp_path: Path
) -> None:
    directory = tiny_dir(family)
    base = models.load(directory)
    attach(base.model, CASES[name].ours(family))
    shake(trained_tensors(base.model).values())
    save_adapter(base.model, tmp_path / "a")
    theirs = theirs_over(directory, tmp_path / "a", is_trainable=True)
    steering = steering_of(base.model, 10)
    added = None if steering is None else steering.regularization()  # theirs is in the loss
    for model, more in ((base.model, added), (theirs, None)):
        loss = model(IDS, labels=IDS).loss
        (loss if more is None else loss + more).backward()
    other = {
        key.replace(".default.weight", "" if "lora_magnitude" in key else ".weight").replace(
            ".default", ""
        ): p
        for key, p in theirs.named_parameters()
        if p.grad is not None
    }
    mine = trained_tensors(base.model)
    assert {f"base_model.model.{key}" for key in mine} <= set(other)
    for key, tensor in mine.items():
        grad = other[f"base_model.model.{key}"].grad
        torch.testing.assert_close(tensor.grad, grad, atol=2e-6, rtol=2e-4, msg=lambda m, k=key: f"{k}: {m}")
    extra = other.keys() - {f"base_model.model.{key}" for key in mine}
    assert extra <= {f"base_model.model.{key}" for key in fixed_tensors(base.model)}


def written(directory: Path, config: Any, out: Path, **changes: Any) -> Path:
    """An adapter as another tool would have written it, with some options changed."""
    base = models.load(directory)
    attach(base.model, config)
    shake(adapter_tensors(base.model).values())
    save_adapter(base.model, out)
    path = out / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    (out / "graft.json").unlink()
    return out


REFUSED = [
    ("dora", "target_parameters", ["experts.gate_up_proj"]),
    ("dora", "lora_bias", True),
    ("dora", "bias", "all"),
    ("dora", "init_lora_weights", "pissa"),
    ("vera", "bias", "vera_only"),
    ("oft", "coft", True),
    ("oft", "block_share", True),
    ("oft", "r", 4),
]


@pytest.mark.parametrize(("name", "option", "value"), REFUSED)
def test_options_that_we_do_not_compute_are_refused_by_name(
    tiny_dir: Callable[..., Path], name: str, option: str, value: Any, tmp_path: Path
) -> None:
    directory = tiny_dir("llama")
    out = written(directory, CASES[name].ours("llama"), tmp_path / "a", **{option: value})
    with pytest.raises(AdapterError, match=option) as caught:
        load_adapter(models.load(directory).model, out)
    assert option in caught.value.where


def test_a_projection_that_is_not_in_the_file_is_drawn_as_peft_draws_it(
    tiny_dir: Callable[..., Path], tmp_path: Path
) -> None:
    from peft import VeraConfig as Theirs
    from peft import get_peft_model

    directory = tiny_dir("llama")
    how = {"r": 24, "projection_prng_key": 11, "save_projection": False, "target_modules": "all-linear"}
    theirs = get_peft_model(plain(directory), Theirs(task_type="CAUSAL_LM", **how)).eval()
    shake(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path / "a")
    assert not any("vera_A" in key for key in load_file(tmp_path / "a" / "adapter_model.safetensors"))
    base = models.load(directory)
    load_adapter(base.model, tmp_path / "a")
    fixed = fixed_tensors(base.model)
    assert torch.equal(fixed["vera_A"], theirs.base_model.vera_A["default"])
    assert torch.equal(fixed["vera_B"], theirs.base_model.vera_B["default"])
    torch.testing.assert_close(logits(base.model), logits(theirs), atol=TOLERANCE, rtol=TOLERANCE)


def test_a_projection_in_the_file_wins_over_the_seed(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    directory = tiny_dir("llama")
    base = models.load(directory)
    attach(base.model, CASES["vera"].ours("llama"))
    with torch.no_grad():
        for tensor in fixed_tensors(base.model).values():
            tensor.mul_(-1.5)
    shake(trained_tensors(base.model).values())
    save_adapter(base.model, tmp_path / "a")
    again = models.load(directory)
    load_adapter(again.model, tmp_path / "a")
    assert torch.equal(logits(again.model), logits(base.model))
    other = logits(theirs_over(directory, tmp_path / "a"))
    torch.testing.assert_close(logits(base.model), other, atol=TOLERANCE, rtol=TOLERANCE)
