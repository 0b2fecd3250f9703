"""The declared ops with the checks of their arguments, and the registration of the reference backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from graft.kernels import (
    attention_checks,
    checks,
    elementwise_checks,
    reference,
    reference_attention,
    reference_decode,
    reference_elementwise,
    reference_linear,
)
from graft.kernels import bits as reference_bits
from graft.kernels.cpu import backend as cpu
from graft.kernels.table import REFERENCE, Backend, OpSpec, OpTable
from graft.kernels.triton import backend as triton


def fill(table: OpTable) -> None:
    """Declare every op in a table and register the reference for each."""
    table.add_backend(Backend(REFERENCE))
    for name, doc, check, fn in _OPS:
        table.define(OpSpec(name, doc, check))
        table.register(name, REFERENCE, fn)


_OPS: tuple[tuple[str, str, Callable[..., None], Callable[..., Any]], ...] = (
    (
        "encode_blockwise",
        "values to packed codes and absmax",
        checks.check_encode,
        reference.encode_blockwise,
    ),
    (
        "encode_affine",
        "values to packed codes, scale and shift",
        checks.check_encode_affine,
        reference.encode_affine,
    ),
    (
        "decode_blockwise",
        "packed codes, scales and shifts to values",
        checks.check_decode,
        reference_decode.decode_blockwise,
    ),
    ("pack_bits", "codes to bytes, the first highest", checks.check_pack, reference_bits.pack_bits),
    ("unpack_bits", "bytes to codes", checks.check_unpack, reference_bits.unpack_bits),
    (
        "encode_absmax",
        "double quantization of scales or shifts",
        checks.check_encode_absmax,
        reference.encode_absmax,
    ),
    (
        "decode_absmax",
        "scales from their 8-bit codes",
        checks.check_decode_absmax,
        reference_decode.decode_absmax,
    ),
    (
        "quantized_linear",
        "x W' + bias, W from its codes",
        checks.check_linear,
        reference_linear.quantized_linear,
    ),
    (
        "quantized_linear_backward",
        "dL/dy W, W from its codes",
        checks.check_linear_backward,
        reference_linear.quantized_linear_backward,
    ),
    (
        "attention",
        "softmax(scale q k' + mask) v and the sums' logarithms",
        attention_checks.check_attention,
        reference_attention.attention,
    ),
    (
        "attention_backward",
        "gradients of q, k and v",
        attention_checks.check_attention_backward,
        reference_attention.attention_backward,
    ),
    (
        "rms_norm",
        "weight * x / sqrt(mean(x^2) + eps)",
        elementwise_checks.check_norm,
        reference_elementwise.rms_norm,
    ),
    (
        "rms_norm_backward",
        "gradient of x",
        elementwise_checks.check_norm_backward,
        reference_elementwise.rms_norm_backward,
    ),
    ("silu_product", "silu(gate) * up", elementwise_checks.check_gate, reference_elementwise.silu_product),
    (
        "silu_product_backward",
        "gradients of gate and up",
        elementwise_checks.check_gate_backward,
        reference_elementwise.silu_product_backward,
    ),
    (
        "cross_entropy",
        "losses of rows of logits, and their derivative",
        elementwise_checks.check_cross_entropy,
        reference_elementwise.cross_entropy,
    ),
)

TABLE = OpTable()
"""The table of this process."""

fill(TABLE)
cpu.add_to(TABLE)
triton.add_to(TABLE)

call = TABLE.call
select = TABLE.select
explain = TABLE.explain
register = TABLE.register
add_backend = TABLE.add_backend
remove_backend = TABLE.remove_backend
