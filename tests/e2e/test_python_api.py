"""The library as a program uses it: the README's lines, a plain loop, HF Trainer, several adapters."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import graft
from graft.errors import GraftError

ROOT = Path(__file__).resolve().parents[2]
WORDS = ("red", "green", "blue", "black")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "train.jsonl"
    lines = [{"prompt": f"say {word}: ", "completion": word} for word in WORDS * 4]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def quantized(directory: Path, seed: int = 0) -> Any:
    """A base in NF4 with an adapter of rank 8."""
    base = graft.load(str(directory), quantization="nf4")
    graft.attach(base.model, graft.LoraConfig(rank=8, alpha=16), seed=seed)
    return base


def batch(tokenizer: Any) -> dict[str, torch.Tensor]:
    """The words as one padded batch with labels, as a user's own collator makes it."""
    ids = [tokenizer(f"say {word}: {word}")["input_ids"] for word in WORDS]
    width = max(map(len, ids))
    padded = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
    return {"input_ids": padded, "attention_mask": mask, "labels": padded.masked_fill(mask == 0, -100)}


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=inputs["input_ids"]).logits
    return found


def frozen(model: Any) -> dict[str, torch.Tensor]:
    """Copies of everything that training must leave alone."""
    kept = {name: tensor for name, tensor in model.state_dict().items() if "lora_" not in name}
    return {name: tensor.clone() for name, tensor in kept.items()}


def assert_only_the_adapter_moved(model: Any, before: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(tensor, before[name]) for name, tensor in frozen(model).items())
    for name, tensor in model.named_parameters():
        if "lora_B" in name:
            assert tensor.abs().max() > 0, name


def test_the_readme_snippet_does_what_it_shows(
    tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert '"builtin"' in code
    assert "max_steps=100" in code
    code = code.replace('"builtin"', repr(str(tiny_dir("llama")))).replace("max_steps=100", "max_steps=3")
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_bytes(rows.read_bytes())
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["run"].metrics["steps"] == 3
    assert names["run"].adapter == Path("runs/first/adapter")
    merged = graft.load("merged/")
    inputs = batch(merged.tokenizer)
    live = graft.load(str(tiny_dir("llama")), quantization="nf4")
    graft.load_adapter(live.model, "runs/first/adapter")
    torch.testing.assert_close(logits(merged.model, inputs), logits(live.model, inputs), atol=1e-4, rtol=0)


def test_a_plain_loop_trains_an_attached_quantized_model(tiny_dir: Callable[..., Path]) -> None:
    base = quantized(tiny_dir("llama"))
    inputs, before = batch(base.tokenizer), frozen(base.model)
    optimizer = torch.optim.AdamW([p for p in base.model.parameters() if p.requires_grad], lr=1e-2)
    base.model.train()
    losses = []
    for _ in range(15):
        loss = base.model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert_only_the_adapter_moved(base.model, before)


def test_hf_trainer_trains_an_attached_quantized_model(
    tiny_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("accelerate", reason="HF Trainer needs the package accelerate")
    from transformers import Trainer, TrainingArguments

    base = quantized(tiny_dir("llama"))
    columns, before = batch(base.tokenizer), frozen(base.model)
    start = base.model(**columns).loss.item()
    samples = [{name: value[i] for name, value in columns.items()} for i in range(len(WORDS))]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=15, learning_rate=1e-2, lr_scheduler_type="constant",
        per_device_train_batch_size=4, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    Trainer(model=base.model, args=arguments, train_dataset=samples).train()
    base.model.eval()
    assert base.model(**columns).loss.item() < 0.8 * start
    assert_only_the_adapter_moved(base.model, before)


def test_what_a_users_own_loop_trained_is_saved_and_loaded(
    tiny_dir: Callable[..., Path], tmp_path: Path
) -> None:
    base = quantized(tiny_dir("qwen2"))
    with torch.no_grad():
        for parameter in base.model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    graft.save_adapter(base.model, tmp_path / "own")
    again = graft.load(str(tiny_dir("qwen2")), quantization="nf4")
    graft.load_adapter(again.model, tmp_path / "own")
    inputs = batch(base.tokenizer)
    assert torch.equal(logits(again.model, inputs), logits(base.model, inputs))


def test_two_adapters_on_one_base_switch_add_up_and_step_aside(
    tiny_dir: Callable[..., Path], tmp_path: Path
) -> None:
    for seed, name in enumerate(("first", "second")):
        base = quantized(tiny_dir("llama"), seed)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in base.model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.1)
        graft.save_adapter(base.model, tmp_path / name)
    base = graft.load(str(tiny_dir("llama")), quantization="nf4")
    model, inputs = base.model, batch(base.tokenizer)
    plain = logits(model, inputs)
    seen = {}
    for name in ("first", "second"):
        graft.load_adapter(model, tmp_path / name, name)
        seen[name] = logits(model, inputs)
    assert list(graft.adapters_of(model)) == ["first", "second"]
    graft.set_active(model, "first")
    assert torch.equal(logits(model, inputs), seen["first"])
    graft.set_active(model, "second")
    assert torch.equal(logits(model, inputs), seen["second"])
    assert not torch.equal(seen["first"], seen["second"])
    graft.set_active(model, ["first", "second"])
    both = logits(model, inputs)
    assert not any(torch.equal(both, one) for one in (plain, *seen.values()))
    with graft.disabled(model):
        assert torch.equal(logits(model, inputs), plain)
    assert torch.equal(logits(model, inputs), both)
    graft.set_active(model, None)
    assert torch.equal(logits(model, inputs), plain)
    graft.detach(model, "first")
    graft.detach(model, "second")
    assert graft.adapters_of(model) == {}
    assert torch.equal(logits(model, inputs), plain)


def test_generation_from_python(tiny_dir: Callable[..., Path]) -> None:
    base = quantized(tiny_dir("llama"))
    config = graft.GenerationConfig(max_new_tokens=4)
    texts = graft.generate(base.model, base.tokenizer, ["say red: ", "say blue: "], config)
    assert len(texts) == 2
    assert texts == graft.generate(base.model, base.tokenizer, ["say red: ", "say blue: "], config)


def test_slips_of_the_first_minutes_are_told(
    tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    base = graft.load(str(tiny_dir("llama")), quantization="nf4")
    with pytest.raises(GraftError, match="a BaseModel is no torch module") as caught:
        graft.attach(base, graft.LoraConfig())  # type: ignore[arg-type]
    assert ".model" in caught.value.fix
    for one in ("say red: ", [5, 6, 7]):
        with pytest.raises(GraftError, match="a list of prompts belongs"):
            graft.generate(base.model, base.tokenizer, one)  # type: ignore[arg-type]
    graft.attach(base.model, graft.LoraConfig())
    graft.train(base, data=rows, output=tmp_path / "run", max_steps=1)
    fresh = graft.load(str(tiny_dir("llama")))
    with pytest.raises(GraftError) as caught:
        graft.load_adapter(fresh.model, tmp_path / "run")
    assert caught.value.fix == f"this is a run directory: give {tmp_path / 'run' / 'adapter'}"
    with pytest.raises(GraftError) as caught:
        graft.merge(tmp_path / "run", out=tmp_path / "merged")
    assert str(tmp_path / "run" / "adapter") in caught.value.fix
