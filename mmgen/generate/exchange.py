"""What the coroutine of a request yields to the scheduler, and what the scheduler sends back.

A coroutine yields a `Feed` and is sent a `Chosen`, or yields a `Draw` and is sent a `Drawn`.

Suffixes: N patches of one image, P patch length, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mmgen.generate.request import Result
from mmgen.image.patch import Grid
from mmgen.sequence.document import Strip


@dataclass(frozen=True)
class Feed:
    """Put these positions into the cache and choose the next token."""

    strip: Strip
    allowed_V: NDArray[np.bool_]
    """True at tokens that may come next."""
    gumbel_V: NDArray[np.float64] | None = None
    """Gumbel noise, which is added to the logits so that the largest one is a sample; None: greedy choice."""


class Chosen(NamedTuple):
    """The result of a `Feed`: the next token and the hidden state of the last position that was fed."""

    token: int
    hidden_D: Tensor


@dataclass(frozen=True)
class Known:
    """The known patches of an image that is in-painted."""

    x_NP: NDArray[Any]
    """Clean patches; ignored where `mask_N` is false."""
    mask_N: NDArray[np.bool_]
    """True at known patches."""

    @property
    def count(self) -> int:
        """Number of known patches."""
        return int(self.mask_N.sum())


@dataclass(frozen=True)
class Draw:
    """Draw an image."""

    grid: Grid
    order_N: NDArray[np.int64]
    """Raster index of each patch, in the order in which patches are generated."""
    first: tuple[int, int]
    """Grid cell (row, column) of the first patch of `order_N`."""
    rng: np.random.Generator
    """The random generator of the request."""
    position: int
    """Position (of rotary embedding) that all patches of the image share."""
    opening_D: Tensor
    """Hidden state at the size token, which precedes the patches."""
    known: Known | None = None

    @property
    def kind(self) -> tuple[Grid, int]:
        """Grid and number of known patches; draws of equal kind can share a canvas."""
        return self.grid, 0 if self.known is None else self.known.count


class Drawn(NamedTuple):
    """The result of a `Draw`: the patches [N, P] in raster order, and the image that they form."""

    x_NP: NDArray[Any]
    image: Image.Image


Action = Feed | Draw
Outcome = Chosen | Drawn
RequestCoroutine = Generator[Action, Any, Result]
"""Yields an `Action`, is sent its `Outcome`, and returns the result of the request."""
