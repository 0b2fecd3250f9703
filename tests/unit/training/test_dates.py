"""Chat templates that write the date: a run notes the day it began, and goes on under it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graft.config import from_dict, read_assignments
from graft.data.chat import sandbox
from graft.data.config import DataConfig
from graft.data.prepare import make_encoder, prepare
from graft.errors import ConfigError
from graft.models.tokenizer import load_tokenizer
from graft.training import inputs
from graft.training.build import resume, run_from_config
from graft.training.config import RunConfig

DATED = (
    "{{ strftime_now('%d %B %Y') }}\n"
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
UNDATED = DATED.replace("{{ strftime_now('%d %B %Y') }}", "")


class Tomorrow(datetime.datetime):
    @classmethod
    def now(cls, tz: Any = None) -> datetime.datetime:
        return datetime.datetime(2031, 2, 3, 4, 5)


class TomorrowsDate(datetime.date):
    @classmethod
    def today(cls) -> datetime.date:  # type: ignore[override]
        return datetime.date(2031, 2, 3)


@pytest.fixture
def config(tmp_path: Path, tiny_dir: Callable[..., Path]) -> Callable[..., RunConfig]:
    rows = tmp_path / "rows.jsonl"
    messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    rows.write_text("\n".join(json.dumps({"messages": messages}) for _ in range(8)))
    (tmp_path / "dated.jinja").write_text(DATED)
    (tmp_path / "undated.jinja").write_text(UNDATED)

    def made(template: str, **data: Any) -> RunConfig:
        given = {"train": str(rows), "chat_template": str(tmp_path / template), "max_length": 64, **data}
        values = {
            "model": {"name": str(tiny_dir("llama"))},
            "adapter": {"rank": 2},
            "data": given,
            "training": {"max_steps": 2, "batch_size": 2, "save_steps": 1},
            "output": str(tmp_path / "run"),
        }
        return from_dict(RunConfig, values, "the test")

    return made


def record(tmp_path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / "run" / "run.json").read_text())
    return found


def test_a_run_goes_on_under_the_day_it_began(
    tmp_path: Path, config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_from_config(config("dated.jinja"))
    day = record(tmp_path)["config"]["data"]["date"]
    assert day == str(datetime.date.today())
    monkeypatch.setattr(sandbox, "datetime", Tomorrow)
    seen = []
    real = inputs.prepare

    def watched(*args: Any, **more: Any) -> Any:
        seen.append(real(*args, **more))
        return seen[-1]

    monkeypatch.setattr(inputs, "prepare", watched)
    settings = read_assignments(["training.max_steps=3"])
    resume(tmp_path / "run", settings=settings, allow_changes=["training.max_steps"])
    written = datetime.date.fromisoformat(day).strftime("%d %B %Y")
    assert written in seen[0].report.preview[0]
    assert record(tmp_path)["config"]["data"]["date"] == day


def test_a_day_is_written_as_given(config: Callable[..., RunConfig]) -> None:
    found = config("dated.jinja", date="2001-02-03")
    encoder = make_encoder(load_tokenizer(found.model.name), found.data)
    assert encoder.template.render([{"role": "user", "content": "a"}]).startswith("03 February 2001\n")


def test_a_template_without_a_date_needs_none(tmp_path: Path, config: Callable[..., RunConfig]) -> None:
    run_from_config(config("undated.jinja"))
    assert record(tmp_path)["config"]["data"]["date"] is None


def test_a_date_that_nobody_writes_is_refused(config: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match="the chat template writes no date") as error:
        run_from_config(config("undated.jinja", date="2001-02-03"))
    assert error.value.where == "data.date"


@pytest.mark.parametrize("value", ["yesterday", "2026-02-30", "1"])
def test_what_is_no_day_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=f"date must be a day, got '{value}'"):
        DataConfig(date=value)


def test_yaml_may_write_a_date_without_quotes() -> None:
    assert read_assignments(["data.date=2026-11-30"]).values == {"data.date": "2026-11-30"}


def test_kept_tokens_are_of_one_day(
    tmp_path: Path, config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    from graft.data import cache, masking

    monkeypatch.setattr(cache, "MIN_BYTES", 1)
    found = config("dated.jinja", cache=str(tmp_path / "kept"))
    tokenizer = load_tokenizer(found.model.name)
    first = prepare(str(found.data.train), tokenizer, found.data)
    monkeypatch.setattr(sandbox, "datetime", Tomorrow)
    monkeypatch.setattr(masking, "date", TomorrowsDate)
    second = prepare(str(found.data.train), tokenizer, found.data)
    assert "03 February 2031" not in first.report.preview[0]
    assert "03 February 2031" in second.report.preview[0]
