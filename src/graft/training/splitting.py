"""Out of memory in a step: the same step again with fewer rows at a time, or an end with the numbers.

A split stays for the rest of the run. It is part of the position, and is written down at once, so that a
run that is killed before its next checkpoint splits at the same step when it goes on, with the same bits.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from graft import files
from graft.data.loader import Batch
from graft.errors import TrainingError
from graft.evaluate.loss import IGNORED
from graft.kernels.reference_linear import release_scratch
from graft.training.allocator import give_back
from graft.training.monitors import memory_bytes
from graft.training.random_state import random_state, restore_random_state

FILE = "splits.json"

_TOLD = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "std::bad_alloc",
)
"""How torch words it where it has no class for it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _TOLD)


def pieces(batches: Sequence[Batch], rows: int | None) -> Iterator[Batch]:
    """The batches of a step, cut to at most so many rows; pieces without a labelled token are left out.

    Args:
        batches: As the loader gives them.
        rows: None cuts nothing.

    Yields:
        Batches of the same width, whose rows together are the same. `num_tokens` is the whole batch's.
    """
    for batch in batches:
        if rows is None or len(batch.input_ids) <= rows:
            yield batch
            continue
        for start in range(0, len(batch.input_ids), rows):
            part = slice(start, start + rows)
            labels = batch.labels[part]
            if count := int((labels != IGNORED).sum()):
                yield replace(
                    batch,
                    input_ids=batch.input_ids[part],
                    position_ids=batch.position_ids[part],
                    labels=labels,
                    num_labelled_tokens=count,
                    sample_ids=batch.sample_ids[part],
                )


class Splitter:
    """How many rows a forward pass may have, and how this became fewer.

    Args:
        splits: Of the run so far, [step, rows] each: the position's own list, which grows.
        place: The file that they are written to at once.
        say: Told about each split.
        release: Lets go of what a failed step holds: gradients, tensors kept for the backward pass.
        together: Neighbouring rows that stay in one pass.
    """

    def __init__(
        self,
        splits: list[list[int]],
        place: Path,
        say: Callable[[str], None],
        release: Callable[[], None],
        together: int = 1,
    ) -> None:
        self._together = together
        self.splits, self._place, self._say, self._release = splits, place, say, release
        # What a killed run had done after its last checkpoint is done again at the same step.
        known = files.read_json(place) if place.is_file() else []
        self._ahead = [split for split in known if split not in splits]

    def rows(self, step: int) -> int | None:
        """The most rows of a forward pass in this step; None for as many as the batch has."""
        while self._ahead and self._ahead[0][0] <= step:
            self.splits.append(self._ahead.pop(0))
        return self.splits[-1][1] if self.splits else None

    def run(
        self, step: int, batches: Sequence[Batch], accumulate: Callable[[Iterator[Batch]], float]
    ) -> float:
        """Run the forward and backward passes of a step until they fit.

        Args:
            step: Its number, from 0.
            batches: Its batches.
            accumulate: Goes over pieces and returns the loss; called again from the start after a split.

        Returns:
            The loss.

        Raises:
            TrainingError: Not even a single row fits.
            MemoryError: Never; it is what a split answers.
            RuntimeError: Another error of a pass, as it came.
        """
        random = random_state()
        while True:
            rows = self.rows(step)
            try:
                return accumulate(pieces(batches, rows))
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                told = " ".join(str(error).split()) or type(error).__name__
            # Outside of the handler: the error holds the frames, and they hold the tensors.
            held = memory_bytes()
            self._release()
            free_memory()
            self._split(step, batches, rows, told, held)
            restore_random_state(random)

    def _split(self, step: int, batches: Sequence[Batch], rows: int | None, told: str, held: int) -> None:
        largest = max(len(batch.input_ids) for batch in batches)
        now = min(rows or largest, largest)
        width = max(batch.input_ids.shape[1] for batch in batches)
        if now <= self._together:
            what = "a single row" if now == 1 else f"a pair of {now} rows"
            raise TrainingError(
                f"{what} of {width} tokens does not fit: {held / 2**20:,.0f} MiB were held "
                f"when memory ran out ({told[:200]})",
                where=f"step {step + 1}",
                fix="lower data.max_length, set training.gradient_checkpointing=full, or quantize the base",
            )
        fewer = max(1, now // 2 // self._together) * self._together
        self.splits.append([step, fewer])
        files.write_json(self._place, self.splits)
        self._say(
            f"step {step + 1} ran out of memory with {now} rows of {width} tokens at a time "
            f"({held / 2**20:,.0f} MiB held); from here on {fewer} at a time, with the same batches"
        )


def free_memory() -> None:
    """Give back what is not in use: to the device's allocator, and to the system."""
    release_scratch()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    give_back()
