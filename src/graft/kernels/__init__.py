"""Every hot numeric operation once: a table of ops and the backends that implement them.

`call` runs an op on the best backend for its tensors, `explain` says which one that is and why. The
`reference` backend in plain torch has every op; others are announced with `add_backend` and `register`.
"""

from __future__ import annotations

from graft.kernels.ops import BLOCKSIZES, fill
from graft.kernels.reference import ABSMAX_BLOCKSIZE
from graft.kernels.reference_linear import release_scratch
from graft.kernels.table import TABLE, Backend, Choice, KernelFallbackWarning, OpSpec, OpTable

fill(TABLE)

call = TABLE.call
select = TABLE.select
explain = TABLE.explain
register = TABLE.register
add_backend = TABLE.add_backend
remove_backend = TABLE.remove_backend

__all__ = [
    "ABSMAX_BLOCKSIZE",
    "BLOCKSIZES",
    "TABLE",
    "Backend",
    "Choice",
    "KernelFallbackWarning",
    "OpSpec",
    "OpTable",
    "add_backend",
    "call",
    "explain",
    "fill",
    "register",
    "release_scratch",
    "remove_backend",
    "select",
]
