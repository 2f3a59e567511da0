"""The form in which a loader worker sends tensors other than pixels: differences of integers, compressed.

The facts about positions and patches are mostly runs (counting indices, equal numbers), so they take a few per cent of
their size in memory. The encoding is exact.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LEVEL = 1
"""Compression level of zlib: the fastest one."""


@dataclass(frozen=True)
class _Entry:
    """How one tensor is stored in the bytes."""

    shape: tuple[int, ...]
    dtype: str
    sent: str
    """Type of the numbers in the bytes."""


@dataclass(frozen=True)
class Packed:
    """Tensors by name, as `pack` encoded them."""

    entries: Mapping[str, _Entry]
    data: bytes


def pack(tensors: Mapping[str, Tensor]) -> Packed:
    """Encode tensors of a CPU, of any integer, boolean or floating point type that numpy has."""
    entries, parts = {}, []
    for name, tensor in tensors.items():
        values = tensor.numpy()
        sent = _differences(values) if values.dtype.kind == "i" else values
        entries[name] = _Entry(values.shape, values.dtype.str, sent.dtype.str)
        parts.append(np.ascontiguousarray(sent).tobytes())
    return Packed(entries, zlib.compress(b"".join(parts), LEVEL))


def unpack(packed: Packed) -> dict[str, Tensor]:
    """The inverse of `pack`."""
    data, start, tensors = zlib.decompress(packed.data), 0, {}
    for name, entry in packed.entries.items():
        count, sent = int(np.prod(entry.shape)), np.dtype(entry.sent)
        values: NDArray[Any] = np.frombuffer(data, sent, count, start)
        start += count * sent.itemsize
        dtype = np.dtype(entry.dtype)
        values = np.cumsum(values, dtype=dtype) if dtype.kind == "i" else values.copy()
        tensors[name] = torch.from_numpy(values.reshape(entry.shape))
    return tensors


def _differences(values: NDArray[Any]) -> NDArray[Any]:
    """Each number minus the one before, in the smallest type that holds all; sums that overflow wrap back."""
    flat = values.ravel()
    differences = np.diff(flat, prepend=flat.dtype.type(0))
    low, high = differences.min(initial=0), differences.max(initial=0)
    smaller = (np.dtype(name) for name in ("i1", "i2", "i4"))
    dtype = next((t for t in smaller if np.iinfo(t).min <= low and high <= np.iinfo(t).max), values.dtype)
    return differences.astype(dtype)
