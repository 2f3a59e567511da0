"""Scores of pictures drawn for captions. A new metric is a function of `Drawn` and a line in `METRICS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mmgen.evaluate.distances import nearest_distance, within_class_variance
from mmgen.evaluate.features import Real, digits_by_class, rows
from mmgen.evaluate.judge import Judge
from mmgen.evaluate.tasks import Pixels, Truth


@dataclass(frozen=True)
class Drawn:
    """Pictures, what each should show, and what they are compared with."""

    pictures: Sequence[Pixels]
    wanted: Sequence[Truth]
    real: Real
    judge: Judge

    @cached_property
    def shown(self) -> list[Truth | None]:
        """What the judge sees in each picture, or None where it sees nothing certain."""
        return self.judge.read(self.pictures)


Metric = Callable[[Drawn], float | None]
"""A score, or None where there are too few pictures to tell."""


def agreement(read_back: Sequence[Truth | None], wanted: Sequence[Truth]) -> float:
    """Share of pictures (or captions) with every attribute right and nothing else."""
    return float(np.mean([a == b for a, b in zip(read_back, wanted, strict=True)]))


def accuracy(drawn: Drawn) -> float:
    """Share of pictures that show what their captions ask for."""
    return agreement(drawn.shown, drawn.wanted)


def variance_ratio(drawn: Drawn) -> float:
    """Variance inside each class of digits, over that of real digits."""
    digits = digits_by_class(drawn.real.task, drawn.pictures, drawn.wanted)
    variance = within_class_variance({k: rows(v) for k, v in digits.items()}) if digits else 0.0
    return variance / drawn.real.variance


def nearest_ratio(drawn: Drawn) -> float:
    """Mean distance to the nearest training picture, over that of real held-out pictures; low where it copies."""
    real = drawn.real
    return nearest_distance(rows(drawn.pictures[: real.n]), real.train_rows) / real.nearest


METRICS: dict[str, Metric] = {
    "t2i_accuracy": accuracy,
    "fd_pixel": lambda drawn: drawn.real.frechet(drawn.pictures),
    "fd_pixel_unbiased": lambda drawn: drawn.real.frechet_unbiased(drawn.pictures),
    "within_class_variance_ratio": variance_ratio,
    "two_sample_accuracy": lambda drawn: drawn.real.separable(drawn.pictures),
    "nn_distance_ratio": nearest_ratio,
}
"""What a model and its baselines are scored by, under the names in `report.json`."""

Scores = dict[str, float | None]


def score(drawn: Drawn) -> Scores:
    """Every metric."""
    return {name: metric(drawn) for name, metric in METRICS.items()}
