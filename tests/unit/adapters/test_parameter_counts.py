"""How many numbers train: every method on real architectures of 135 million to 175 billion, without memory.

The models are built on the meta device from the shapes that their makers publish. What is expected is
computed here from the same shapes; PUBLISHED are counts that stand in papers and model cards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import torch

import graft
from graft.adapters.attached import all_tensors, num_base_parameters
from graft.adapters.base import METHODS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@dataclass(frozen=True)
class Facts:
    """Shapes of a decoder of the Llama kind."""

    hidden: int
    inner: int
    blocks: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False
    kind: str = "llama"

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) of the linears of a block."""
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "q_proj": (self.hidden, self.hidden),
            "k_proj": (self.hidden, kv),
            "v_proj": (self.hidden, kv),
            "o_proj": (self.hidden, self.hidden),
            "gate_proj": (self.hidden, self.inner),
            "up_proj": (self.hidden, self.inner),
            "down_proj": (self.inner, self.hidden),
        }

    @cached_property
    def config(self) -> Any:
        from transformers import AutoConfig

        return AutoConfig.for_model(
            self.kind,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.blocks,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            tie_word_embeddings=self.tied,
        )

    def count(self, rule: Callable[[int, int], int], *names: str) -> int:
        return self.blocks * sum(rule(*self.linears[name]) for name in names or self.linears)


MODELS = {
    "SmolLM2-135M": Facts(576, 1536, 30, 9, 3, 49152, tied=True),
    "Qwen2.5-0.5B": Facts(896, 4864, 24, 14, 2, 151936, tied=True, kind="qwen2"),
    "Llama-3.2-1B": Facts(2048, 8192, 16, 32, 8, 128256, tied=True),
    "Llama-3.2-3B": Facts(3072, 8192, 28, 24, 8, 128256, tied=True),
    "Llama-2-7B": Facts(4096, 11008, 32, 32, 32, 32000),
    "Mistral-7B": Facts(4096, 14336, 32, 32, 8, 32000, kind="mistral"),
    "Llama-3-8B": Facts(4096, 14336, 32, 32, 8, 128256),
    "LLaMA-65B": Facts(8192, 22016, 80, 64, 64, 32000),
    "Llama-3-70B": Facts(8192, 28672, 80, 64, 8, 128256),
}
PUBLISHED = {  # total, linears, LoRA on q and v of rank 8, on q k v o of rank 16, on all linears of rank 16
    "SmolLM2-135M": (134_515_008, 106_168_320, 460_800, 1_843_200, 4_884_480),
    "Qwen2.5-0.5B": (494_032_768, 357_826_560, 540_672, 2_162_688, 8_798_208),
    "Llama-3.2-1B": (1_235_814_400, 973_078_528, 851_968, 3_407_872, 11_272_192),
    "Llama-3.2-3B": (3_212_749_824, 2_818_572_288, 2_293_760, 9_175_040, 24_313_856),
    "Llama-2-7B": (6_738_415_616, 6_476_005_376, 4_194_304, 16_777_216, 39_976_960),
    "Mistral-7B": (7_241_732_096, 6_979_321_856, 3_407_872, 13_631_488, 41_943_040),
    "Llama-3-8B": (8_030_261_248, 6_979_321_856, 3_407_872, 13_631_488, 41_943_040),
    "LLaMA-65B": (65_285_660_672, 64_760_053_760, 20_971_520, 83_886_080, 199_884_800),
    "Llama-3-70B": (70_553_706_496, 68_451_041_280, 16_384_000, 65_536_000, 207_093_760),
}
QV, QKVO = ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj")


def built(config: Any) -> Any:
    from transformers import AutoModel, AutoModelForCausalLM

    whole = config.model_type in ("llama", "qwen2", "mistral", "gpt2", "opt")
    with torch.device("meta"):
        return (AutoModelForCausalLM if whole else AutoModel).from_config(config)


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[str, Facts, Any]:
    facts = MODELS[request.param]
    return request.param, facts, built(facts.config)


def trained(model: Any, config: Any) -> int:
    """Numbers that train; none of them has memory."""
    adapter = graft.attach(model, config)
    devices = {tensor.device.type for tensor in all_tensors(model).values()}
    graft.detach(model)
    assert devices == {"meta"}
    return adapter.num_trainable


def test_lora_has_the_published_numbers(case: tuple[str, Facts, Any]) -> None:
    name, facts, model = case
    total, linears, qv, qkvo, whole = PUBLISHED[name]
    assert num_base_parameters(model) == total
    assert facts.count(lambda inner, outer: inner * outer) == linears
    found = (
        trained(model, graft.LoraConfig(rank=8, target_modules=QV)),
        trained(model, graft.LoraConfig(rank=16, target_modules=QKVO)),
        trained(model, graft.LoraConfig(rank=16, target_modules="all-linear")),
    )
    assert found == (qv, qkvo, whole)
    assert found == (
        facts.count(lambda inner, outer: 8 * (inner + outer), *QV),
        facts.count(lambda inner, outer: 16 * (inner + outer), *QKVO),
        facts.count(lambda inner, outer: 16 * (inner + outer)),
    )


def halves(size: int) -> tuple[int, int]:
    """The two factors of a size that are nearest to each other, the smaller one first."""
    small = next(part for part in range(int(size**0.5), 0, -1) if size % part == 0)
    return small, size // small


def lokr(rank: int) -> Callable[[int, int], int]:
    def count(inner: int, outer: int) -> int:
        (m, n), (l, k) = halves(inner), halves(outer)  # noqa: E741 - the letters of the paper
        return l * m + (rank * (k + n) if rank < max(k, n) / 2 else k * n)

    return count


RULES: dict[str, tuple[dict[str, Any], Callable[[int, int], int]]] = {
    "lora": ({"rank": 4, "use_rslora": True}, lambda inner, outer: 4 * (inner + outer)),
    "dora": ({"rank": 16}, lambda inner, outer: 16 * (inner + outer) + outer),
    "lora_fa": ({"rank": 16}, lambda inner, outer: 16 * outer),
    "vera": ({"rank": 256}, lambda inner, outer: outer + 256),
    "loha": ({"rank": 4}, lambda inner, outer: 2 * 4 * (inner + outer)),
    "lokr": ({"rank": 40}, lokr(40)),  # low-rank for large layers, whole for small ones
    "adalora": ({"rank": 12}, lambda inner, outer: 12 * (inner + outer + 1)),
    "qa_lora": ({"rank": 8, "group_size": 32}, lambda inner, outer: 8 * (inner // 32 + outer)),
    "oft": ({"block_size": 32}, lambda inner, outer: inner // 32 * (32 * 31 // 2)),
}


def test_there_is_a_rule_for_every_method() -> None:
    assert {*RULES, "ia3", "trainable_tokens"} == set(METHODS)


@pytest.mark.parametrize("method", sorted(RULES))
def test_every_method_trains_what_its_formula_says(case: tuple[str, Facts, Any], method: str) -> None:
    _, facts, model = case
    settings, rule = RULES[method]
    found = trained(model, METHODS[method].config_class(**settings, target_modules="all-linear"))
    assert found == facts.count(rule)


def test_ia3_trains_vectors_of_keys_values_and_inner_inputs(case: tuple[str, Facts, Any]) -> None:
    name, facts, model = case
    names = ("k_proj", "v_proj", "down_proj")
    found = trained(model, graft.Ia3Config(target_modules=names, feedforward_modules=("down_proj",)))
    kv = facts.linears["k_proj"][1]
    assert found == facts.blocks * (2 * kv + facts.inner)
    if name == "Llama-2-7B":
        assert found == 614_400  # PEFT's documentation of (IA)^3 has it


def test_trainable_tokens_train_their_rows(case: tuple[str, Facts, Any]) -> None:
    _, facts, model = case
    assert trained(model, graft.TrainableTokensConfig(token_indices=(5, 9, 700))) == 3 * facts.hidden


def test_dora_adds_one_magnitude_for_each_output() -> None:
    """NVlabs' and PEFT's DoRA: 1,376,256 more than LoRA on Llama-3-8B."""
    facts = MODELS["Llama-3-8B"]
    model = built(facts.config)
    assert trained(model, graft.DoraConfig(rank=16)) - trained(model, graft.LoraConfig(rank=16)) == 1_376_256


def test_gpt3_of_the_lora_paper() -> None:
    """Table 4 of arXiv:2106.09685: 4.7 M for r = 1 and 37.7 M for r = 8, on 96 blocks of width 12288."""
    from transformers import OPTConfig

    width = 12288
    model = built(
        OPTConfig(
            hidden_size=width,
            ffn_dim=4 * width,
            num_hidden_layers=96,
            num_attention_heads=96,
            word_embed_proj_dim=width,
        )
    )
    for rank, published in ((1, 4_718_592), (8, 37_748_736)):
        found = trained(model, graft.LoraConfig(rank=rank, target_modules=QV))
        assert found == published == 96 * 2 * rank * 2 * width


@pytest.mark.parametrize(
    ("hidden", "blocks", "lora", "vera_rank", "vera"),
    [(768, 12, 294_912, 1024, 43_008), (1024, 24, 786_432, 256, 61_440)],
)
def test_roberta_of_the_lora_and_vera_papers(
    hidden: int, blocks: int, lora: int, vera_rank: int, vera: int
) -> None:
    """RoBERTa base and large: 0.3 M and 0.8 M with LoRA of rank 8; 0.043 M and 0.061 M with VeRA."""
    from transformers import RobertaConfig

    model = built(
        RobertaConfig(
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=blocks,
            num_attention_heads=hidden // 64,
            vocab_size=50265,
        )
    )
    names = ("query", "value")
    assert (
        trained(model, graft.LoraConfig(rank=8, target_modules=names)) == lora == blocks * 2 * 8 * 2 * hidden
    )
    assert (
        trained(model, graft.VeraConfig(rank=vera_rank, target_modules=names))
        == vera
        == blocks * 2 * (hidden + vera_rank)
    )


def test_gpt2_medium_and_deberta() -> None:
    """GPT-2's fused linear of rank 4, and the six matrices of DeBERTaV3-base that AdaLoRA's paper adapts."""
    from transformers import DebertaV2Config, GPT2Config

    gpt2 = built(GPT2Config(n_embd=1024, n_layer=24, n_head=16))
    assert (
        trained(gpt2, graft.LoraConfig(rank=4, target_modules=("c_attn",)))
        == 393_216
        == 24 * 4 * (1024 + 3072)
    )
    deberta = built(
        DebertaV2Config(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)
    )
    names = (
        "query_proj",
        "key_proj",
        "value_proj",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    )
    found = trained(deberta, graft.LoraConfig(rank=8, target_modules=names))
    assert found == 1_327_104 == 12 * 8 * (4 * 2 * 768 + 2 * (768 + 3072))
