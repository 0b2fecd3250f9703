"""What the flags of train, its config file and --set make together; who wins where they contradict."""

from __future__ import annotations

from pathlib import Path

import pytest

from graft.cli import train as verb
from graft.cli.main import run
from graft.config import Settings, build
from graft.training.config import RunConfig

SECTIONS = {
    "adapter": "adapter: {method: lora, rank: 3, dropout: 0.1}\n",
    "quantization": "quantization: {quant_type: int8, blocksize: 128, double_quant: false}\n",
}
BOTH = SECTIONS["adapter"] + SECTIONS["quantization"]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The settings that each command would start a run with."""
    found: list[Settings] = []

    class Enough(Exception):  # noqa: N818 - ends the command where the run would begin
        pass

    def start(settings: Settings, *others: object) -> None:
        found.append(settings)
        raise Enough

    monkeypatch.setattr(verb, "_start", start)
    return found


def made(started: list[Settings], path: Path, text: str, *words: str) -> tuple[RunConfig, list[str]]:
    """The configuration of `graft train FILE ...`, and what is told about it."""
    path = path / "run.yaml"
    path.write_text(f"data: {{train: x.jsonl}}\n{text}")
    run(["train", str(path), *words])
    return build(RunConfig, started[-1]), started[-1].notes


@pytest.mark.parametrize("text", ["", SECTIONS["adapter"], BOTH], ids=["neither", "adapter", "both"])
def test_full_leaves_out_the_sections_of_the_file(text: str, started: list[Settings], tmp_path: Path) -> None:
    config, notes = made(started, tmp_path, text, "--method", "full")
    assert config.adapter is None
    assert config.quantization is None
    given = [name for name in SECTIONS if SECTIONS[name] in text]
    assert len(notes) == len(given)
    for name, note in zip(given, notes, strict=True):
        assert note == f"--method full: the {name} section of {tmp_path / 'run.yaml'} is left out"


def test_lora_keeps_the_adapter_and_leaves_out_the_quantization(
    started: list[Settings], tmp_path: Path
) -> None:
    config, notes = made(started, tmp_path, BOTH, "--method", "lora")
    assert config.adapter is not None
    assert (config.adapter.rank, config.adapter.dropout) == (3, 0.1)
    assert config.quantization is None
    assert [note.split(" of ")[0] for note in notes] == ["--method lora: the quantization section"]


def test_lora_gives_an_adapter_to_a_file_without_one(started: list[Settings], tmp_path: Path) -> None:
    config, notes = made(started, tmp_path, "", "--method", "lora")
    assert config.adapter is not None
    assert notes == []


def test_qlora_keeps_what_the_file_says_about_both(started: list[Settings], tmp_path: Path) -> None:
    config, notes = made(started, tmp_path, BOTH, "--method", "qlora")
    assert config.adapter is not None
    assert config.adapter.rank == 3
    assert config.quantization is not None
    assert (config.quantization.quant_type, config.quantization.blocksize) == ("int8", 128)
    assert notes == []


def test_qlora_gives_nf4_to_a_file_without_quantization(started: list[Settings], tmp_path: Path) -> None:
    config, _ = made(started, tmp_path, SECTIONS["adapter"], "--method", "qlora")
    assert config.quantization is not None
    assert config.quantization.quant_type == "nf4"


def test_without_the_flag_the_file_decides(started: list[Settings], tmp_path: Path) -> None:
    config, _ = made(started, tmp_path, "")
    assert (config.adapter, config.quantization) == (None, None)
    config, _ = made(started, tmp_path, BOTH)
    assert config.quantization is not None
    assert config.quantization.quant_type == "int8"


def test_set_wins_over_flags_and_file(started: list[Settings], tmp_path: Path) -> None:
    words = ["--method", "qlora", "--set", "adapter.rank=5", "--set", "quantization.quant_type=fp4"]
    config, _ = made(started, tmp_path, BOTH, *words, "--data", "y.jsonl", "--set", "data.train=z.jsonl")
    assert config.adapter is not None
    assert config.quantization is not None
    assert (config.adapter.rank, config.quantization.quant_type) == (5, "fp4")
    assert config.data.train == "z.jsonl"


@pytest.mark.parametrize(
    ("method", "word", "fix"),
    [
        ("full", "adapter.rank=4", "--method lora"),
        ("full", "quantization=nf4", "--method qlora"),
        ("lora", "quantization.quant_type=nf4", "--method qlora"),
    ],
)
def test_set_of_a_section_that_the_method_is_without_is_refused(
    method: str,
    word: str,
    fix: str,
    started: list[Settings],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["train", "--data", "x.jsonl", "--method", method, "--set", word]) == 2
    told = capsys.readouterr().err
    assert f"--method {method} has no {word.partition('.')[0].partition('=')[0]}" in told
    assert fix in told
    assert started == []


def test_what_was_left_out_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(f"data: {{train: nowhere.jsonl}}\n{BOTH}")
    assert run(["train", "run.yaml", "--method", "full"]) == 2  # no such data
    told = capsys.readouterr().err
    assert "--method full: the adapter section of run.yaml is left out" in told
    assert "--method full: the quantization section of run.yaml is left out" in told
