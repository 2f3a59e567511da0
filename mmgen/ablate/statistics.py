"""Statistics over seeds: intervals, differences paired by seed, and the smallest difference that seeds can show."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeGuard

from scipy import stats
from scipy.integrate import quad
from scipy.optimize import brentq

LEVEL = 0.05
"""Two-sided error rate of a test, so intervals are of 95 %."""
POWER = 0.8
"""Probability with which a test finds the smallest detectable difference."""


@dataclass(frozen=True)
class Interval:
    """Mean over seeds and half-width of its 95% interval; the half-width of a single seed is None."""

    mean: float
    half_width: float | None


@dataclass(frozen=True)
class Intervals:
    """Means and half-widths of a list of numbers, one interval per element."""

    mean: list[float]
    half_width: list[float | None]

    def at(self, index: int) -> Interval:
        """Return the interval of one element."""
        return Interval(self.mean[index], self.half_width[index])


@dataclass(frozen=True)
class Difference(Interval):
    """Mean difference from the baseline over pairs of runs with the same seed, and its interval."""

    detectable: float | None
    """The smallest difference that a paired t-test with these seeds finds with a probability of 80 %, from the standard
    deviation of these pairs; None for a single seed."""


@dataclass(frozen=True)
class Differences:
    """The differences of an arm from its baseline."""

    baseline: str
    scores: dict[str, Difference]


Report = Mapping[str, object]
"""The contents of the `report.json` of one run."""


def summary(reports: Sequence[Report]) -> dict[str, Interval | Intervals]:
    """Return the interval over runs of every number, or list of numbers, that all of them report."""
    result: dict[str, Interval | Intervals] = {}
    for key in reports[0]:
        values = [run.get(key) for run in reports]
        numbers = _numbers(key, reports)
        lists = [value for value in values if isinstance(value, list) and value and all(map(_number, value))]
        if numbers is not None:
            result[key] = interval(numbers)
        elif len(lists) == len(values):
            result[key] = intervals(lists)
    return result


def differences(reports: Sequence[Report], baseline: Sequence[Report]) -> dict[str, Difference]:
    """Return the paired difference of every number that all runs report; run i of both has the same seed."""
    found: dict[str, Difference] = {}
    for key in reports[0]:
        ours, theirs = _numbers(key, reports), _numbers(key, baseline)
        if ours is not None and theirs is not None:
            found[key] = difference(ours, theirs)
    return found


def _numbers(key: str, reports: Sequence[Report]) -> list[float] | None:
    values = [run.get(key) for run in reports]
    numbers = [value for value in values if _number(value)]
    return numbers if len(numbers) == len(values) else None


def _number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def interval(values: Sequence[float]) -> Interval:
    """Return the mean and the half-width of Student's 95% interval."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, None)
    return Interval(mean, float(stats.t.ppf(1 - LEVEL / 2, len(values) - 1)) * _standard_error(values))


def intervals(values: Sequence[Sequence[float]]) -> Intervals:
    """Return the interval of each element of lists of equal length."""
    each = [interval(column) for column in zip(*values, strict=True)]
    return Intervals([item.mean for item in each], [item.half_width for item in each])


def difference(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Return the paired difference of two lists of scores, whose elements i have the same seed."""
    pairs = [ours - theirs for ours, theirs in zip(values, baseline, strict=True)]
    found = interval(pairs)
    detectable = None if len(pairs) < 2 else detectable_shift(len(pairs)) * _standard_error(pairs)
    return Difference(found.mean, found.half_width, detectable)


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


@lru_cache
def detectable_shift(seeds: int) -> float:
    """The smallest detectable difference in standard errors of the mean difference of `seeds` pairs.

    It is the noncentrality at which the two-sided t-test of level 5 % rejects with a probability of 80 %
    (Cohen 1988, chapter 2). For many seeds it is 1.96 + 0.84; for two seeds it is 16.
    """
    degrees = seeds - 1
    bound = stats.t.ppf(1 - LEVEL / 2, degrees)

    def excess(shift: float) -> float:
        def rejected(share: float) -> float:
            """The power if the standard deviation of the pairs has this quantile of its distribution."""
            limit = bound * math.sqrt(stats.chi2.ppf(share, degrees) / degrees)
            return float(stats.norm.sf(limit - shift) + stats.norm.cdf(-limit - shift))

        return float(quad(rejected, 0.0, 1.0, limit=200)[0]) - POWER

    return float(brentq(excess, 0.0, 100.0))
