"""What a user may choose about quantization, and what each choice costs in bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from graft.config import did_you_mean, from_dict, to_dict
from graft.errors import ConfigError
from graft.kernels.sizes import ABSMAX_BLOCKSIZE, BLOCKSIZES

BITS = {"nf4": 4, "fp4": 4, "int8": 8}
"""Bits of one code, by quant_type."""


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """How the linear layers of a base model are stored (QLoRA, arXiv:2305.14314, sec. 3)."""

    SHORTHAND = "quant_type"

    quant_type: Literal["nf4", "fp4", "int8"] = "nf4"
    """Format of a weight: nf4 (4 bits, for normally distributed weights), fp4 (4-bit floats) or int8."""

    double_quant: bool = True
    """Quantize the scales too: 4.127 instead of 4.5 bits a weight with nf4 and a blocksize of 64."""

    blocksize: int = 64
    """Weights that share one scale: a power of two from 32 to 4096. Smaller is more exact and takes more."""

    skip_modules: tuple[str, ...] = ()
    """Ends of module names that stay dense, besides the embeddings and the output head, which always do."""

    def __post_init__(self) -> None:
        if self.quant_type not in BITS:
            raise ConfigError(
                f"no quant_type {self.quant_type!r}",
                where="quantization.quant_type",
                fix=did_you_mean(str(self.quant_type), BITS),
            )
        if self.blocksize not in BLOCKSIZES:
            raise ConfigError(
                f"blocksize is {self.blocksize!r}",
                where="quantization.blocksize",
                fix=f"one of: {', '.join(map(str, BLOCKSIZES))}",
            )

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return BITS[self.quant_type]

    def num_bytes(self, num_elements: int) -> int:
        """Bytes that a tensor of so many elements takes when stored: codes, scales and their scales."""
        num_blocks = -(-num_elements // self.blocksize)
        codes_bytes = (num_elements * self.bits + 7) // 8
        if not self.double_quant:
            return codes_bytes + 4 * num_blocks
        return codes_bytes + num_blocks + 4 * -(-num_blocks // ABSMAX_BLOCKSIZE) + 4

    def bits_per_weight(self, num_elements: int) -> float:
        """Stored bits over elements: 4.5 for nf4 at 64, 4.127 with double quantization of a large tensor."""
        return 8 * self.num_bytes(num_elements) / num_elements

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a file."""
        return to_dict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantizationConfig:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: An unknown field or a value that does not fit.
        """
        return from_dict(cls, values, "quantization")
