"""One grey digit fills the picture."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mmgen.evaluate.tasks.interface import CELL, NAMES, Mark, Object, Pixels, Task


class Digits(Task):
    """One grey digit fills the picture."""

    def parse(self, caption: str) -> frozenset[Object] | None:
        found = [NAMES[word] for word in re.findall(r"[a-z]+|\d", caption.lower()) if word in NAMES]
        return frozenset({Object(found[0])}) if len(found) == 1 else None

    def marks(self, pixels: Pixels) -> list[Mark] | None:
        return [Mark(pixels.reshape(CELL, CELL))]

    def compose(self, digits: Sequence[tuple[Pixels, Object]]) -> Pixels:
        return digits[0][0]
