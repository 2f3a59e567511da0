"""The interface of a task: rules that read objects from captions and pixels, and that compose pictures of objects."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
CELL = 8
"""Height and width of a digit in pixels."""
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NAMES = {**{word: i for i, word in enumerate(WORDS)}, **{str(i): i for i in range(10)}}
"""Digits by their names in captions."""


@dataclass(frozen=True)
class Object:
    """One digit of a picture; the fields are keys of the list `objects` in the JSON of a sample."""

    digit: int
    colour: str | None = None
    place: str | None = None
    """The quadrant, such as `top left`."""

    def as_dict(self) -> dict[str, int | str]:
        """Return the object as JSON, without the fields that are None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Mark:
    """A digit in a picture, before the judge classifies it."""

    grey: Pixels
    """Grey pixel values [8, 8]."""
    colour: str | None = None
    place: str | None = None
    """The quadrant."""


class Task(ABC):
    """Reads the captions and pictures of a data set, and composes pictures for the baselines."""

    size: ClassVar[tuple[int, int] | None] = None
    """(height, width) of the pictures of `marks` and `compose`; None if the task handles all declared sizes itself."""

    @abstractmethod
    def parse(self, caption: str) -> frozenset[Object] | None:
        """Return the objects that a caption names, or None if it names none or contradicts itself."""

    @abstractmethod
    def marks(self, pixels: Pixels) -> list[Mark] | None:
        """Return the digits that a picture shows, or None if some part is too bright for blank and too dark for ink."""

    @abstractmethod
    def compose(self, digits: Sequence[tuple[Pixels, Object]]) -> Pixels:
        """Return a picture of grey digits [8, 8], each with the colour and in the quadrant of its object."""

    def find(self, pixels: Pixels) -> list[Mark] | None:
        """Return the marks of a picture of any size, which is averaged over areas to the size of the task."""
        return self.marks(pixels if self.size is None else resized(pixels, self.size))


def resized(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Scale a picture to (height, width) by areas: a smaller one has means, a larger one repeats pixels."""
    if pixels.shape[:2] == size:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BOX))


Truth = frozenset[Object]
"""All objects of a picture."""
