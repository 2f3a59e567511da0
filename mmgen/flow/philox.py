"""Standard normal noise from keys and counters: equal on every device, for any batch and any number of processes.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") maps a key of 64 bits and a counter of
128 bits to 128 random bits. The Box-Muller transform in fp32 makes normal numbers of these. The integers are exact, so
devices differ only by the rounding of logarithm, sine and cosine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four words of a counter and two words of a key to four random words.

    All words are int64 tensors with values in [0, 2^32) and shapes that broadcast.
    """
    a, b, c, d = counter
    low, high = key
    for _ in range(ROUNDS):
        # int64 products wrap around, and their 64 bits are those of the unsigned product.
        first, second = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, c = (second >> 32 & WORD) ^ b ^ low, (first >> 32 & WORD) ^ d ^ high
        b, d = second & WORD, first & WORD
        low, high = low + WEYL[0] & WORD, high + WEYL[1] & WORD
    return a, b, c, d


def box_muller(radius: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normal numbers, fp32, from two random words with values in [0, 2^32)."""
    uniform = (radius.float() + 0.5) * 2.0**-32  # in (0, 1], so that its logarithm is finite
    length, turn = (-2 * uniform.log()).sqrt(), angle.float() * (2 * math.pi * 2.0**-32)
    return length * turn.cos(), length * turn.sin()


def keyed_normal(key_J: Tensor, cell_J2: Tensor, draws: int, length: int) -> Tensor:
    """Standard normal noise [J, K, P], fp32, for J patches with K draws of P numbers each.

    Args:
        key_J: a key of 64 bits (int64) per patch, usually that of its image.
        cell_J2: (row, column) of each patch in its image, int64. Patches of one key need different cells.
        draws: K.
        length: P.

    Returns:
        Noise that depends on key, cell, draw and element alone, and not on the other patches.
    """
    return _keyed_normal(_four_normal, key_J, cell_J2, draws, length)


def compiled_normal(key_J: Tensor, cell_J2: Tensor, draws: int, length: int) -> Tensor:
    """The noise of `keyed_normal` from one compiled kernel, for any number of patches.

    Compiling takes seconds to a minute, so it is worth while on a GPU only.
    """
    return _keyed_normal(_compiled(), key_J, cell_J2, draws, length)


def _four_normal(a: Tensor, b: Tensor, c: Tensor, d: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Four normal numbers [..., 4] for each counter (a, b, c, d) and key (low, high)."""
    words = philox((a, b, c, d), (low, high))
    return torch.stack([*box_muller(words[0], words[1]), *box_muller(words[2], words[3])], dim=-1)


@cache
def _compiled() -> Callable[..., Tensor]:
    # Without these limits, several kernels would write intermediate words to memory.
    limits: dict[str, Any] = {
        "realize_opcount_threshold": 4096, "realize_reads_threshold": 64, "realize_acc_reads_threshold": 64,
    }  # fmt: skip
    compiled: Callable[..., Tensor] = torch.compile(_four_normal, dynamic=True, options=limits)
    return compiled


def _keyed_normal(
    four_normal: Callable[..., Tensor], key_J: Tensor, cell_J2: Tensor, draws: int, length: int
) -> Tensor:
    quarter = torch.arange((length + 3) // 4, device=key_J.device)
    draw = torch.arange(draws, device=key_J.device).view(-1, 1)
    row, column, key = (x.view(-1, 1, 1) for x in (cell_J2[:, 0], cell_J2[:, 1], key_J))
    return four_normal(quarter, draw, row, column, key & WORD, key >> 32 & WORD).flatten(-2)[..., :length]
