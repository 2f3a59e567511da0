"""Baselines: cheap generators that draw the same captions as a model, to compare its scores with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from mmgen.evaluate.features import Real, features
from mmgen.evaluate.tasks import Object, Pixels, Truth, resized

Grey = NDArray[np.generic]
Baseline = Callable[[list[Pixels], np.random.Generator], Grey]
"""Draws one digit [8, 8], pixel values 0 to 255, from the training digits of its class."""


def training_digit(digits: list[Pixels], rng: np.random.Generator) -> Grey:
    """A training digit without change: its scores are those of real pictures of the same captions."""
    return digits[int(rng.integers(len(digits)))]


def class_mean(digits: list[Pixels], rng: np.random.Generator) -> Grey:
    """The mean of the training digits of the class, plus Gaussian noise of standard deviation 16."""
    return np.asarray(np.mean(digits, 0)) + rng.normal(0, 16, digits[0].shape)


def noised_copy(digits: list[Pixels], rng: np.random.Generator) -> Grey:
    """A training digit of the class, plus Gaussian noise of standard deviation 16."""
    return digits[int(rng.integers(len(digits)))] + rng.normal(0, 16, digits[0].shape)


def mean_of_two(digits: list[Pixels], rng: np.random.Generator) -> Grey:
    """The mean of two training digits of the class."""
    one, two = rng.integers(len(digits), size=2)
    return (digits[int(one)].astype(float) + digits[int(two)]) / 2


def class_gaussian(digits: list[Pixels], rng: np.random.Generator) -> Grey:
    """A sample of the Gaussian fitted to the training digits of the class."""
    pixels = features(digits) * 255
    draw = rng.multivariate_normal(pixels.mean(0), np.cov(pixels, rowvar=False), method="eigh")
    return np.asarray(draw.reshape(digits[0].shape))


BASELINES: dict[str, Baseline] = {
    "class_mean_plus_noise": class_mean,
    "noised_training_image": noised_copy,
    "mean_of_two_training_images": mean_of_two,
    "class_gaussian": class_gaussian,
}


def draw_baseline(baseline: Baseline, wanted: Sequence[Truth], real: Real) -> list[Pixels]:
    """Draw one picture for each caption with a baseline; `wanted` holds the objects that each caption names."""
    rng = np.random.default_rng(0)

    def grey(thing: Object) -> Pixels:
        return np.clip(np.rint(baseline(real.digits[thing.digit], rng)), 0, 255).astype(np.uint8)

    ordered = [sorted(things, key=lambda thing: (thing.place or "", thing.digit)) for things in wanted]
    composed = (real.task.compose([(grey(thing), thing) for thing in things]) for things in ordered)
    return [resized(picture, real.size) for picture in composed]
