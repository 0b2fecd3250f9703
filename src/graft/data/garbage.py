"""Less work for Python's garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def only_new_garbage() -> Iterator[None]:
    """Have the collector look only at what is made from here on.

    A process with torch and transformers has some 200,000 objects that live until its end, and looking at all
    takes a tenth of a second. Work that makes many objects has it done again and again, for nothing.
    """
    if gc.get_freeze_count():  # somebody else froze them, and may rely on it
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
