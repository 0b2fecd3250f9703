"""Runs on mixed files: their record, their steps, going on exactly, and what a change of a weight is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graft.config import build, from_dict, read_assignments, read_yaml, to_dict
from graft.data.config import DataConfig
from graft.data.held import Listed
from graft.data.loader import Loader
from graft.data.samples import Sample
from graft.data.splits import prepare_splits
from graft.errors import CheckpointError, ConfigError, StopRequested
from graft.training.build import resume, run_from_config
from graft.training.config import RunConfig, TrainingConfig
from graft.training.job import num_steps
from graft.training.loop import Training


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    domain = [{"prompt": f"add {a} and {b}: ", "completion": f"{a + b}"} for a in range(2) for b in range(3)]
    general = [{"text": f"a text that is number {n} " * (1 + n % 3)} for n in range(24)]
    return write(tmp_path / "domain.jsonl", domain), write(tmp_path / "general.jsonl", general)


@pytest.fixture
def config(
    tiny_dir: Callable[..., Path], tmp_path: Path, files: tuple[Path, Path]
) -> Callable[..., RunConfig]:
    def make(name: str, *more: str) -> RunConfig:
        words = [f"model.name={tiny_dir('llama')}", f"output={tmp_path / name}", "data.mix_by=tokens"]
        words += [f"data.mix.{files[0]}=0.6", f"data.mix.{files[1]}=0.4", "adapter.rank=4"]
        words += ["data.max_length=96", "training.batch_size=2", "training.num_epochs=3"]
        return build(RunConfig, read_assignments([*words, "training.learning_rate=1e-2", *more]))

    return make


def tokens_by_file(data: Any, epoch: int) -> list[int]:
    found = [0, 0]
    for index in data.samples.drawn(epoch):
        sample = data.samples[int(index)]
        found["general" in sample.where] += len(sample.input_ids)
    return found


def test_a_mixture_in_a_file_is_read_and_written_as_it_is(tmp_path: Path) -> None:
    yaml = tmp_path / "run.yaml"
    yaml.write_text(
        "mix:\n  a/domain.jsonl: 0.7\n  general.v2.jsonl: 3\nmix_by: tokens\nmix_temperature: 2\n"
    )
    made = build(DataConfig, read_yaml(yaml))
    assert made.mix == {"a/domain.jsonl": 0.7, "general.v2.jsonl": 3}
    assert from_dict(DataConfig, to_dict(made), "run.json") == made
    yaml.write_text("mix:\n  a.jsonl:\n  b.jsonl:\n")
    assert build(DataConfig, read_yaml(yaml)).mix == {"a.jsonl": None, "b.jsonl": None}
    yaml.write_text("mix:\n  a.jsonl: much\n  b.jsonl: 1\n")
    with pytest.raises(ConfigError, match="mix"):
        build(DataConfig, read_yaml(yaml))


def test_each_file_is_read_by_its_own_format_and_the_shares_are_told(
    files: tuple[Path, Path], tiny_dir: Callable[..., Path]
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_dir("llama"))
    mix = {str(files[0]): 3.0, str(files[1]): 1.0}
    train, _ = prepare_splits(tokenizer, DataConfig(mix=mix, mix_by="tokens"))
    assert train.report.format == "prompt_completion, text"
    assert (train.report.num_rows, len(train.samples)) == (30, 30)
    total, longest = train.report.num_tokens, train.report.longest_tokens
    for epoch in range(3):
        domain, general = tokens_by_file(train, epoch)
        assert abs(domain - 0.75 * total) <= longest
        assert abs(general - 0.25 * total) <= longest
    assert f"mixture by tokens: {files[0]}: 75.00% wanted" in train.report.notes[0]
    assert f"mixture by tokens: {files[1]}: 25.00% wanted" in train.report.notes[1]
    others = [
        prepare_splits(tokenizer, DataConfig(mix=mix | {str(files[0]): weight}, mix_by="tokens"))[0].digest
        for weight in (3.0, 3.1)
    ]
    assert others[0] == train.digest != others[1]


def test_a_stopped_run_on_a_mixture_goes_on_exactly(config: Callable[..., RunConfig]) -> None:
    straight = run_from_config(config("straight"))
    real = Training._after_step

    def stop(self: Training) -> None:
        if self.position.step == 5:
            self.job.stop.received = "SIGINT"
        real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "_after_step", stop)
        with pytest.raises(StopRequested, match="after step 5 of"):
            run_from_config(config("stopped"))
    out = Path(config("stopped").output)
    resume(out)
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors"):
        assert (out / name).read_bytes() == (straight.directory / name).read_bytes()
    record = json.loads((out / "run.json").read_text())
    assert [Path(path).name for path in record["config"]["data"]["mix"]] == ["domain.jsonl", "general.jsonl"]
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert record["results"]["planned_steps"] == sum('"loss"' in line for line in lines)


def test_a_changed_file_or_weight_is_refused_on_resume(
    config: Callable[..., RunConfig], files: tuple[Path, Path]
) -> None:
    made = config("run", "training.max_steps=2")
    run_from_config(made)
    out = Path(made.output)
    with pytest.raises(CheckpointError, match="training data"):
        resume(
            out,
            settings=read_assignments([f"data.mix.{files[0]}=0.5", "training.max_steps=4"]),
            allow_changes=["training.max_steps"],
        )


def test_the_steps_of_epochs_that_differ_are_added() -> None:
    sizes = [4, 7, 10, 3]

    class Some(Listed):
        def drawn(self, epoch: int) -> Any:
            return np.arange(sizes[epoch % 4])

    samples = Some([Sample([1] * 4, [-100, 1, 1, 1])] * 10)
    loader = Loader(samples, 2, 8, packing=False)
    for epochs, expected in (
        (1, 2),
        (2, 2 + 4),
        (4, 2 + 4 + 5 + 2),
        (1.5, 2 + 2),
        (0.5, 1),
        (4e6, 13_000_000),
    ):
        assert num_steps(loader, TrainingConfig(num_epochs=epochs)) == expected
