"""What passes between the state machine of a request and the scheduler.

A state machine yields a `Feed` or a `Draw` and is sent the answer: `Chosen` or `Drawn`.

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
    """Put these positions into the cache; answered with the best allowed next token and the last hidden state."""

    strip: Strip
    allowed_V: NDArray[np.bool_]
    gumbel_V: NDArray[np.float64] | None = None
    """Makes the best token a sample; None: greedy."""


class Chosen(NamedTuple):
    """The answer to a `Feed`."""

    token: int
    hidden_D: Tensor


@dataclass(frozen=True)
class Known:
    """Patches of an image that are given."""

    x_NP: NDArray[Any]
    """Clean patches; anything where unknown."""
    mask_N: NDArray[np.bool_]

    @property
    def count(self) -> int:
        """How many patches are given."""
        return int(self.mask_N.sum())


@dataclass(frozen=True)
class Draw:
    """Draw an image at `position`; answered with `Drawn`."""

    grid: Grid
    order_N: NDArray[np.int64]
    first: tuple[int, int]
    """Grid cell of the patch that comes first in that order."""
    rng: np.random.Generator
    """The request's own randomness."""
    position: int
    opening_D: Tensor
    """Hidden state at the size token."""
    known: Known | None = None

    @property
    def kind(self) -> tuple[Grid, int]:
        """Draws of one kind may share a canvas."""
        return self.grid, 0 if self.known is None else self.known.count


class Drawn(NamedTuple):
    """The answer to a `Draw`: the patches [N, P] and the image that they make."""

    x_NP: NDArray[Any]
    image: Image.Image


Wish = Feed | Draw
Answer = Chosen | Drawn
Serving = Generator[Wish, Any, Result]
"""The state machine of a request: is sent the `Answer` to each `Wish`."""
