"""Coloured scenes composed of real digits: `python -m data_prep.scenes --out data/scenes`.

A scene is a 16x16 RGB image with one or two handwritten digits. Each digit is in one of four quadrants and has one of
six colours; two digits of a scene have different colours. The digits of `train` and `val` come from the train and val
parts of `data_prep.digits`, those of `test` and `heldout` from its test part. About one in seven colour-digit
combinations occurs only in `heldout`, where every scene contains one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import cyclopts
import numpy as np
from numpy.typing import NDArray

from data_prep import run
from data_prep.digits import SPLIT_SEED, WORDS, png, split, write
from mmgen.data.progress import Progress
from mmgen.evaluate.tasks import COLOURS, PLACES, Object, paint

TEMPLATES = (
    ("a {colour} {digit} {place}", " and "),
    ("{colour} {digit} {place}", ", "),
    ("{colour} {digit} {place}", " and "),
)
ANY_ORDER = 0.15
# 9 of the 60 combinations: each colour once or twice, no digit twice.
HELD_OUT = frozenset({(c, d) for d, c in enumerate([0, 1, 2, 3, 4, 5, 0, 1, 2])})
SIZES = {"train": 24000, "test": 1000, "heldout": 500, "val": 500}
# Two digits are more frequent in training than in tests: the assignment of digits to quadrants is learned last.
TWO_DIGITS = {"train": 0.75, "test": 0.5, "heldout": 0.5, "val": 0.5}
DIGITS = {"train": "train", "test": "test", "heldout": "test", "val": "val"}


def describe(objects: list[Object], rng: np.random.Generator) -> str:
    """A caption: one template, with the digits as numerals or words.

    Most captions list the objects in reading order, which makes captioning easier. Some list them in random order, so
    that a drawing depends on the named quadrants instead of the order of the objects.
    """
    clause, joint = TEMPLATES[int(rng.integers(len(TEMPLATES)))]
    word = rng.random() < 0.3
    ordered = sorted(objects, key=lambda thing: list(PLACES).index(thing.place or ""))
    if rng.random() < ANY_ORDER:
        ordered = [ordered[int(i)] for i in rng.permutation(len(ordered))]
    parts = []
    for thing in ordered:
        name = WORDS[thing.digit] if word else str(thing.digit)
        parts.append(clause.format(colour=thing.colour, digit=name, place=thing.place))
    return joint.join(parts)


def allowed(objects: list[Object], name: str) -> bool:
    """Whether a scene belongs to a split: scenes of `heldout` have a held-out combination, the others have none."""
    held_out = any((list(COLOURS).index(o.colour or ""), o.digit) in HELD_OUT for o in objects)
    return held_out == (name == "heldout")


def scenes(name: str, count: int, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> list[dict[str, Any]]:
    """`count` samples of one split, composed of the given digits."""
    rng = np.random.default_rng([SPLIT_SEED, list(SIZES).index(name)])
    colours, places = list(COLOURS), list(PLACES)
    samples: list[dict[str, Any]] = []
    with Progress(f"composing {name}", "scenes", count, quiet=True) as progress:
        while len(samples) < count:
            n = 1 + int(rng.random() < TWO_DIGITS[name])
            chosen = rng.integers(len(images), size=n)
            where, paints = rng.permutation(len(places))[:n], rng.permutation(len(colours))[:n]
            objects = [
                Object(int(labels[i]), colours[int(colour)], places[int(place)])
                for i, colour, place in zip(chosen, paints, where, strict=True)
            ]
            if not allowed(objects, name):
                continue
            pixels = paint([(images[i], thing) for i, thing in zip(chosen, objects, strict=True)])
            record = {"caption": describe(objects, rng), "objects": [thing.as_dict() for thing in objects]}
            samples.append({"png": png(pixels), "json": record})
            progress.done = len(samples)
    return samples


def main(
    *,
    out: Annotated[Path, cyclopts.Parameter(help="Folder to write.")] = Path("data/scenes"),
    train: Annotated[int, cyclopts.Parameter(help="Training scenes.")] = SIZES["train"],
) -> None:
    """Write train, test, heldout and val shards of coloured scenes."""
    parts = split()
    for name, count in {**SIZES, "train": train}.items():
        if count < 1:
            raise ValueError(f"--train must be at least 1, not {count}")
        samples = scenes(name, count, *parts[DIGITS[name]])
        write(out, name, samples, per_shard=8000)
        print(f"{name}: {len(samples)} scenes in {out}")


if __name__ == "__main__":
    run(main)
