"""The task `digits`: pictures of one grey digit."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mmgen.evaluate.tasks.interface import CELL, NAMES, Mark, Object, Pixels, Task


class Digits(Task):
    """Pictures of 8x8 pixels, filled by one grey digit; captions name it (`a 7`, `seven`)."""

    size = (CELL, CELL)

    def parse(self, caption: str) -> frozenset[Object] | None:
        digits = [NAMES[word] for word in re.findall(r"[a-z]+|\d", caption.lower()) if word in NAMES]
        return frozenset({Object(digits[0])}) if len(digits) == 1 else None

    def marks(self, pixels: Pixels) -> list[Mark] | None:
        return [Mark(pixels.reshape(CELL, CELL))]

    def compose(self, digits: Sequence[tuple[Pixels, Object]]) -> Pixels:
        return digits[0][0]
