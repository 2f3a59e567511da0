"""Metrics of pictures drawn for captions: each one is a function of `Drawn` and a line in `METRICS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mmgen.evaluate.distances import within_class_variance
from mmgen.evaluate.features import Real, digits_by_class, features
from mmgen.evaluate.judge import Judge
from mmgen.evaluate.tasks import Pixels, Truth


@dataclass(frozen=True)
class Drawn:
    """Pictures, the objects that each should show, and the real pictures and the judge that they are scored with."""

    pictures: Sequence[Pixels]
    wanted: Sequence[Truth]
    real: Real
    judge: Judge

    @cached_property
    def shown(self) -> list[Truth | None]:
        """The objects that the judge reads in each picture, or None for a picture that it cannot read."""
        return self.judge.read(self.pictures)


Metric = Callable[[Drawn], float | None]
"""Returns a score, or None if there are too few pictures to compute it."""


def agreement(read_back: Sequence[Truth | None], wanted: Sequence[Truth]) -> float:
    """Return the share of pictures (or captions) that name exactly the wanted objects, with every attribute right."""
    return float(np.mean([a == b for a, b in zip(read_back, wanted, strict=True)]))


def accuracy(drawn: Drawn) -> float:
    """Share of pictures in which the judge reads exactly what the caption names; higher is better."""
    return agreement(drawn.shown, drawn.wanted)


def frechet_distance(drawn: Drawn) -> float:
    """Fréchet distance to real held-out pictures, in pixels; lower is better."""
    return drawn.real.frechet(drawn.pictures)


def unbiased_frechet_distance(drawn: Drawn) -> float | None:
    """Fréchet distance extrapolated to infinitely many pictures; lower is better, 0 for equal distributions."""
    return drawn.real.frechet_unbiased(drawn.pictures)


def variance_ratio(drawn: Drawn) -> float:
    """Variance of digits inside each class, over that of real digits; 1 is best, low values show little variety."""
    digits = digits_by_class(drawn.real.task, drawn.pictures, drawn.wanted)
    variance = within_class_variance({k: features(v) for k, v in digits.items()}) if digits else 0.0
    return variance / drawn.real.variance


def separability(drawn: Drawn) -> float:
    """Accuracy of a classifier that separates drawn from real held-out pictures; lower is better, 0.5 is chance."""
    return drawn.real.separable(drawn.pictures)


def nearest_ratio(drawn: Drawn) -> float | None:
    """Mean distance to the nearest training picture, over that of real held-out pictures; low values show copying."""
    return drawn.real.nearest_ratio(drawn.pictures)


METRICS: dict[str, Metric] = {
    "t2i_accuracy": accuracy,
    "fd_pixel": frechet_distance,
    "fd_pixel_unbiased": unbiased_frechet_distance,
    "within_class_variance_ratio": variance_ratio,
    "two_sample_accuracy": separability,
    "nn_distance_ratio": nearest_ratio,
}
"""The metrics of a model and its baselines, by their keys in `report.json`."""

Scores = dict[str, float | None]


def score(drawn: Drawn) -> Scores:
    """Compute every metric."""
    return {name: metric(drawn) for name, metric in METRICS.items()}
