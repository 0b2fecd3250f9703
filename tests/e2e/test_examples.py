"""The examples: every configuration builds, every command they show runs, and what a run leaves is right."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from graft.cli.main import run
from graft.config import build, read_yaml
from graft.runs import RunDirectory, read_lines
from graft.training.config import RunConfig

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIGS = sorted(EXAMPLES.glob("*.yaml"))
SHORT = {
    "train": ["--quiet", "--set", "training.max_steps=2", "--set", "training.batch_size=2"],
    "evaluate": ["--json", "--set", "data.limit=4"],
    "generate": ["--json", "--max-new-tokens", "4"],
    "merge": ["--json"],
}
PROMPT_IDS = torch.tensor([[1, 80, 563, 369, 266, 1045, 159, 797, 1906, 456, 320, 679, 56, 167]])


def commands_of(path: Path) -> list[str]:
    """The command lines that a page or a configuration shows."""
    shown = re.compile(r"(?:#\s+)?((?:graft|python examples).*)")
    return [
        found[1] for line in path.read_text(encoding="utf-8").splitlines() if (found := shown.match(line))
    ]


@pytest.fixture(scope="module")
def project(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory that looks like the project's root to the examples, as the working directory."""
    root = tmp_path_factory.mktemp("examples") / "project"
    shutil.copytree(EXAMPLES, root / "examples", ignore=shutil.ignore_patterns("data"))
    (root.parent / "shared").symlink_to(shared)
    subprocess.run([sys.executable, "examples/prepare.py"], cwd=root, check=True, capture_output=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        yield root


@pytest.fixture(scope="module")
def trained(project: Path) -> Path:
    """A short run of examples/grimm.yaml."""
    changes = ["training.max_steps=20", "training.eval_steps=10", "training.batch_size=8"]
    words = ["train", "examples/grimm.yaml", "--quiet", "--out", "runs/short"]
    assert run([*words, *(word for change in changes for word in ("--set", change))]) == 0
    return project / "runs" / "short"


@pytest.fixture(scope="module")
def live(trained: Path, tinystories: Path) -> torch.Tensor:
    """What the trained adapter computes in PEFT on the base that transformers loads."""
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(tinystories, dtype=torch.float32)
    return logits(peft.PeftModel.from_pretrained(base, trained / "adapter"))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(PROMPT_IDS).logits


def answer_of(capsys: pytest.CaptureFixture[str], words: list[str]) -> dict[str, object]:
    capsys.readouterr()
    assert run([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told.pop("ok") is True
    return told


pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"  # PEFT asks transformers for it
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_builds(path: Path) -> None:
    config = build(RunConfig, read_yaml(path))

    assert config.adapter is not None
    assert config.adapter.rank == 16
    assert config.output == f"runs/{path.stem}"


def test_there_are_configurations() -> None:
    assert {path.stem for path in CONFIGS} == {"grimm", "clinc150", "e2e"}


def test_the_commands_of_the_readme_run(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = commands_of(EXAMPLES / "README.md")
    assert len(commands) >= 10

    for command in commands:
        program, *words = shlex.split(command)
        if program == "graft":
            assert run([*words, *SHORT[words[0]]]) == 0, (command, capsys.readouterr().err)
        else:
            assert (program, words) == ("python", ["examples/prepare.py"])  # the fixture has run it


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_commands_of_a_configuration_are_those_of_the_readme(path: Path) -> None:
    commands = commands_of(path)

    assert commands[0] == f"python examples/prepare.py {path.stem}"
    assert len(commands) >= 4
    assert set(commands[1:]) <= set(commands_of(EXAMPLES / "README.md"))


def test_prepared_splits_share_no_meaning(project: Path) -> None:
    prompts = {
        split: {json.loads(line)["prompt"] for line in lines}
        for split in ("train", "dev", "test")
        for lines in [(project / "examples/data/e2e" / f"{split}.jsonl").read_text().splitlines()]
    }

    assert (len(prompts["dev"]), len(prompts["test"])) == (60, 200)
    assert not prompts["train"] & (prompts["dev"] | prompts["test"])
    assert not prompts["dev"] & prompts["test"]


def test_a_short_run_lowers_both_losses(trained: Path) -> None:
    lines = read_lines(RunDirectory(trained).metrics_path)
    losses = [line["loss"] for line in lines if "loss" in line]
    held_out = [line["eval_loss"] for line in lines if "eval_loss" in line]

    assert len(losses) == 20
    assert sum(losses[-5:]) < sum(losses[:5])
    assert held_out[-1] < held_out[0]


def test_the_adapter_in_peft_computes_what_graft_computes(
    trained: Path, live: torch.Tensor, tinystories: Path
) -> None:
    from graft.adapters.attach import disabled
    from graft.adapters.peft_format import load_adapter
    from graft.models.load import load

    model = load(str(tinystories)).model
    load_adapter(model, trained / "adapter")

    torch.testing.assert_close(logits(model), live, atol=1e-5, rtol=1e-5)
    with disabled(model):
        assert (logits(model) - live).abs().max() > 0.1


def test_evaluate_sees_the_gain(trained: Path, tinystories: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data", "examples/data/grimm/eval.jsonl", "--metrics", "loss,bits_per_character"]
    words += ["--set", "data.max_length=256"]
    before = answer_of(capsys, ["evaluate", str(tinystories), *words])["metrics"]
    after = answer_of(capsys, ["evaluate", "--adapter", str(trained), *words])["metrics"]
    recorded = [line["eval_loss"] for line in read_lines(trained / "metrics.jsonl") if "eval_loss" in line]

    assert after["loss"] < before["loss"]
    assert after["bits_per_character"] < before["bits_per_character"]
    assert after["loss"] == pytest.approx(recorded[-1], rel=1e-4)


def test_the_merged_model_is_the_live_one(
    trained: Path, live: torch.Tensor, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    certificate = answer_of(capsys, ["merge", str(trained), "--out", "merged/short"])["certificate"]
    merged = AutoModelForCausalLM.from_pretrained(project / "merged/short", dtype=torch.float32)

    assert certificate["logit_gap"] < 1e-4
    # float32 rounds in proportion: a part in 1e5 of the largest logit.
    torch.testing.assert_close(logits(merged), live, atol=1e-5 * float(live.abs().max()), rtol=1e-5)
