"""The task `scenes`: coloured digits in the quadrants of a black picture."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from mmgen.evaluate.tasks.interface import CELL, NAMES, Mark, Object, Pixels, Task

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
INK, BLANK = 128, 64
"""A quadrant contains a digit if its brightest pixel reaches INK, and is empty if no pixel reaches BLANK.

Between the two the picture cannot be read. The brightest pixel of a real digit is 255, that of a real empty quadrant 0.
"""


class Scenes(Task):
    """Pictures of 16x16 pixels with one coloured digit in some quadrants; captions name digit, colour and quadrant."""

    size = (2 * CELL, 2 * CELL)

    def parse(self, caption: str) -> frozenset[Object] | None:
        colours, places = "|".join(COLOURS), "|".join(PLACES)
        digits = "|".join(NAMES)
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
            objects.append(Object(NAMES[match["digit"]], match["colour"], match["place"]))
        distinct = len({thing.place for thing in objects}) == len(objects)
        return frozenset(objects) if distinct else None

    def marks(self, pixels: Pixels) -> list[Mark] | None:
        marks = []
        for place, (row, column) in PLACES.items():
            quadrant = pixels[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL].astype(np.float64)
            peak = quadrant.max()
            if peak < BLANK:
                continue
            if peak < INK:
                return None
            # The colour is the palette direction with the most energy of the pixels; grey is the projection onto it.
            ink = quadrant.reshape(-1, 3).T @ quadrant.reshape(-1, 3)
            palette = {name: np.array(rgb) / np.linalg.norm(rgb) for name, rgb in COLOURS.items()}
            colour = max(palette, key=lambda name: palette[name] @ ink @ palette[name])
            grey = quadrant @ palette[colour] / (np.linalg.norm(COLOURS[colour]) / 255)
            marks.append(Mark(np.clip(np.rint(grey), 0, 255).astype(np.uint8), colour, place))
        return marks

    def compose(self, digits: Sequence[tuple[Pixels, Object]]) -> Pixels:
        return paint(digits)


def paint(digits: Sequence[tuple[Pixels, Object]]) -> Pixels:
    """Paint grey digits [8, 8] with their colours into their quadrants of a black picture [16, 16, 3].

    Raises:
        ValueError: an object has no known colour or quadrant.
    """
    picture = np.zeros((2 * CELL, 2 * CELL, 3), dtype=np.uint8)
    for grey, thing in digits:
        if thing.colour not in COLOURS or thing.place not in PLACES:
            raise ValueError(f"{thing} needs a `colour` of {list(COLOURS)} and a `place` of {list(PLACES)}")
        row, column = PLACES[thing.place]
        tint = np.array(COLOURS[thing.colour]) / 255
        coloured = np.rint(grey[:, :, None] * tint).astype(np.uint8)
        picture[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] = coloured
    return picture
