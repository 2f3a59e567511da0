"""What the coroutine of a request yields to the scheduler, and what the scheduler sends back.

A coroutine yields a `Feed` and is sent a `Chosen`, or yields a `Draw` and is sent a `Drawn`.

Suffixes: N patches of one image, P patch length, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mmgen.flow.guide import Guide
from mmgen.generate.request import Result
from mmgen.image.patch import Grid
from mmgen.sequence.document import ImageSegment, Strip


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


class Kind(NamedTuple):
    """The properties of a drawing that all images of a canvas share."""

    grid: Grid
    known: int
    """Number of known patches."""
    strength: float | None
    """Strength of the start from a picture; None without one."""
    invert: bool


@dataclass(frozen=True)
class Begin:
    """Where the solver begins, if not at the noise of the seed."""

    latents_NP: NDArray[Any] | None = None
    """Standard normal noise that replaces that of the seed."""
    picture_NP: NDArray[Any] | None = None
    """Clean patches of a picture to start from."""
    strength: float = 1.0
    """Share of the solver steps that are taken from the picture on."""
    invert: bool = False
    """Whether to run the flow backwards from the picture, to its noise."""


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
    images: Sequence[ImageSegment] = ()
    """The images of the document before this one, which a lane of guidance keeps."""
    negative: Sequence[int] = ()
    """Tokens of the negative prompt, instead of the text that guidance removes."""
    begin: Begin = field(default_factory=Begin)
    guide: Guide | None = None
    """Moves the clean estimate of this image: its patches [1, N, P]."""

    @property
    def kind(self) -> Kind:
        """What draws have in common that share a canvas."""
        picture = self.begin.picture_NP is not None
        known = 0 if self.known is None else self.known.count
        return Kind(self.grid, known, self.begin.strength if picture else None, self.begin.invert)


class Drawn(NamedTuple):
    """The result of a `Draw`: the patches [N, P] in raster order, and the image that they form.

    After an inversion, `x_NP` is the noise of the picture, and the image is meaningless.
    """

    x_NP: NDArray[Any]
    image: Image.Image


Action = Feed | Draw
Outcome = Chosen | Drawn
RequestCoroutine = Generator[Action, Any, Result]
"""Yields an `Action`, is sent its `Outcome`, and returns the result of the request."""
