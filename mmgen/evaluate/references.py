"""Real captioned pictures, the metrics of pictures against them, and baselines that draw captions without a model.

A metric is a function and a line in `METRICS`, a baseline a function and a line in `BASELINES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from mmgen.evaluate.distances import Comparison, Features, spread_ratio
from mmgen.evaluate.extractors import Extractor
from mmgen.evaluate.features import Pictures
from mmgen.evaluate.metrics import Scores
from mmgen.evaluate.words import f1

NEIGHBOURS = 1_000
"""Training captions that are searched for the nearest one."""
MIXED = 16
"""Training pictures of a mean."""


class References:
    """Real pictures of one size, which drawn pictures are compared with in the features of `extractor`."""

    def __init__(self, extractor: Extractor, train: Pictures, test: Pictures, n: int) -> None:
        self.train = train
        self._extractor = extractor
        self.comparison = Comparison(extractor(train.images), extractor(test.images), n)

    def scores(self, images: Sequence[Image.Image], captions: Sequence[str]) -> Scores:
        """Every metric of pictures for these captions; the captions are those of the held-out pictures, repeated."""
        drawn = self._extractor(images)
        return {name: metric(self.comparison, drawn, captions) for name, metric in METRICS.items()}


Metric = Callable[[Comparison, Features, Sequence[str]], float | None]
"""A score of pictures, from their features and captions; None if it cannot be computed."""


def frechet_distance(real: Comparison, drawn: Features, captions: Sequence[str]) -> float:
    """Fréchet distance to real held-out pictures; lower is better."""
    return real.frechet(drawn)


def unbiased_frechet_distance(real: Comparison, drawn: Features, captions: Sequence[str]) -> float | None:
    """Fréchet distance extrapolated to infinitely many pictures; lower is better, 0 for equal distributions."""
    return real.frechet_unbiased(drawn)


def kernel_distance(real: Comparison, drawn: Features, captions: Sequence[str]) -> float:
    """Kernel distance to real held-out pictures; lower is better, 0 for equal distributions."""
    return real.kernel(drawn)


def separability(real: Comparison, drawn: Features, captions: Sequence[str]) -> float:
    """Accuracy of a classifier that separates drawn from real held-out pictures; lower is better, 0.5 is chance."""
    return real.separable(drawn)


def nearest_ratio(real: Comparison, drawn: Features, captions: Sequence[str]) -> float | None:
    """Mean distance to the nearest training picture, over that of real held-out pictures; low values show copying."""
    return real.nearest_ratio(drawn)


def diversity_ratio(real: Comparison, drawn: Features, captions: Sequence[str]) -> float | None:
    """Variance among pictures of one caption, over that of real ones; 1 is best."""
    once = min(len(drawn), len(real.test))  # after them, the captions repeat
    return spread_ratio(drawn[:once], real.test[:once], captions[:once])


METRICS: dict[str, Metric] = {
    "fd": frechet_distance,
    "fd_unbiased": unbiased_frechet_distance,
    "kd": kernel_distance,
    "two_sample_accuracy": separability,
    "nn_distance_ratio": nearest_ratio,
    "diversity_ratio": diversity_ratio,
}

Baseline = Callable[[Pictures, str, np.random.Generator], Image.Image]
"""Draws a picture for a caption from the training pictures, without a model."""


def random_picture(train: Pictures, caption: str, rng: np.random.Generator) -> Image.Image:
    """A training picture of any caption."""
    return train.images[int(rng.integers(len(train.images)))]


def picture_of_nearest_caption(train: Pictures, caption: str, rng: np.random.Generator) -> Image.Image:
    """A training picture whose caption has the highest F1 of words: what a search would show."""
    some = rng.choice(len(train.samples), min(NEIGHBOURS, len(train.samples)), replace=False)
    scores = [f1(train.samples[i].caption, caption) for i in some]
    return train.images[int(some[int(np.argmax(scores))])]


def mean_picture(train: Pictures, caption: str, rng: np.random.Generator) -> Image.Image:
    """The mean of 16 training pictures."""
    some = rng.choice(len(train.pixels), min(MIXED, len(train.pixels)), replace=False)
    mean = np.mean([train.pixels[i] for i in some], axis=0)
    return Image.fromarray(np.rint(mean).astype(np.uint8))


BASELINES: dict[str, Baseline] = {
    "random_training_picture": random_picture,
    "picture_of_nearest_caption": picture_of_nearest_caption,
    "mean_of_training_pictures": mean_picture,
}
FLOOR = "picture_of_nearest_caption"
"""The baseline whose scores are the floor of distances: real pictures of nearly the same captions."""


def draw_baseline(baseline: Baseline, train: Pictures, captions: Sequence[str]) -> list[Image.Image]:
    """Draw one picture for each caption."""
    rng = np.random.default_rng(0)
    return [baseline(train, caption, rng) for caption in captions]
