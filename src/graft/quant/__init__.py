"""Numbers in few bits: formats and codebooks, quantized tensors, and the linear layer over them."""

from __future__ import annotations

from graft.quant.config import QuantizationConfig
from graft.quant.formats import ABSMAX_FORMAT, FORMATS, QuantFormat, format_of
from graft.quant.linear import QuantizedLinear, quantized_modules
from graft.quant.tensor import QuantizedTensor, quantize

__all__ = [
    "ABSMAX_FORMAT",
    "FORMATS",
    "QuantFormat",
    "QuantizationConfig",
    "QuantizedLinear",
    "QuantizedTensor",
    "format_of",
    "quantize",
    "quantized_modules",
]
