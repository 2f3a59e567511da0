"""A judge that names what a picture shows; it is trained on real digits that the generator never saw."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image
from sklearn.svm import SVC

from mmgen.data.shards.pictures import open_image
from mmgen.data.shards.samples import Sample, read
from mmgen.evaluate.tasks import Mark, Object, Pixels, Task, Truth


def pixels(image: Image.Image) -> Pixels:
    """Pixel values [H, W] or [H, W, 3] of an image."""
    return np.asarray(image)


def truth(sample: Sample) -> Truth:
    """The objects that a sample's JSON lists; raises ValueError where it lists none."""
    objects = sample.meta.get("objects")
    if not objects:
        raise ValueError(f"sample {sample.name} lists no objects in its JSON: evaluation needs labelled shards")
    return frozenset(Object(**fields) for fields in objects)


class Judge:
    """A support vector classifier on 8x8 grey digits, and a task's plain rules for colour and place."""

    def __init__(self, task: Task, shards: Sequence[str]) -> None:
        samples = [sample for sample in read(shards) if sample.image is not None]
        greys = [pixels(open_image(sample.image or b"").convert("L")) for sample in samples]
        labels = [next(iter(truth(sample))).digit for sample in samples]
        self.task = task
        self._digits = SVC(C=10).fit(_features(greys), labels)

    def read(self, pictures: Sequence[Pixels]) -> list[Truth | None]:
        """What each picture shows, or None where it cannot be read."""
        marks: list[list[Mark] | None] = [self.task.marks(picture) for picture in pictures]
        every = [mark for found in marks if found for mark in found]
        names = iter(self._digits.predict(_features([mark.grey for mark in every])).tolist() if every else [])
        return [
            None if found is None else frozenset(Object(next(names), mark.colour, mark.place) for mark in found)
            for found in marks
        ]


def _features(greys: Sequence[Pixels]) -> np.ndarray:
    return np.stack(greys).reshape(len(greys), -1).astype(np.float64) * (16 / 255)
