"""Codes of a few bits in bytes and back, in plain torch ("packing" of sequences into rows is elsewhere)."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Put codes into bytes, the first one in the highest bits; the last byte is filled up with code 0.

    Args:
        codes: uint8 (N,), each below 2**bits.
        bits: 1, 2, 4 or 8.

    Returns:
        uint8 (ceil(N * bits / 8),); with 8 bits the codes themselves.
    """
    if bits == 8:
        return codes
    per_byte = 8 // bits
    if codes.numel() % per_byte:
        codes = torch.cat([codes, codes.new_zeros(per_byte - codes.numel() % per_byte)])
    columns = codes.view(-1, per_byte)
    packed = columns[:, 0].clone()
    for column in range(1, per_byte):
        packed.bitwise_left_shift_(bits).bitwise_or_(columns[:, column])
    return packed


def unpack_bits(packed: Tensor, bits: int, num_elements: int) -> Tensor:
    """The inverse of `pack_bits`.

    Args:
        packed: uint8 bytes, any shape.
        bits: 1, 2, 4 or 8.
        num_elements: N, how many codes there are.

    Returns:
        Codes uint8 (N,).
    """
    packed = packed.reshape(-1)
    if bits == 8:
        return packed[:num_elements]
    shifts = torch.arange(8 - bits, -1, -bits, dtype=torch.uint8, device=packed.device)
    codes = packed[:, None].bitwise_right_shift(shifts).bitwise_and_(2**bits - 1)
    return codes.view(-1)[:num_elements]
