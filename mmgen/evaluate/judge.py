"""The judge: a classifier that reads pictures, trained on real digits that the model is not trained on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image
from sklearn.svm import SVC

from mmgen.data.shards.pictures import open_image
from mmgen.data.shards.samples import Sample, read
from mmgen.evaluate.tasks import Mark, Object, Pixels, Task, Truth


def pixels(image: Image.Image) -> Pixels:
    """Return the pixel values of an image, [height, width] or [height, width, 3], 0 to 255."""
    return np.asarray(image)


def truth(sample: Sample) -> Truth:
    """Return the objects that the JSON of a sample lists.

    Raises:
        ValueError: the JSON has no list `objects`.
    """
    objects = sample.meta.get("objects")
    if not objects:
        raise ValueError(
            f"sample {sample.name} has no list `objects` in its JSON: `mmgen eval` needs shards whose JSON lists the "
            "objects of each picture, as those of data_prep.digits and data_prep.scenes do"
        )
    return frozenset(Object(**fields) for fields in objects)


class Judge:
    """Reads pictures: a task finds digits with their colours and quadrants, a support vector classifier names them.

    `shards` hold single 8x8 grey digits with labels, on which the classifier is trained.
    """

    def __init__(self, task: Task, shards: Sequence[str]) -> None:
        samples = [sample for sample in read(shards) if sample.image is not None]
        greys = [pixels(open_image(sample.image or b"").convert("L")) for sample in samples]
        labels = [next(iter(truth(sample))).digit for sample in samples]
        self.task = task
        self._digits = SVC(C=10).fit(_features(greys), labels)

    def read(self, pictures: Sequence[Pixels]) -> list[Truth | None]:
        """Return the objects that each picture shows, or None for a picture that the task cannot read."""
        by_picture: list[list[Mark] | None] = [self.task.find(picture) for picture in pictures]
        every = [mark for marks in by_picture if marks for mark in marks]
        names = iter(self._digits.predict(_features([mark.grey for mark in every])).tolist() if every else [])
        return [
            None if marks is None else frozenset(Object(next(names), mark.colour, mark.place) for mark in marks)
            for marks in by_picture
        ]


def _features(greys: Sequence[Pixels]) -> np.ndarray:
    return np.stack(greys).reshape(len(greys), -1).astype(np.float64) * (16 / 255)
