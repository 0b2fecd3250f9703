"""The page of a data check: what stands in the data stays text, its size is bounded, a browser draws it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from graft.config import Settings, build
from graft.evaluate.check_data import MOST_CHARACTERS, MOST_TOKENS, page_data
from graft.evaluate.check_page import write_check
from graft.training.config import RunConfig
from graft.training.data_check import Checked, check_data

EVIL = "</script><script>window.evil=1</script><img src=x onerror='window.evil=1'> & \" ' \u202eab \x1b[31m🦊"
FEW = [
    {
        "messages": [
            {"role": "user", "content": f"{number} {EVIL}"},
            {"role": "assistant", "content": EVIL * 2},
        ],
        "<b onclick=x>id</b>": number,
    }
    for number in range(30)
]


def checked(path: Path, rows: list[Any], *, held_out: list[Any] | None = None, **settings: Any) -> Checked:
    given = Settings()
    for name, lines in (("train", rows), ("eval", held_out)):
        if lines is not None:
            file = path / f"{name}<i>.jsonl"
            texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
            file.write_text("\n".join(texts), encoding="utf-8")
            settings[f"data.{name}"] = str(file)
    for name, value in settings.items():
        given.put(name, value, "the test")
    return check_data(build(RunConfig, given))


def written(found: Checked, path: Path) -> str:
    write_check(path, found.facts, found.datasets, found.findings, found.encoder)
    return path.read_text(encoding="utf-8")


class Tags(HTMLParser):
    """The elements of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Checked:
    place = tmp_path_factory.mktemp("hostile")
    surrogate = json.dumps(FEW[0]).replace("</script>", "\\ud800", 1)
    return checked(place, [*FEW, FEW[0], surrogate, {"messages": [EVIL]}, "[" + EVIL], held_out=FEW[:3])


def test_whatever_stands_in_the_data_stays_text(hostile: Checked, tmp_path: Path) -> None:
    page = written(hostile, tmp_path / "page.html")
    tags = Tags(page).found
    names = [name for name, _ in tags]
    assert names.count("script") == 2  # the data, and the code
    assert not {"img", "i<", "b onclick"} & set(names)
    allowed = {
        "href",
        "style",
        "class",
        "id",
        "data-part",
        "data-level",
        "data-phase",
        "title",
        "type",
        "content",
    }
    allowed |= {"charset", "http-equiv", "name", "lang"}
    assert {attribute for _, attributes in tags for attribute in attributes} <= allowed
    assert "<b onclick" not in page
    assert "&lt;b onclick=x&gt;id&lt;/b&gt;" in page
    assert not re.search(r"""(?:src|href)=["']?https?:""", page)
    assert "default-src 'none'" in page


def test_the_data_of_the_page_is_what_was_found(hostile: Checked, tmp_path: Path) -> None:
    page = written(hostile, tmp_path / "page.html")
    (held,) = re.findall(r'<script type="application/json" id="check-data">(.*?)</script>', page, re.DOTALL)
    training, evaluation = json.loads(held)["splits"]
    assert [split["name"] for split in (training, evaluation)] == ["training", "evaluation"]
    for index, shown in training["samples"].items():
        sample = hostile.datasets[0].samples[int(index)]
        assert shown["where"] == sample.where
        if shown["gap"] < 0:
            assert shown["ids"] == sample.input_ids
        assert len(shown["flags"]) == len(shown["pieces"]) == len(shown["ids"])
    problems = {problem["kind"]: problem for problem in training["problems"]}
    assert problems["rejected"]["total"] == 3
    assert len(problems["duplicate"]["places"]) == 1
    assert [problem["kind"] for problem in evaluation["problems"]] == ["overlap"]
    raw = problems["duplicate"]["places"][0]["raw"]
    assert json.loads(raw)["messages"] == FEW[0]["messages"]


def test_the_size_of_a_page_is_bounded(tmp_path: Path) -> None:
    long = "字🦊" * 700
    rows = [
        {"messages": [{"role": "user", "content": f"{number}🦊"}, {"role": "assistant", "content": long}]}
        for number in range(400)
    ]
    found = checked(tmp_path, [*rows, *rows[:60]])
    (split,) = page_data(found.facts, found.datasets, found.encoder)["splits"]
    assert sum(len(sample["ids"]) for sample in split["samples"].values()) <= MOST_TOKENS
    raw = {place["where"]: place["raw"] for problem in split["problems"] for place in problem["places"]}
    assert sum(map(len, raw.values())) <= MOST_CHARACTERS
    assert len(written(found, tmp_path / "page.html")) < 5_000_000


def test_a_page_is_whole_or_absent(hostile: Checked, tmp_path: Path) -> None:
    from graft.errors import StorageError

    with pytest.raises(StorageError):
        written(hostile, tmp_path / "no" / "page.html")
    written(hostile, tmp_path / "page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize("task", ["class", "pair", "text", "plain"])
def test_every_kind_of_run_has_a_page(task: str, tmp_path: Path) -> None:
    said = [f"{number} and {number * 7}" for number in range(12)]
    rows, settings = {
        "class": (
            [{"text": text, "label": number % 2} for number, text in enumerate(said)],
            {"task": "classification"},
        ),
        "pair": (
            [{"prompt": text, "chosen": text * 2, "rejected": "no"} for text in said],
            {"training.loss": "dpo", "adapter.method": "lora"},
        ),
        "text": ([{"text": text * 90} for text in said], {"data.max_length": 64}),
        "plain": ([{"prompt": text, "completion": text} for text in said], {"data.packing": False}),
    }[task]
    found = checked(tmp_path, rows, **settings)
    page = written(found, tmp_path / "page.html")
    assert ("classes</div>" in page) == (task == "class")
    assert ("chosen answer" in page) == (task == "pair")


def test_a_browser_draws_the_page(hostile: Checked, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    page = tmp_path / "page.html"
    written(hostile, page)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--dump-dom"]
    command = [browser, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000"]
    address = page.as_uri() + "#look/training/duplicate/0"
    drawn = subprocess.run(
        [*command, address], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    body = drawn[drawn.index("<body") :]
    shown = re.sub(r'<script type="application/json".*?</script>', "", body, flags=re.DOTALL)
    tags = Tags(shown).found
    tokens = [attributes for _, attributes in tags if "tok" in (attributes.get("class") or "").split()]
    sample = hostile.datasets[0].samples[30]
    legend = 4
    assert len(tokens) == legend + len(sample.input_ids)
    learned = [a for a in tokens[legend:] if "learned" in (a["class"] or "").split()]
    assert len(learned) == sum(label >= 0 for label in sample.labels)
    assert [
        f"id {id} " in (a["title"] or "") for id, a in zip(sample.input_ids, tokens[legend:], strict=True)
    ]
    assert "img" not in [name for name, _ in tags]
    assert len([1 for _, attributes in tags if attributes.get("class") == "rowline"]) == len(
        hostile.facts[0].packed.first
    )  # type: ignore[union-attr]
