"""Pictures of a row: found, checked and kept with the conversation; nothing is trained on them yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graft.data.examples import IMAGE_MARK, Images, Message
from graft.data.sources import Row
from graft.errors import DataError

_MAGIC = {
    "png": (b"\x89PNG\r\n\x1a\n",),
    "jpeg": (b"\xff\xd8\xff",),
    "gif": (b"GIF87a", b"GIF89a"),
    "bmp": (b"BM",),
}


def images_of(row: Row, messages: list[Message], raws: Sequence[Any]) -> tuple[list[Message], Images | None]:
    """The pictures of a row, from its column `images` (or `image`) or from parts of its messages.

    Args:
        row: The row; relative paths start at the folder of its file.
        messages: The messages as they were read, pictures in them as "<image>".
        raws: The same as they stand in the row.

    Returns:
        The messages, and the pictures; None where there are none.

    Raises:
        DataError: A file is missing or is no picture, a picture is not a local file, or there are more or
            fewer marks than pictures.
    """
    assert isinstance(row.value, dict)
    added = len(messages) - len(raws)
    parts = [
        (index + added, part)
        for index, raw in enumerate(raws)
        if isinstance(raw, dict) and isinstance(raw.get("content"), list)
        for part in raw["content"]
        if isinstance(part, dict) and part.get("type") in ("image", "image_url", None) and "text" not in part
    ]
    named = row.value.get("images") or row.value.get("image") or []
    named = named if isinstance(named, list) else [named]
    given = [_reference(part, row) for _, part in parts]
    if parts and named and not any(given):
        given = [
            _reference(each, row) for each in named
        ]  # parts that only say where, the files in the column
    elif not parts:
        given = [_reference(each, row) for each in named]
    if not given and not parts:
        return messages, None
    places = [
        index for index, message in enumerate(messages) for _ in range(message["content"].count(IMAGE_MARK))
    ]
    if len(places) != len(given) or None in given:
        raise DataError(
            f"the messages have {len(places)} {IMAGE_MARK} marks for {len([g for g in given if g])} images",
            where=row.where,
            fix=f"write {IMAGE_MARK} once for each image, where the model sees it",
        )
    paths = tuple(_checked(each, row) for each in given if each is not None)
    return messages, Images(paths, tuple(places))


def image_kind(head: bytes) -> str:
    """What the first 12 bytes of a file say that it is: png, jpeg, gif, bmp, webp, or "" for none of them."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    return next((kind for kind, begins in _MAGIC.items() if head.startswith(begins)), "")


def _reference(part: Any, row: Row) -> str | None:
    if isinstance(part, Mapping):
        part = next(
            (part[name] for name in ("path", "image", "url", "image_url") if part.get(name) is not None), None
        )
        if isinstance(part, Mapping):
            part = part.get("url", part.get("path"))
    if part is None:
        return None
    if not isinstance(part, str):
        raise DataError(
            f"an image must be the path of a file, not {type(part).__name__}",
            where=row.where,
            fix='write "images": ["folder/picture.png"], relative to the data file',
        )
    return part


def _checked(reference: str, row: Row) -> str:
    """The path of a picture.

    Raises:
        DataError: It is not a local file, or no picture.
    """
    if reference.startswith("file://"):
        reference = reference.removeprefix("file://")
    elif "://" in reference[:12] or reference.startswith("data:"):
        raise DataError(
            f"the image {reference[:60]!r} is not a file on this machine",
            where=row.where,
            fix="download it, and give its path relative to the data file",
        )
    path = file_of(row).parent / reference
    try:
        with path.open("rb") as file:
            head = file.read(12)
    except (OSError, ValueError) as error:
        raise DataError(
            f"the image {reference!r} cannot be read: {getattr(error, 'strerror', None) or error}",
            where=row.where,
            fix=f"paths are relative to {str(path.parent) or '.'!r}; correct the path, or set skip_invalid",
        ) from error
    if not image_kind(head):
        raise DataError(
            f"{reference!r} is not an image: it begins with {head[:8]!r}",
            where=row.where,
            fix="give a png, jpeg, webp, gif or bmp file",
        )
    return str(path)


def file_of(row: Row) -> Path:
    """The file that a row came from, by its place "file:line:column"."""
    name = row.where
    while (cut := name.rpartition(":"))[0] and cut[2].strip().isdecimal():
        name = cut[0]
    return Path(name)
