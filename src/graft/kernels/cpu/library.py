"""The compiled library: where it is, how its functions are called, and whose threads they run on."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from functools import cache
from pathlib import Path

import torch

VERSION = 6
"""Of the functions' arguments; the library has to say the same."""

SOURCES = Path(__file__).parent / "source"
FILE = Path(__file__).parent / ("libgraft.dylib" if sys.platform == "darwin" else "libgraft.so")


class PerBlock(ctypes.Structure):
    """GraftPerBlock in source/graft.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("values", "map", "scale", "offset")]


class Weight(ctypes.Structure):
    """GraftWeight in source/graft.h."""

    _fields_ = [
        ("codes", ctypes.c_void_p),
        ("scales", PerBlock),
        ("shifts", PerBlock),
        ("codebook", ctypes.c_void_p),
        ("num_elements", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("blocksize", ctypes.c_int32),
    ]


class Encoding(ctypes.Structure):
    """GraftEncoding in source/graft.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("values", "scale", "shift", "codes", "codebook")),
        ("num_elements", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("dtype", "bits", "blocksize", "grid")),
    ]


class Product(ctypes.Structure):
    """GraftProduct in source/graft.h."""

    _fields_ = [
        ("weight", Weight),
        *((name, ctypes.c_void_p) for name in ("x", "bias", "y")),
        *((name, ctypes.c_int64) for name in ("rows", "in_features", "out_features")),
        ("dtype", ctypes.c_int32),
    ]


class Heads(ctypes.Structure):
    """GraftHeads in source/graft.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "head", "row")),
    ]


class Attention(ctypes.Structure):
    """GraftAttention in source/graft.h."""

    _fields_ = [
        *((name, Heads) for name in ("query", "key", "value", "output")),
        *((name, Heads) for name in ("grad_output", "grad_query", "grad_key", "grad_value")),
        *((name, ctypes.c_void_p) for name in ("sums", "mask")),
        *((name, ctypes.c_int64) for name in ("mask_batch", "mask_row")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "key_heads", "length", "head_dim")),
        ("scale", ctypes.c_float),
    ]


class Norm(ctypes.Structure):
    """GraftNorm in source/graft.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "grad", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "width")),
        ("eps", ctypes.c_float),
    ]


class Gate(ctypes.Structure):
    """GraftGate in source/graft.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("gate", "up", "grad", "out", "out_up")),
        ("count", ctypes.c_int64),
    ]


class Loss(ctypes.Structure):
    """GraftLoss in source/graft.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("logits", "targets", "losses", "slope")),
        *((name, ctypes.c_int64) for name in ("rows", "width")),
    ]


class Vocabulary(ctypes.Structure):
    """GraftVocabulary in source/graft.h."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("kinds", "controls", "widths", "bytes", "characters", "merges")
        ),
        *((name, ctypes.c_void_p) for name in ("wholes", "whole_ends", "whole_ids")),
        *((f"num_{name}", ctypes.c_int64) for name in ("controls", "characters", "merges", "wholes")),
        *((name, ctypes.c_int32) for name in ("first_control", "pattern", "digits_alone", "mark", "marks")),
    ]


class Texts(ctypes.Structure):
    """GraftTexts in source/graft.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("text", "ends")),
        ("count", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("ids", "starts")),
        ("capacity", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("id_ends", "done")),
    ]


@cache
def problem() -> str:
    """Why the library cannot be used, or ""."""
    if not FILE.exists():
        note = FILE.with_suffix(".txt")
        why = note.read_text(encoding="utf-8").strip() if note.exists() else "it was not compiled"
        return f"{why}; with a C++ compiler (g++ or clang++) at hand, install graft again"
    try:
        version = ctypes.CDLL(str(FILE)).graft_version()
    except (OSError, AttributeError) as error:
        return f"{FILE.name} cannot be loaded ({error}); install graft again"
    return "" if version == VERSION else f"{FILE.name} is of another version of graft; install graft again"


@cache
def library() -> ctypes.CDLL:
    """The library with its functions declared; only where `problem` is ""."""
    loaded = ctypes.CDLL(str(FILE))
    loaded.graft_tier.restype = ctypes.c_char_p
    loaded.graft_force_tier.argtypes = [ctypes.c_char_p]
    loaded.graft_decode.argtypes = [
        ctypes.POINTER(Weight),
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
        *(ctypes.c_int32,) * 3,
    ]
    loaded.graft_encode.argtypes = [ctypes.POINTER(Encoding), ctypes.c_int32]
    loaded.graft_product.argtypes = [ctypes.POINTER(Product), ctypes.c_int32]
    loaded.graft_attention_bytes.argtypes = [ctypes.POINTER(Attention), ctypes.c_int32, ctypes.c_int32]
    loaded.graft_attention_bytes.restype = ctypes.c_int64
    loaded.graft_attention.argtypes = [
        ctypes.POINTER(Attention),
        ctypes.c_int32,
        ctypes.c_void_p,
        ctypes.c_int32,
    ]
    loaded.graft_attention.restype = None
    for name, kind in (("rms_norm", Norm), ("silu_product", Gate), ("cross_entropy", Loss)):
        function = getattr(loaded, f"graft_{name}")
        function.argtypes, function.restype = [ctypes.POINTER(kind), ctypes.c_int32], None
    _declare_words(loaded)
    loaded.graft_decode.restype = loaded.graft_encode.restype = None
    loaded.graft_use_openmp.argtypes = [ctypes.c_void_p]
    loaded.graft_use_openmp(openmp_parallel())
    return loaded


def _declare_words(loaded: ctypes.CDLL) -> None:
    loaded.graft_words_new.argtypes = [ctypes.POINTER(Vocabulary)]
    loaded.graft_words_new.restype = ctypes.c_void_p
    loaded.graft_words_free.argtypes, loaded.graft_words_free.restype = [ctypes.c_void_p], None
    loaded.graft_words_read.argtypes = [ctypes.c_void_p, ctypes.POINTER(Texts)]


@cache
def tier() -> str:
    """The instruction set that runs: avx512, avx2, neon or scalar."""
    return str(library().graft_tier().decode())


@cache
def has_attention() -> bool:
    """Whether the instruction set that runs has attention."""
    return bool(library().graft_attention_bytes(ctypes.byref(Attention()), 0, 1))


@cache
def has_elementwise() -> bool:
    """Whether norm, gate and loss are compiled for the instruction set that runs."""
    return bool(library().graft_has_elementwise())


def tiers() -> list[str]:
    """The instruction sets that this machine can run, best first."""
    lib, found = library(), []
    for name in ("avx512", "avx2", "neon", "scalar"):
        if lib.graft_force_tier(name.encode()):
            found.append(name)
    lib.graft_force_tier(None)
    _forget_tier()
    return found


def force_tier(name: str | None) -> None:
    """Run on this instruction set from now on, for tests and benchmarks; None: on the best.

    Raises:
        ValueError: This machine does not have it.
    """
    _forget_tier()
    if not library().graft_force_tier(None if name is None else name.encode()):
        raise ValueError(f"this machine ({platform.machine()}) cannot run {name!r}")


def _forget_tier() -> None:
    tier.cache_clear()
    has_attention.cache_clear()
    has_elementwise.cache_clear()


def shares_threads() -> bool:
    """Whether the work is done by torch's own threads; else threads are started for each call."""
    return openmp_parallel() is not None


@cache
def openmp_parallel() -> int | None:
    """The address of GOMP_parallel in the OpenMP library that torch has loaded; None where it has none.

    Two pools of threads, torch's and another, would spin against each other on the same cores.
    """
    root = Path(torch.__file__).parent
    for folder in (root / "lib", root.parent / "torch.libs"):
        for path in sorted(folder.glob("lib*omp*")):
            try:
                loaded = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD)
                return ctypes.cast(loaded.GOMP_parallel, ctypes.c_void_p).value
            except (OSError, AttributeError):
                continue  # a library that torch does not use, or one without this entry
    return None
