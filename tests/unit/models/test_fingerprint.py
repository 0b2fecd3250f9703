"""Fingerprints tell bases apart, and only bases."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from graft.models.fingerprint import (
    Fingerprint,
    WeightsDigest,
    chat_template_digest,
    fingerprint_of,
    tokenizer_digest,
)
from graft.models.load import load


def digest_of(*tensors: tuple[str, torch.Tensor]) -> str:
    digest = WeightsDigest()
    for name, tensor in tensors:
        digest.update(name, tensor)
    return digest.hexdigest()


def test_order_does_not_count():
    a, b = ("a", torch.randn(3, 4)), ("b", torch.randn(5))
    assert digest_of(a, b) == digest_of(b, a)


@pytest.mark.parametrize(
    "other",
    [
        ("b", torch.arange(6.0)),
        ("a", torch.arange(6.0).reshape(2, 3)),
        ("a", torch.arange(6.0).to(torch.float64)),
        ("a", torch.arange(6.0) + torch.tensor([0, 0, 0, 0, 0, 1e-6])),
        ("a", torch.arange(6, dtype=torch.int32).view(torch.float32)),
    ],
    ids=["name", "shape", "dtype", "value", "bits"],
)
def test_everything_about_a_tensor_counts(other):
    assert digest_of(("a", torch.arange(6.0))) != digest_of(other)


def test_layout_does_not_count():
    tensor = torch.randn(4, 6)
    assert digest_of(("a", tensor.T)) == digest_of(("a", tensor.T.contiguous()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.int64])
def test_every_dtype_and_the_empty_tensor(dtype):
    assert digest_of(("a", torch.ones(3, dtype=dtype))) != digest_of(("a", torch.zeros(3, dtype=dtype)))
    assert digest_of(("a", torch.zeros((), dtype=dtype))) != digest_of(("a", torch.zeros(0, dtype=dtype)))


def test_dtype_and_quantization_of_the_load_leave_the_weights_digest(tiny_dir):
    dense = load(tiny_dir("llama"))
    half = load(tiny_dir("llama"), dtype="bfloat16")
    packed = load(tiny_dir("llama"), quantization="nf4")
    assert dense.fingerprint == half.fingerprint
    assert dense.fingerprint.differences(packed.fingerprint) == ["quantization"]
    assert fingerprint_of(packed.model) == packed.fingerprint


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "phi3"])
def test_a_model_of_another_loader_has_the_same_weights_digest(tiny_dir, family):
    theirs = AutoModelForCausalLM.from_pretrained(tiny_dir(family))
    assert fingerprint_of(theirs).weights == load(tiny_dir(family)).fingerprint.weights


def test_parts_and_their_digest():
    one = Fingerprint("a", "b", "c", "")
    two = Fingerprint("a", "x", "c", "y")
    assert one.differences(two) == ["tokenizer", "quantization"]
    assert one.differences(one) == []
    assert Fingerprint.from_dict(one.to_dict()) == one
    assert len(one.digest) == 64
    assert one.digest.startswith(one.short)
    assert len(one.short) == 12
    assert one.digest != two.digest


def test_tokenizer_digest_survives_saving_and_use(tiny_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir("llama"))
    before = tokenizer_digest(tokenizer)
    tokenizer(["a", "long text"], padding=True, truncation=True, max_length=4)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = "</s>"
    assert tokenizer_digest(tokenizer) == before
    tokenizer.save_pretrained(tmp_path / "copy")
    assert tokenizer_digest(AutoTokenizer.from_pretrained(tmp_path / "copy")) == before


@pytest.mark.parametrize("name", ["tinystories-656k", "stories260k-hf"])
def test_tokenizer_digest_of_real_tokenizers_survives_saving(shared, tmp_path, name):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / name)
    tokenizer.save_pretrained(tmp_path / "copy")
    assert tokenizer_digest(AutoTokenizer.from_pretrained(tmp_path / "copy")) == tokenizer_digest(tokenizer)


def test_a_token_more_is_another_tokenizer(tiny_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir("llama"))
    before = tokenizer_digest(tokenizer)
    tokenizer.add_tokens(["<new>"])
    assert tokenizer_digest(tokenizer) != before


def test_chat_template(tiny_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir("llama"))
    assert chat_template_digest(tokenizer) == ""
    tokenizer.chat_template = "{{ messages }}"
    assert len(chat_template_digest(tokenizer)) == 64


def test_another_chat_template_is_told_apart(tiny_dir, tmp_path):
    shutil.copytree(tiny_dir("llama"), tmp_path / "copy")
    (tmp_path / "copy" / "chat_template.jinja").write_text("{{ messages }}")
    one, two = load(tiny_dir("llama")).fingerprint, load(tmp_path / "copy").fingerprint
    assert one.differences(two) == ["chat_template"]


def test_importing_is_cheap():
    code = (
        "import sys, graft.models.fingerprint; print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
