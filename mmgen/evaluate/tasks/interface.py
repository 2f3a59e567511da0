"""What a task is: the objects of a picture, and rules that read them from captions and pixels and compose them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
CELL = 8
"""Side of a digit in pixels."""
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NAMES = {**{word: i for i, word in enumerate(WORDS)}, **{str(i): i for i in range(10)}}
"""Digits by what captions call them."""


@dataclass(frozen=True)
class Object:
    """One digit of a picture."""

    digit: int
    colour: str | None = None
    place: str | None = None

    def as_dict(self) -> dict[str, int | str]:
        """For a shard's JSON."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Mark:
    """A digit found in a picture, before a judge has named it: its grey levels [8, 8], colour and place."""

    grey: Pixels
    colour: str | None = None
    place: str | None = None


class Task(ABC):
    """How captions and pictures of a data set are read and composed."""

    @abstractmethod
    def parse(self, caption: str) -> frozenset[Object] | None:
        """The objects a caption names, or None where it names none or contradicts itself."""

    @abstractmethod
    def marks(self, pixels: Pixels) -> list[Mark] | None:
        """The digits a picture shows, or None where something is neither drawn nor blank."""

    @abstractmethod
    def compose(self, digits: Sequence[tuple[Pixels, Object]]) -> Pixels:
        """A picture of grey digits [8, 8] at their places in their colours."""


Truth = frozenset[Object]
"""Everything that a picture shows."""
