"""Pictures of shards, and the features in which sets of pictures are compared."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from PIL import Image

from mmgen.data.shards.pictures import open_image, open_stored
from mmgen.data.shards.samples import BadRecord, Picture, Sample, read
from mmgen.data.shards.store import Patterns
from mmgen.evaluate.distances import (
    Features,
    compress,
    frechet,
    frechet_unbiased,
    nearest_distance,
    two_sample_accuracy,
    within_class_variance,
)
from mmgen.evaluate.judge import pixels, truth
from mmgen.evaluate.tasks import Pixels, Task, Truth
from mmgen.image.patch import Floats, Grid, Patcher


class Pictures:
    """The readable pictures of shards, at the size and in the colours that the model draws; latents are decoded."""

    def __init__(self, patterns: Patterns, patcher: Patcher, bad: list[BadRecord]) -> None:
        self.samples: list[Sample] = []
        found: list[Image.Image | tuple[Floats, Grid]] = []
        for sample in read(patterns, bad):
            picture = next((segment for segment in sample.segments if isinstance(segment, Picture)), None)
            if picture is None or (picture.stored and patcher.stored is None):
                continue
            try:
                if picture.stored:
                    found.append(patcher.encode_stored(open_stored(picture.data).array))
                else:
                    found.append(patcher.fit(open_image(picture.data)))
                self.samples.append(sample)
            except ValueError as error:
                bad.append(BadRecord(sample.shard, sample.key, str(error)))
        self.images = developed(found, patcher)
        self.pixels = [pixels(image) for image in self.images]
        self.truth = [truth(sample) for sample in self.samples]


def developed(found: Sequence[Image.Image | tuple[Floats, Grid]], patcher: Patcher) -> list[Image.Image]:
    """Images as they are, and patch rows decoded, those of one grid together."""
    images: dict[int, Image.Image] = {}
    grids: dict[Grid, dict[int, Floats]] = defaultdict(dict)
    for i, item in enumerate(found):
        if isinstance(item, Image.Image):
            images[i] = item
        else:
            grids[item[1]][i] = item[0]
    for grid, rows in grids.items():
        images |= zip(rows, patcher.pictures(np.stack([*rows.values()]), grid), strict=True)
    return [images[i] for i in range(len(found))]


class Real:
    """Real pictures with known content, of training and held out; every comparison takes `n` of each side."""

    def __init__(self, task: Task, train: Pictures, test: Pictures, n: int) -> None:
        self.task, self.n = task, min(n, len(test.pixels), len(train.pixels))
        self.test, self.test_truth = test.pixels, test.truth
        self.train_rows, self.test_rows = rows(train.pixels), rows(test.pixels)
        self.pca = compress(self.train_rows)
        self.digits = digits_by_class(task, train.pixels, train.truth)
        test_digits = digits_by_class(task, test.pixels, test.truth)
        self.variance = within_class_variance({k: rows(v) for k, v in test_digits.items()})
        self.nearest = nearest_distance(self.test_rows[: self.n], self.train_rows)

    def _pair(self, pictures: Sequence[Pixels]) -> tuple[Features, Features]:
        a, b = rows(pictures[: self.n]), self.test_rows[: self.n]
        return (self.pca.transform(a), self.pca.transform(b)) if self.pca else (a, b)

    def frechet(self, pictures: Sequence[Pixels]) -> float:
        """Fréchet distance to the held-out pictures, in (at most 64) pixel components."""
        return frechet(*self._pair(pictures))

    def frechet_unbiased(self, pictures: Sequence[Pixels]) -> float | None:
        """The same without what so few pictures add to it; None where they are too few to tell."""
        return frechet_unbiased(*self._pair(pictures))

    def separable(self, pictures: Sequence[Pixels]) -> float:
        """How well a classifier tells pictures from held-out real ones.

        Both are rounded to the 17 grey levels of the data: a background that is off by 1 in 255, which no eye sees,
        would give away every picture that was not rounded by the scanner.
        """
        return two_sample_accuracy(*self._pair([seventeen_levels(shown) for shown in pictures]))


def seventeen_levels(shown: Pixels) -> Pixels:
    """Pixel values 0..255, rounded to multiples of 255 / 16; real digits stay as they are."""
    rounded: Pixels = np.rint(np.rint(shown * (16 / 255)) * (255 / 16)).astype(np.uint8)
    return rounded


def rows(pictures: Sequence[Pixels]) -> Features:
    """Pictures as rows of numbers in [0, 1]."""
    return np.stack(pictures).reshape(len(pictures), -1) / 255


def digits_by_class(task: Task, pictures: Sequence[Pixels], truths: Sequence[Truth]) -> dict[int, list[Pixels]]:
    """The grey digits found where they should be, by the class they should have."""
    classes: dict[int, list[Pixels]] = defaultdict(list)
    for shown, wanted in zip(pictures, truths, strict=True):
        places = {thing.place: thing.digit for thing in wanted}
        for mark in task.marks(shown) or []:
            if mark.place in places:
                classes[places[mark.place]].append(mark.grey)
    return dict(sorted(classes.items()))
