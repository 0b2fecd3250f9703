"""A command that is stopped answers too: exit code 3, one JSON object, and a run that can go on."""

from __future__ import annotations

import json
import os
import pkgutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from graft.cli.main import run


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """As from a terminal: a test run in the background ignores SIGINT."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}: ", "completion": f"{i}"}) + "\n" for i in range(8)))
    return path


@pytest.fixture
def words(tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path) -> list[str]:
    given = ["train", "--model", str(tiny_dir("llama")), "--data", str(rows), "--out", str(tmp_path / "run")]
    return [*given, "--set", "training.max_steps=3", "--set", "data.max_length=64", "--quiet", "--json"]


def stop_at(place: str, monkeypatch: pytest.MonkeyPatch, number: int = signal.SIGINT) -> None:
    """Send a signal where a function of the program is called."""

    def stopped(*arguments: Any, **named: Any) -> Any:
        os.kill(os.getpid(), number)
        raise AssertionError("the signal was not noticed")

    monkeypatch.setattr(place, stopped)


def one_object(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    out = capsys.readouterr().out
    assert out.count("\n") == 1, out
    told: dict[str, Any] = json.loads(out)
    return told


STAGES = {
    "graft.training.build.run_from_config": "before it was done",
    "graft.training.build.read_config": "before the first step; nothing was trained",
    "graft.training.build.prepare_data": "before the first step; nothing was trained",
    "graft.training.build.RunDirectory.create": "before it was done",
    "graft.training.phases._job": "before the next step",
    "graft.training.phases.use_best": "while the result was written",
    "graft.training.results.save_adapter": "while the result was written",
    "graft.training.results.write_run_report": "while the result was written",
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("place", STAGES)
def test_train_stopped_anywhere(
    place: str,
    number: int,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        stop_at(place, patch, number)
        assert run(words) == 3
    told = one_object(capsys)
    assert told["ok"] is False
    assert told["error"]["type"] == "StopRequested"
    assert signal.Signals(number).name in told["error"]["what"]
    assert STAGES[place] in told["error"]["what"]
    out = tmp_path / "run"
    if not (out / "run.json").exists():
        assert run(words) == 0, "nothing is in the way of starting again"
    else:
        assert told["error"]["fix"] == f"graft train --resume {out}"
        assert run(["train", "--resume", str(out), "--quiet", "--json"]) == 0
    assert one_object(capsys)["metrics"]["steps"] == 3
    assert not list(out.glob(".*")), "no part of a file is left"


DURING = {
    "graft.training.loop.token_losses": "after step 1 of 3",
    "graft.training.loop.evaluate_loss": "after step 1 of 3",
    "graft.training.checkpoint.write_state": "after step 1 of 3",
    "graft.training.checkpoint.files.remove_directory": "after step 2 of 3",
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("place", DURING)
def test_what_is_under_way_in_the_loop_is_brought_to_its_end(
    place: str,
    number: int,
    words: list[str],
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In a step, an evaluation, a save, a rotation: the state after it is saved, and the run goes on."""
    more = ["training.save_steps=1", "training.eval_steps=1", "training.keep_checkpoints=1"]
    more += ["training.lr_scheduler=constant", "training.learning_rate=1e-2"]
    words = [*words, "--eval-data", str(rows), *(word for one in more for word in ("--set", one))]
    straight = [str(tmp_path / "straight") if word == str(tmp_path / "run") else word for word in words]
    assert run(straight) == 0
    real: Any = pkgutil.resolve_name(place)
    sent: list[int] = []

    def signalled(*arguments: Any, **named: Any) -> Any:
        if not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
        return real(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(place, signalled)
        capsys.readouterr()
        assert run(words) == 3
    told = one_object(capsys)["error"]
    assert DURING[place] in told["what"]
    assert "the state is saved" in told["what"]
    assert run(["train", "--resume", str(tmp_path / "run"), "--quiet", "--json"]) == 0
    for file in ("metrics.jsonl", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "straight" / file).read_bytes()


def test_resume_stopped_while_it_loads(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        stop_at("graft.training.phases.use_best", patch)
        assert run(words) == 3
    capsys.readouterr()
    again = ["train", "--resume", str(tmp_path / "run"), "--quiet", "--json"]
    with monkeypatch.context() as patch:
        stop_at("graft.training.build.load_base", patch)
        assert run(again) == 3
    told = one_object(capsys)
    assert "before it went on; its checkpoints stand" in told["error"]["what"]
    assert told["error"]["fix"] == f"graft train --resume {tmp_path / 'run'}"
    assert run(again) == 0


def test_an_interrupt_that_becomes_another_error_is_still_a_stop(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def importing(*arguments: Any) -> Any:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt as error:
            raise ModuleNotFoundError("Could not import module 'LlamaConfig'") from error

    monkeypatch.setattr("graft.training.build.read_config", importing)
    assert run(words) == 3
    assert one_object(capsys)["error"]["type"] == "StopRequested"


def test_a_signal_after_the_answer_changes_nothing(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from graft.cli import answer

    real = answer.success

    def success(*arguments: Any) -> None:
        real(*arguments)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(answer, "success", success)
    assert run(words) == 0
    assert one_object(capsys)["ok"] is True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("place", "verb"),
    [
        ("graft.evaluate.kinds.measure", ["evaluate", "MODEL", "--data", "ROWS"]),
        ("graft.evaluate.generate.generate", ["generate", "MODEL", "--prompt", "a"]),
        ("graft.adapters.merge.merge", ["merge", "adapter", "--out", "merged"]),
        ("graft.kernels.explain", ["doctor"]),
        ("graft.cli.demo._answers_of", ["demo", "--out", "demo"]),
    ],
)
def test_other_verbs_answer_when_stopped(
    place: str,
    verb: list[str],
    number: int,
    tiny_dir: Callable[..., Path],
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    stop_at(place, monkeypatch, number)
    given = [{"MODEL": str(tiny_dir("llama")), "ROWS": str(rows)}.get(word, word) for word in verb]
    assert run([*given, "--json"]) == 3
    assert one_object(capsys)["error"]["type"] == "StopRequested"


def test_the_process_itself_answers_sigterm(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys, graft.evaluate.generate as g, graft.cli.main as m\n"
        "g.generate = lambda *a, **k: os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.argv = ['graft', 'generate', 'builtin', '--prompt', 'a', '--json']\nm.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 3, done.stderr
    assert json.loads(done.stdout)["error"]["type"] == "StopRequested"


@pytest.mark.parametrize("late", [False, True])
def test_a_child_of_the_demo_is_asked_once_and_waited_for(late: bool, tmp_path: Path) -> None:
    from graft.cli.demo import _in_a_child

    # The child tells how often it was asked, and stops as `graft train` does; or it was done already.
    program = (
        "import os, signal, sys, time\nasked = []\n"
        "signal.signal(signal.SIGINT, lambda *_: asked.append(1))\n"
        "os.kill(os.getppid(), signal.SIGINT)\n"
        "while not asked: time.sleep(0.01)\n"
        "time.sleep(0.2)\nprint(len(asked))\n"
    )
    command = [sys.executable, "-c", program + f"sys.exit({0 if late else 3})"]
    if late:
        with pytest.raises(KeyboardInterrupt):
            _in_a_child(command)
    else:
        assert _in_a_child(command) == (3, b"1\n")
