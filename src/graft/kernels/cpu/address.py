"""Where the memory of a tensor lies, for functions in C++."""

from __future__ import annotations

from torch import Tensor

from graft.errors import QuantError


def address_of(tensor: Tensor) -> int:
    """The address of a tensor's first number.

    Raises:
        QuantError: It has no memory: a stand-in of a tracing mode.
    """
    address = tensor.data_ptr()
    if not address and tensor.numel():
        kind = type(tensor).__name__
        raise QuantError(
            f"a {kind} {tuple(tensor.shape)} has no memory that a kernel could read or write",
            where="cpu kernels",
            fix="pass plain tensors, or call torch.ops.graft, which is known to torch's tracing modes",
        )
    return address
