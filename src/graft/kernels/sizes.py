"""Sizes of blocks, where configuration can read them without torch."""

from __future__ import annotations

BLOCKSIZES = tuple(2**power for power in range(5, 13))
"""Elements that may share one absmax: 32 to 4096."""

ABSMAX_BLOCKSIZE = 256
"""Scales that share one scale of their own in double quantization (QLoRA, arXiv:2305.14314, sec. 3)."""
