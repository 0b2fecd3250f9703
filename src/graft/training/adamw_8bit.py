"""AdamW with both moments in 8 bits, blocks of 256 of them under one scale.

The first moment is in the signed dynamic map, the second in the unsigned one, each code the nearest. The
update decodes a page, computes in float32 and encodes again. Small tensors are updated together: they lie
one after another in a page, each filled up with zeros to whole blocks, so that no block has two.

Second moments below 1.6e-7 of the largest in their block get code 0. It is read as 1.6e-7 of it, not as zero:
over zero a first moment that is still there, or a small new gradient, would make a step of any size.

Source: 8-bit optimizers, arXiv:2110.02861; sizes and order of operations as in bitsandbytes' AdamW8bit. Its
CPU path rounds through a grid of 3e-5 of the largest (`rounding="grid"` here, equal bit for bit).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

from graft import kernels
from graft.kernels.reference import Rounding
from graft.quant.formats import ABSMAX_FORMAT, UNSIGNED_FORMAT, QuantFormat
from graft.training.config import TrainingConfig
from graft.training.pages import Part, Work
from graft.training.rules import IN_CACHE

BLOCKSIZE = 256
MIN_ELEMENTS = 4096
"""Smaller tensors keep moments in float32: they save nothing, and are often the touchy ones."""


def takes(parameter: Parameter) -> bool:
    """Whether the moments of a tensor go into 8 bits."""
    return parameter.numel() >= MIN_ELEMENTS and parameter.dtype == torch.float32


class _Moment:
    """How one moment is coded: its map, and the map by which codes are read."""

    def __init__(self, name: str, fmt: QuantFormat, device: torch.device, rounding: Rounding) -> None:
        self._name = name
        self._table = self._decoded = fmt.table(device)
        if fmt is UNSIGNED_FORMAT:
            self._decoded = self._table.clone()
            self._decoded[0] = self._table[1] / 2  # the largest value that code 0 may stand for
        self._rounding: Rounding = rounding

    def decode(self, parts: dict[str, Tensor], begin: int, end: int, out: Tensor) -> None:
        codes, absmax = self._arrays(parts, begin, end)
        kernels.call(
            "decode_blockwise", codes, [absmax], [], self._decoded, bits=8, blocksize=BLOCKSIZE, out=out
        )

    def encode(self, parts: dict[str, Tensor], begin: int, end: int, values: Tensor) -> None:
        how = {"bits": 8, "blocksize": BLOCKSIZE, "rounding": self._rounding}
        codes, absmax = self._arrays(parts, begin, end)
        coded, scales = kernels.call("encode_blockwise", values, self._table, **how)
        codes.copy_(coded)
        absmax.copy_(scales)

    def _arrays(self, parts: dict[str, Tensor], begin: int, end: int) -> tuple[Tensor, Tensor]:
        scales = slice(begin // BLOCKSIZE, end // BLOCKSIZE)
        return parts[self._name][begin:end], parts[f"{self._name}_absmax"][scales]


class AdamW8bit:
    """The rule over tensors that `takes` accepts.

    Args:
        config: Betas and epsilon.
        device: Of the tensors.
        rounding: Of the codes.

    Cost: 2.03 bytes for each trained number, and five pages in float32 besides.
    """

    parts = (
        Part("exp_avg", torch.uint8, fill=ABSMAX_FORMAT.codebook.index(0.0)),
        Part("exp_avg_sq", torch.uint8, fill=UNSIGNED_FORMAT.codebook.index(0.0)),
        Part("exp_avg_absmax", torch.float32, BLOCKSIZE),
        Part("exp_avg_sq_absmax", torch.float32, BLOCKSIZE),
    )
    block, numbers = BLOCKSIZE, IN_CACHE
    counts = True

    def __init__(self, config: TrainingConfig, device: torch.device, rounding: Rounding = "nearest") -> None:
        self._beta1, self._beta2, self._epsilon = config.adam_beta1, config.adam_beta2, config.adam_epsilon
        self._first = _Moment("exp_avg", ABSMAX_FORMAT, device, rounding)
        self._second = _Moment("exp_avg_sq", UNSIGNED_FORMAT, device, rounding)
        self._scratch = torch.empty((5, 0), dtype=torch.float32, device=device)

    def update(self, work: Work) -> None:
        """One step: neighbours with as many updates at once, else one by one."""
        spans = work.spans
        whole = [_whole_blocks(span.end - span.begin) for span in spans]
        together = all(a.place + size == b.place for a, b, size in zip(spans, spans[1:], whole, strict=False))
        if together and len(set(work.counts)) == 1:
            self._update(work, spans[0].place, spans[-1].place + whole[-1])
            return
        for index, (span, size) in enumerate(zip(spans, whole, strict=True)):
            self._update(work.only(index), span.place, span.place + size)

    def _update(self, work: Work, begin: int, end: int) -> None:
        alone = len(work.spans) == 1 and work.values[0].numel() == end - begin
        first, second, root, *copies = self._buffers(end - begin)
        if alone:
            values, gradient = work.values[0], work.gradients[0]
        else:
            values, gradient = copies
            gradient.zero_()  # what fills the last blocks must stay zero
            places = [slice(s.place - begin, s.place - begin + s.end - s.begin) for s in work.spans]
            torch._foreach_copy_([values[place] for place in places], work.values)
            torch._foreach_copy_([gradient[place] for place in places], work.gradients)
        self._first.decode(work.parts, begin, end, first)
        self._second.decode(work.parts, begin, end, second)
        first.mul_(self._beta1).add_(gradient, alpha=1.0 - self._beta1)
        second.mul_(self._beta2).addcmul_(gradient, gradient, value=1.0 - self._beta2)
        count = work.counts[0]
        unbiased1, unbiased2 = 1.0 - self._beta1**count, 1.0 - self._beta2**count
        torch.sqrt(second, out=root).div_(unbiased2**0.5).add_(self._epsilon)
        if work.weight_decay:
            values.mul_(1.0 - work.rate * work.weight_decay)
        values.addcdiv_(first, root, value=-work.rate / unbiased1)
        self._first.encode(work.parts, begin, end, first)
        self._second.encode(work.parts, begin, end, second)
        if not alone:
            torch._foreach_copy_(work.values, [values[place] for place in places])

    def _buffers(self, size: int) -> list[Tensor]:
        if self._scratch.shape[1] < size:
            self._scratch = self._scratch.new_empty((5, size))
        return [buffer[:size] for buffer in self._scratch]


def _whole_blocks(num_elements: int) -> int:
    return -(-num_elements // BLOCKSIZE) * BLOCKSIZE
