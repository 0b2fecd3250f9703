from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from graft.errors import StorageError
from graft.evaluate.report import (
    POLICY,
    Curves,
    Facts,
    Sample,
    Samples,
    Section,
    Series,
    Table,
    render,
    show,
    write_report,
)

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&\"'"


def _sections(text: str = "plain") -> list[Section]:
    series = [
        Series(run=text, kind="train", steps=range(1, 21), values=[3 / step for step in range(1, 21)]),
        Series(run=text, kind="eval", steps=[10, 20], values=[0.5, 0.4]),
        Series(run="other", kind="train", steps=[2, 1], values=[1.0, math.nan]),
    ]
    return [
        Facts(title=text, facts={text: text, "rank": 16}, note=text),
        Table(
            title=text,
            columns=(text, "loss"),
            rows=[(text, 1.5), ("b", 1.25)],
            best={"loss": "min"},
            note=text,
        ),
        Curves(title=text, series=series, x_label=text, note=text),
        Samples(
            title=text,
            names=(text, "adapted"),
            samples=[Sample(prompt=text, answers=(text, ""), reference=text)],
            note=text,
        ),
    ]


class _Page(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_text_of_others_stays_text() -> None:
    evil, plain = (_Page(render(_sections(text), title=text, subtitle=text)) for text in (EVIL, "plain"))
    assert evil.tags == plain.tags
    assert "".join(evil.texts).count(EVIL) >= 12


def test_nothing_is_fetched() -> None:
    page = render(_sections(), title="t")
    found = _Page(page)
    assert not [tag for tag, _ in found.tags if tag in ("link", "img", "iframe", "object", "base", "form")]
    assert not [attrs for _, attrs in found.tags if attrs.keys() & {"src", "href"}]
    assert "@import" not in page
    assert "url(" not in page
    assert [attrs["content"] for tag, attrs in found.tags if tag == "meta" and "http-equiv" in attrs] == [
        POLICY
    ]
    assert "default-src 'none'" in POLICY


def test_the_licence_travels_with_the_code_and_only_where_there_is_a_chart() -> None:
    with_chart, without = render(_sections(), title="t"), render(_sections()[:2], title="t")
    assert "Permission is hereby granted" in with_chart
    assert "uPlot=" in with_chart
    assert "uPlot" not in without


def _chart(curves: Curves) -> Any:
    found = re.search(r'<script type="application/json">(.*?)</script>', curves.body(), re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_curves_keep_every_value_and_leave_gaps_for_what_is_none() -> None:
    section = _sections(EVIL)[2]
    assert isinstance(section, Curves)
    lines = _chart(section)["series"]
    assert lines[0]["values"] == [3 / step for step in range(1, 21)]
    assert (lines[2]["steps"], lines[2]["values"]) == ([1, 2], [None, 1.0])
    assert [line["name"] for line in lines] == [f"{EVIL} train", f"{EVIL} eval", "other train"]
    assert [line["colour"] for line in lines] == [0, 0, 1]
    assert [line["dashed"] for line in lines] == [False, True, False]


def test_a_logarithmic_scale_has_no_place_for_zero() -> None:
    curves = Curves(
        title="t", series=[Series(run="", kind="train", steps=[1, 2], values=[0.0, 1.0])], log_scale=True
    )
    assert _chart(curves)["series"][0]["values"] == [None, 1.0]


def test_curves_without_values_say_so() -> None:
    assert "No values" in Curves(title="t", series=[]).body()


def test_the_best_of_a_column_is_marked() -> None:
    rows = [("a", 1.5, None), ("b", 1.25, 7), ("c", math.nan, 9)]
    table = Table(
        title="t", columns=("name", "loss", "score"), rows=rows, best={"loss": "min", "score": "max"}
    )
    cells = re.findall(r'<td class="number best"><span>(.*?)</span>', table.body())
    assert cells == ["1.250", "9"]
    assert '<td><span>a</span></td><td class="number">' in table.body()


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (True, "yes"),
        (1234567, "1,234,567"),
        (1.23456, "1.235"),
        (0.5, "0.5000"),
        (123.456, "123.5"),
        (12345.6, "12,346"),
        (2e-4, "0.0002"),
        (3.5e12, "3.5e+12"),
        (0.0, "0.0"),
        (math.inf, "inf"),
        ("text", "text"),
    ],
)
def test_values_are_shown_as_a_reader_wants_them(value: object, shown: str) -> None:
    assert show(value) == shown


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        write_report(tmp_path / "nowhere" / "report.html", _sections(), title="t")


def test_a_browser_draws_the_charts(tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    write_report(tmp_path / "report.html", _sections(EVIL), title=EVIL)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--dump-dom"]
    command = [browser, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=1000"]
    page = subprocess.run(
        [*command, (tmp_path / "report.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    found = _Page(page)
    assert [tag for tag, _ in found.tags].count("canvas") == 1
    assert "img" not in [tag for tag, _ in found.tags]
    legend = re.findall(r'<td class="u-value">(.*?)</td>', page)
    # Without a cursor the legend shows the last value of each line.
    assert legend == ["20", "0.15", "0.4", "1"]
