"""What the pictures of a data set show, and plain rules that read it back from captions and pixels."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
CELL = 8
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "magenta": (255, 0, 255),
    "cyan": (0, 255, 255),
}
PLACES: dict[str, tuple[int, int]] = {
    "top left": (0, 0),
    "top right": (0, 1),
    "bottom left": (1, 0),
    "bottom right": (1, 1),
}
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_DIGITS = {**{word: i for i, word in enumerate(WORDS)}, **{str(i): i for i in range(10)}}
# A quadrant holds a digit where its brightest pixel reaches INK, and is empty where none reaches BLANK; between
# the two the picture is wrong either way. Every real digit peaks at 255 and every real empty quadrant at 0.
INK, BLANK = 128, 64


@dataclass(frozen=True)
class Object:
    """One digit of a picture."""

    digit: int
    colour: str | None = None
    place: str | None = None

    def as_dict(self) -> dict[str, Any]:
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


class Digits(Task):
    """One grey digit fills the picture."""

    def parse(self, caption: str) -> frozenset[Object] | None:
        found = [_DIGITS[word] for word in re.findall(r"[a-z]+|\d", caption.lower()) if word in _DIGITS]
        return frozenset({Object(found[0])}) if len(found) == 1 else None

    def marks(self, pixels: Pixels) -> list[Mark] | None:
        return [Mark(pixels.reshape(CELL, CELL))]

    def compose(self, digits: Sequence[tuple[Pixels, Object]]) -> Pixels:
        return digits[0][0]


class Scenes(Task):
    """Coloured digits in the quadrants of a black picture."""

    def parse(self, caption: str) -> frozenset[Object] | None:
        colours, places = "|".join(COLOURS), "|".join(PLACES)
        digits = "|".join(_DIGITS)
        clauses = re.split(r"\s*(?:,|\band\b)\s*", caption.lower().strip(" ."))
        forms = (
            rf"(?:an? )?(?P<colour>{colours}) (?P<digit>{digits}) (?:in the |at the )?(?P<place>{places})",
            rf"(?:in the )?(?P<place>{places}) (?:an? )?(?P<colour>{colours}) (?P<digit>{digits})",
        )
        objects = []
        for clause in clauses:
            match = next(filter(None, (re.fullmatch(form, clause) for form in forms)), None)
            if match is None:
                return None
            objects.append(Object(_DIGITS[match["digit"]], match["colour"], match["place"]))
        distinct = len({thing.place for thing in objects}) == len(objects)
        return frozenset(objects) if distinct else None

    def marks(self, pixels: Pixels) -> list[Mark] | None:
        marks = []
        for place, (row, column) in PLACES.items():
            cell = pixels[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL].astype(np.float64)
            peak = cell.max()
            if peak < BLANK:
                continue
            if peak < INK:
                return None
            # Colour: the palette direction that explains the ink best. Grey: the projection onto it.
            ink = cell.reshape(-1, 3).T @ cell.reshape(-1, 3)
            palette = {name: np.array(rgb) / np.linalg.norm(rgb) for name, rgb in COLOURS.items()}
            colour = max(palette, key=lambda name: palette[name] @ ink @ palette[name])
            grey = cell @ palette[colour] / (np.linalg.norm(COLOURS[colour]) / 255)
            marks.append(Mark(np.clip(np.rint(grey), 0, 255).astype(np.uint8), colour, place))
        return marks

    def compose(self, digits: Sequence[tuple[Pixels, Object]]) -> Pixels:
        return paint(digits)


def paint(digits: Sequence[tuple[Pixels, Object]]) -> Pixels:
    """Grey digits [8, 8] in their colours in their quadrants of a black 16x16 RGB picture."""
    picture = np.zeros((2 * CELL, 2 * CELL, 3), dtype=np.uint8)
    for grey, thing in digits:
        if thing.colour not in COLOURS or thing.place not in PLACES:
            raise ValueError(f"{thing} needs a colour of {list(COLOURS)} and a place of {list(PLACES)}")
        row, column = PLACES[thing.place]
        tint = np.array(COLOURS[thing.colour]) / 255
        cell = np.rint(grey[:, :, None] * tint).astype(np.uint8)
        picture[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] = cell
    return picture


TASKS: dict[str, type[Task]] = {"digits": Digits, "scenes": Scenes}
