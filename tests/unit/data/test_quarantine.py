"""The file of rows that were left out: whole or absent, also of a run that is resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import graft
from graft.config import from_dict
from graft.data.quarantine import Quarantine
from graft.errors import CheckpointError, DataError, GraftError
from graft.training.build import resume, run_from_config
from graft.training.config import RunConfig

ERROR = DataError("reason", where="rows.jsonl:3:1", fix="fix")
GOOD = [{"prompt": f"{n} and {n} is ", "completion": f"{2 * n}"} for n in range(12)]


def saved(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_are_kept_with_their_place_and_reason(tmp_path: Path) -> None:
    rows = ["a\nb", "\ud800", '{"q": "é"}', "x" * (9 << 20)]  # the last does not fit in memory's share
    with Quarantine() as quarantine:
        for number, row in enumerate(rows):
            quarantine.add(ERROR, row)
            if number == 1:
                quarantine.save(tmp_path / "first.jsonl")
        assert quarantine.count == len(rows)
        quarantine.save(tmp_path / "all.jsonl")
    expected = [{"where": ERROR.where, "reason": "reason", "fix": "fix", "row": row} for row in rows]
    assert saved(tmp_path / "first.jsonl") == expected[:2]
    assert saved(tmp_path / "all.jsonl") == expected
    assert not list(tmp_path.glob(".*"))


def test_an_old_file_goes_where_nothing_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    path.write_text("old")
    with Quarantine() as quarantine:
        quarantine.save(path)
        assert not path.exists()
        quarantine.save(path)


def config(model: Path, data: Path, output: Path, **more: Any) -> RunConfig:
    values = {
        "model": {"name": str(model)},
        "adapter": {"rank": 2},
        "data": {"train": str(data), "max_length": 64, "skip_invalid": True, **more},
        "training": {"max_steps": 2, "batch_size": 2},
        "output": str(output),
    }
    return from_dict(RunConfig, values, "the test")


def test_a_run_has_the_rows_that_it_left_out(tmp_path: Path, tiny_dir: Callable[..., Path]) -> None:
    data = tmp_path / "rows.jsonl"
    lines = [json.dumps({"question": row["prompt"], "completion": row["completion"]}) for row in GOOD]
    lines[3:3] = ['{"question": "a", "completion": ""}', "{", '{"completion": "b"}']
    data.write_text("\n".join(lines))
    columns = {"columns": {"prompt": "question"}}
    run_from_config(config(tiny_dir("llama"), data, tmp_path / "run", **columns))
    rows = saved(tmp_path / "run" / "quarantine.jsonl")
    assert sorted(row["where"] for row in rows) == [f"{data}:4", f"{data}:5:2", f"{data}:6"]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["config"]["data"]["columns"] == columns["columns"]
    before = (tmp_path / "run" / "quarantine.jsonl").read_bytes()
    (tmp_path / "run" / "quarantine.jsonl").unlink()
    settings = graft.config.Settings({"training.max_steps": 3}, {"training.max_steps": "the test"})
    resume(tmp_path / "run", settings=settings, allow_changes=["training.max_steps"])
    assert (tmp_path / "run" / "quarantine.jsonl").read_bytes() == before


def test_a_run_that_may_not_go_on_keeps_its_file(tmp_path: Path, tiny_dir: Callable[..., Path]) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n{broken\n')
    run_from_config(config(tiny_dir("llama"), data, tmp_path / "run"))
    before = saved(tmp_path / "run" / "quarantine.jsonl")
    data.write_text('{"prompt": "c", "completion": "d"}\n{also broken\n{and this\n')
    settings = graft.config.Settings({"training.max_steps": 3}, {"training.max_steps": "the test"})
    with pytest.raises(CheckpointError, match="training data"):
        resume(tmp_path / "run", settings=settings, allow_changes=["training.max_steps"])
    assert saved(tmp_path / "run" / "quarantine.jsonl") == before
    assert len(before) == 1


def test_a_run_without_bad_rows_has_no_such_file(tmp_path: Path, tiny_dir: Callable[..., Path]) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, GOOD)))
    run_from_config(config(tiny_dir("llama"), data, tmp_path / "run"))
    assert not (tmp_path / "run" / "quarantine.jsonl").exists()


def test_python_trains_on_rows_in_memory(tmp_path: Path, tiny_dir: Callable[..., Path]) -> None:
    losses = []
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, GOOD)))
    for number, data in enumerate((GOOD, (row for row in GOOD), path)):
        base = graft.load(str(tiny_dir("llama")))
        graft.attach(base.model, graft.LoraConfig(rank=2))
        options: dict[str, Any] = {"data_config": graft.DataConfig(max_length=64), "max_steps": 2}
        graft.train(base, data=data, eval_data=GOOD[:2], output=tmp_path / str(number), **options)
        losses.append((tmp_path / str(number) / "metrics.jsonl").read_bytes())
    assert losses[0] == losses[1] == losses[2]
    with pytest.raises(GraftError, match=r"stand in no file|memory"):
        resume(tmp_path / "0", allow_changes=["training.max_steps"])


def test_a_map_for_parts_that_the_rows_do_not_have_is_refused(
    tmp_path: Path, tiny_dir: Callable[..., Path]
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps({**row, "who": "x"}) for row in GOOD))
    with pytest.raises(DataError, match="gives 'label' .*which prompt_completion rows do not have"):
        run_from_config(config(tiny_dir("llama"), data, tmp_path / "run", columns={"label": "who"}))
