"""Reads the pictures of shards and computes the features for comparing sets of pictures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from copy import copy

import numpy as np
from PIL import Image

from mmgen.config import DataConfig
from mmgen.data.shards.pictures import open_image, open_stored
from mmgen.data.shards.samples import BadRecord, Picture, Sample, read
from mmgen.data.shards.store import Patterns, expand
from mmgen.evaluate.distances import Comparison, Features, within_class_variance
from mmgen.evaluate.judge import pixels, truth
from mmgen.evaluate.tasks import Pixels, Task, Truth
from mmgen.image.patch import Floats, Grid, Patcher


class Pictures:
    """The readable pictures of shards, at the size and in the colours of the model; latents are decoded.

    Samples that cannot be read are left out and appended to `bad`. At most `most` pictures are read; with more, shards
    are read in a random order, which is always the same.
    """

    def __init__(
        self,
        patterns: Patterns,
        patcher: Patcher,
        bad: list[BadRecord],
        data: DataConfig = DataConfig(),
        most: int | None = None,
    ) -> None:
        self.samples: list[Sample] = []
        stored: list[Image.Image | tuple[Floats, Grid]] = []
        shards = expand(patterns)
        if most is not None:
            shards = [shards[i] for i in np.random.default_rng(0).permutation(len(shards))]
        for sample in read(shards, bad, data):
            if most is not None and len(self.samples) == most:
                break
            picture = next((segment for segment in sample.segments if isinstance(segment, Picture)), None)
            if picture is None or (picture.stored and patcher.stored is None):
                continue
            try:
                if picture.stored:
                    stored.append(patcher.encode_stored(open_stored(picture.data).array))
                else:
                    stored.append(patcher.fit(open_image(picture.data)))
                self.samples.append(sample)
            except ValueError as error:
                bad.append(BadRecord(sample.shard, sample.key, str(error)))
        self.images = decoded(stored, patcher)
        self.pixels = [pixels(image) for image in self.images]

    @property
    def truth(self) -> list[Truth]:
        """The objects that each picture shows; raises ValueError for a sample without labels."""
        return [truth(sample) for sample in self.samples]

    def of_size(self, size: tuple[int, int]) -> Pictures:
        """Return those of (height, width) `size`, which may be none."""
        return self.where([values.shape[:2] == size for values in self.pixels])

    def where(self, kept: Sequence[bool]) -> Pictures:
        """Return those for which `kept` is true."""
        return self.at([i for i, keep in enumerate(kept) if keep])

    def shuffled(self) -> Pictures:
        """Return all of them in a random order, which is always the same for the same number of pictures."""
        return self.at(np.random.default_rng(0).permutation(len(self.samples)).tolist())

    def at(self, order: Sequence[int]) -> Pictures:
        """Return those at some indices, in this order."""
        chosen = copy(self)
        chosen.samples, chosen.images = [self.samples[i] for i in order], [self.images[i] for i in order]
        chosen.pixels = [self.pixels[i] for i in order]
        return chosen


def decoded(stored: Sequence[Image.Image | tuple[Floats, Grid]], patcher: Patcher) -> list[Image.Image]:
    """Decode the items that are patches [N, P] with their grid, one grid at a time; images stay unchanged."""
    images: dict[int, Image.Image] = {}
    grids: dict[Grid, dict[int, Floats]] = defaultdict(dict)
    for i, item in enumerate(stored):
        if isinstance(item, Image.Image):
            images[i] = item
        else:
            grids[item[1]][i] = item[0]
    for grid, patches in grids.items():
        images |= zip(patches, patcher.pictures(np.stack([*patches.values()]), grid), strict=True)
    return [images[i] for i in range(len(stored))]


class Real:
    """Real pictures of known content and one size, from training and held-out shards.

    Comparisons use `n` pictures of each side.
    """

    def __init__(self, task: Task, train: Pictures, test: Pictures, n: int) -> None:
        self.task = task
        self.test, self.test_truth = test.pixels, test.truth
        self.size: tuple[int, int] = (test.images[0].height, test.images[0].width)
        self._comparison = Comparison(features(train.pixels), features(test.pixels), n)
        self.digits = digits_by_class(task, train.pixels, train.truth)
        test_digits = digits_by_class(task, test.pixels, test.truth)
        self.variance = within_class_variance({k: features(v) for k, v in test_digits.items()})

    def frechet(self, pictures: Sequence[Pixels]) -> float:
        """Return the Fréchet distance to the held-out pictures, in at most 64 principal components of pixels."""
        return self._comparison.frechet(features(pictures))

    def frechet_unbiased(self, pictures: Sequence[Pixels]) -> float | None:
        """Return that distance extrapolated to infinitely many pictures; None if there are too few pictures."""
        return self._comparison.frechet_unbiased(features(pictures))

    def separable(self, pictures: Sequence[Pixels]) -> float:
        """Return the accuracy of a classifier that separates pictures from held-out real ones.

        Both are rounded to the 17 pixel values of the data. Otherwise a background that is off by 1 in 255, which is
        invisible, would separate every picture that was not rounded by the scanner.
        """
        return self._comparison.separable(features([seventeen_values(picture) for picture in pictures]))

    def nearest_ratio(self, pictures: Sequence[Pixels]) -> float | None:
        """Return the mean distance to the nearest training picture, over that of held-out pictures."""
        return self._comparison.nearest_ratio(features(pictures))


def seventeen_values(picture: Pixels) -> Pixels:
    """Round pixel values 0 to 255 to the multiples of 255 / 16 that the data has; real digits do not change."""
    rounded: Pixels = np.rint(np.rint(picture * (16 / 255)) * (255 / 16)).astype(np.uint8)
    return rounded


def features(pictures: Sequence[Pixels]) -> Features:
    """Convert pictures to features [n, d]: their pixel values, from 0 to 1."""
    return np.stack(pictures).reshape(len(pictures), -1) / 255


def digits_by_class(task: Task, pictures: Sequence[Pixels], truths: Sequence[Truth]) -> dict[int, list[Pixels]]:
    """Return the digits [8, 8] that pictures show where their captions name one, by the digit that captions name."""
    classes: dict[int, list[Pixels]] = defaultdict(list)
    for picture, objects in zip(pictures, truths, strict=True):
        expected = {thing.place: thing.digit for thing in objects}
        for mark in task.find(picture) or []:
            if mark.place in expected:
                classes[expected[mark.place]].append(mark.grey)
    return dict(sorted(classes.items()))
