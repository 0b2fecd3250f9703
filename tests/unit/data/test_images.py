"""Rows with pictures: found, checked, kept; and refused for training with what would be needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from graft.data.config import DataConfig
from graft.data.examples import Conversation, Images
from graft.data.formats import detect, to_example
from graft.data.images import image_kind
from graft.data.prepare import prepare
from graft.data.sources import Row, read_rows
from graft.errors import DataError

HEADS = {
    "png": b"\x89PNG\r\n\x1a\n0000",
    "jpeg": b"\xff\xd8\xff\xe0JFIF0000",
    "gif": b"GIF89a000000",
    "bmp": b"BM0000000000",
    "webp": b"RIFF0000WEBP",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for kind, head in HEADS.items():
        (tmp_path / f"a.{kind}").write_bytes(head)
    (tmp_path / "a.txt").write_text("not a picture")
    return tmp_path


def row(folder: Path, **columns: Any) -> Row:
    return Row(columns, f"{folder / 'rows.jsonl'}:3")


def ask(text: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": "a cat"}]


def read(value: Row) -> Conversation:
    found = to_example(value, detect([value]))
    assert isinstance(found, Conversation)
    return found


@pytest.mark.parametrize("kind", HEADS)
def test_a_picture_is_known_by_its_first_bytes(folder: Path, kind: str) -> None:
    assert image_kind(HEADS[kind]) == kind
    value = row(folder, messages=ask("<image>What?"), images=[f"a.{kind}"])
    assert read(value).images == Images((str(folder / f"a.{kind}"),), (0,))


@pytest.mark.parametrize("name", ["path", "image", "url"])
def test_pictures_may_be_parts_of_a_message(folder: Path, name: str) -> None:
    parts = [
        {"type": "text", "text": "See "},
        {"type": "image", name: "a.png"},
        {"type": "text", "text": "what?"},
    ]
    found = read(row(folder, messages=ask(parts)))
    assert found.messages[0]["content"] == "See <image>what?"
    assert found.images == Images((str(folder / "a.png"),), (0,))


def test_sharegpt_rows_have_pictures_too(folder: Path) -> None:
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "a"}]
    found = read(row(folder, conversations=turns, images=["a.gif"], system="S"))
    assert found.images == Images((str(folder / "a.gif"),), (1,))


def test_a_mark_without_pictures_is_text(folder: Path) -> None:
    assert read(row(folder, messages=ask("<image> is a tag"))).images is None


@pytest.mark.parametrize(
    ("columns", "what"),
    [
        ({"messages": ask("<image>"), "images": ["b.png"]}, "'b.png' cannot be read"),
        ({"messages": ask("<image>"), "images": ["a.txt"]}, "'a.txt' is not an image"),
        ({"messages": ask("<image>"), "images": ["a.png", "a.gif"]}, "1 <image> marks for 2 images"),
        ({"messages": ask("none"), "images": ["a.png"]}, "0 <image> marks for 1 images"),
        ({"messages": ask("<image>"), "images": ["https://x.org/a.png"]}, "not a file on this machine"),
        ({"messages": ask("<image>"), "images": [3]}, "must be the path"),
        ({"messages": ask([{"type": "image"}])}, "1 <image> marks for 0 images"),
        ({"messages": ask([{"type": "audio", "audio": "a.wav"}])}, "something else than text and images"),
        ({"prompt": "<image>?", "completion": "a", "images": ["a.png"]}, "has no place for them"),
    ],
)
def test_what_is_wrong_with_a_picture_is_said(folder: Path, columns: dict[str, Any], what: str) -> None:
    with pytest.raises(DataError, match=what) as caught:
        read(row(folder, **columns))
    assert caught.value.where.startswith(f"{folder / 'rows.jsonl'}:3")
    assert caught.value.fix


def test_a_real_file_is_read_and_refused_for_training(shared: Path, tinystories: Path) -> None:
    from transformers import AutoTokenizer

    path = shared / "datasets" / "instruct" / "mllm_demo.json"
    rows = list(read_rows(path))
    found = [read(each) for each in rows]
    assert [len(each.images.paths) for each in found if each.images] == [len(r.value["images"]) for r in rows]  # type: ignore[index]
    tokenizer = AutoTokenizer.from_pretrained(tinystories)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    with pytest.raises(DataError, match="multimodal base"):
        prepare(str(path), tokenizer, DataConfig())
