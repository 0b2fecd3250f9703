"""Plain text files: each is one document, a very long one several."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from graft.data.readers.compressed import open_text
from graft.data.readers.rows import SHOWN_BYTES, Refuse, Row, find_no_text, no_text, unescaped

DOCUMENT_CHARACTERS = 64 << 20
"""Longest document; a longer file is cut behind the last line that ends before this, again and again."""


def read_document(path: Path, refuse: Refuse) -> Iterator[Row]:
    """Read a .txt file.

    Args:
        path: The file; also packed.
        refuse: Receives a document that is no text.

    Yields:
        The whole text; of a file of more than DOCUMENT_CHARACTERS one document after another, cut at line
        ends (at exactly that length where there is none), each with the line in which it begins. A document
        of nothing but space is left out.

    Raises:
        DataError: `refuse` raises it; or the file is packed and damaged.
        StorageError: The file cannot be read.

    Cost: a document and what is read beyond it.
    """
    with open_text(path) as file:
        rest, line, column = "", 1, 0
        while True:
            text = rest + file.read(DOCUMENT_CHARACTERS + 1 - len(rest))
            end = len(text)
            if end > DOCUMENT_CHARACTERS:
                end = text.rfind("\n", 0, DOCUMENT_CHARACTERS) + 1 or DOCUMENT_CHARACTERS
            text, rest = text[:end], text[end:]
            if found := find_no_text(text):
                before, cut = text[: found.start()], len(text) > SHOWN_BYTES
                at = found.start() - before.rfind("\n") + (0 if "\n" in before else column)
                error = no_text(found.group(), f"{path}:{line + before.count(chr(10))}:{at}")
                refuse(error, unescaped(text[:SHOWN_BYTES]) + (" ..." if cut else ""))
            elif text.strip():
                yield Row(text, f"{path}:{line}")
            if not rest:
                return
            line += text.count("\n")
            column = 0 if text.endswith("\n") else column + len(text)
