"""Errors of every room name the value, the place and the fix."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from graft import files
from graft.adapters.attach import attach
from graft.adapters.attached import adapter_tensors
from graft.adapters.lora import LoraConfig
from graft.adapters.merge import merge
from graft.adapters.peft_format import load_adapter, save_adapter
from graft.config import build, read_assignments, read_yaml
from graft.errors import GraftError
from graft.evaluate.generate import GenerationConfig
from graft.models.load import load
from graft.quant.config import QuantizationConfig
from graft.quant.tensor import quantize
from graft.runs import RunDirectory
from graft.training.build import resume, run_from_config
from graft.training.config import RunConfig


class Scene:
    """A tiny model, data and an adapter to make mistakes with."""

    def __init__(self, directory: Path, model: Path) -> None:
        self.directory = directory
        self.model = model

    def write(self, name: str, text: str) -> Path:
        path = self.directory / name
        path.write_text(text)
        return path

    def rows(self, *rows: object) -> Path:
        return self.write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def config(self, *words: str) -> RunConfig:
        given = [f"model.name={self.model}", f"output={self.directory / 'run'}", "adapter.rank=2", *words]
        return build(RunConfig, read_assignments(given))

    def train(self, *words: str) -> None:
        run_from_config(self.config(*words))

    def adapter(self) -> Path:
        base = load(self.model)
        attach(base.model, LoraConfig(rank=2))
        with torch.no_grad():
            for tensor in adapter_tensors(base.model).values():
                tensor.add_(0.01)  # one that changes nothing is refused
        save_adapter(base.model, self.directory / "adapter")
        return self.directory / "adapter"

    def damaged_model(self, name: str, cut: int) -> Path:
        copy = self.directory / "damaged"
        shutil.copytree(self.model, copy)
        data = (copy / name).read_bytes()
        (copy / name).write_bytes(data[:-cut])
        return copy

    def damaged_adapter(self, **changes: object) -> Path:
        adapter = self.adapter()
        config = files.read_json(adapter / "adapter_config.json")
        files.write_json(adapter / "adapter_config.json", config | changes)
        return adapter


def lora(**fields: object) -> LoraConfig:
    return LoraConfig(**fields)  # type: ignore[arg-type]


def targets(scene: Scene, **fields: object) -> None:
    attach(load(scene.model).model, lora(**fields))


CASES: dict[str, tuple[Callable[[Scene], object], str, str, str]] = {
    # name: (what is done, the value in the message, the place, a word of the fix)
    "yaml key": (
        lambda s: build(RunConfig, read_yaml(s.write("run.yaml", "training:\n  lerning_rate: 1\n"))),
        "lerning_rate",
        "run.yaml line 2",
        "learning_rate",
    ),
    "yaml type": (
        lambda s: build(RunConfig, read_yaml(s.write("run.yaml", "training:\n  batch_size: many\n"))),
        "many",
        "run.yaml line 2",
        "whole number",
    ),
    "range": (lambda s: s.config("training.batch_size=0"), "0", "training.batch_size", "at least 1"),
    "rank": (lambda s: lora(rank=0), "0", "adapter.rank", ""),
    "alpha": (lambda s: lora(alpha=float("nan")), "nan", "adapter.alpha", ""),
    "blocksize": (lambda s: QuantizationConfig(blocksize=48), "48", "blocksize", "32"),
    "quantized full": (lambda s: s.config("adapter=", "quantization=nf4"), "nf4", "quantization", "qlora"),
    "target": (lambda s: targets(s, target_modules=("q_porj",)), "q_porj", "target_modules", "q_proj"),
    "layers": (lambda s: targets(s, layers=(99,)), "99", "layers", ""),
    "model directory": (lambda s: load(str(s.model) + "x"), "x", "", ""),
    "truncated shard": (
        lambda s: load(s.damaged_model("model.safetensors", 64)),
        "model.safetensors",
        "model.safetensors",
        "",
    ),
    "nan weight": (
        lambda s: quantize(torch.tensor([[1.0, float("nan")]]), QuantizationConfig(), where="layer.weight"),
        "nan",
        "layer.weight",
        "",
    ),
    "malformed row": (
        lambda s: s.train(f"data.train={s.write('rows.jsonl', chr(123) + chr(10))}"),
        "",
        "rows.jsonl:1",
        "",
    ),
    "unknown columns": (
        lambda s: s.train(f"data.train={s.rows({'question': 'a', 'reply': 'b'})}"),
        "question",
        "rows.jsonl",
        "",
    ),
    "nothing to learn": (
        lambda s: s.train(
            f"data.train={s.rows({'prompt': 'a' * 90, 'completion': 'b'})}", "data.max_length=32"
        ),
        "none of 1 rows",
        "rows.jsonl",
        "max_length",
    ),
    "unknown role": (
        lambda s: s.train(f"data.train={s.rows({'messages': [{'role': 'usr', 'content': 'a'}]})}"),
        "usr",
        "rows.jsonl:1",
        "",
    ),
    "adapter without file": (
        lambda s: load_adapter(load(s.model).model, s.directory),
        "",
        "adapter_config.json",
        "",
    ),
    "adapter option": (
        lambda s: load_adapter(load(s.model).model, s.damaged_adapter(use_qalora=True)),
        "use_qalora",
        "adapter_config.json",
        "",
    ),
    "adapter rank": (
        lambda s: load_adapter(load(s.model).model, s.damaged_adapter(r=-1)),
        "-1",
        "adapter_config.json",
        "",
    ),
    "merge twice": (lambda s: _merge_twice(s), "", "merged", ""),
    "resume nothing": (lambda s: resume(s.directory / "none"), "not a run", "none", "run.json"),
    "resume beside a run": (lambda s: _resume_beside(s), "not a run", "none", "runs there: first"),
    "existing run": (lambda s: _existing_run(s), "", "run", "--resume"),
    "generation": (lambda s: GenerationConfig(temperature=-1.0), "-1.0", "temperature", ""),
    "json": (lambda s: files.read_json(s.write("x.json", "{")), "line 1", "x.json", "restore"),
    "path": (lambda s: files.safe_join(s.directory, "../x"), "../x", "", "damaged"),
    "disk": (lambda s: files.write_text(s.directory / "no" / "x", "1"), "bytes were needed", "x", "free"),
}


def _merge_twice(scene: Scene) -> None:
    adapter = scene.adapter()
    base = load(scene.model)
    attach(base.model, LoraConfig(rank=2))
    merge(adapter, scene.directory / "merged", base=str(scene.model))
    merge(adapter, scene.directory / "again", base=str(scene.directory / "merged"), force_base=True)


def _resume_beside(scene: Scene) -> None:
    RunDirectory.create(scene.directory / "first").write_record({})
    resume(scene.directory / "none")


def _existing_run(scene: Scene) -> None:
    run = RunDirectory.create(scene.directory / "run")
    run.write_record({})
    scene.train(f"data.train={scene.rows({'text': 'a b c'})}")


@pytest.mark.parametrize("name", CASES)
def test_every_error_names_value_place_and_fix(
    name: str, tiny_dir: Callable[..., Path], tmp_path: Path
) -> None:
    act, value, place, fix = CASES[name]
    with pytest.raises(GraftError) as caught:
        act(Scene(tmp_path, tiny_dir("llama")))
    error = caught.value
    assert value.lower() in str(error).lower()
    assert place in f"{error.where} {error.what}"
    assert fix in error.fix
    assert error.what
    assert error.where
    assert error.fix
