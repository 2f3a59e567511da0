"""Scores of captions as words, and the intervals of shares and means."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from scipy.stats import binomtest

from mmgen.train.estimate import COVERAGE, Estimate, estimate, moments


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())


def exact(written: Sequence[str], wanted: Sequence[str]) -> Estimate:
    """The share of captions with exactly the wanted words, and its 95% Wilson interval."""
    return share([words(a) == words(b) for a, b in zip(written, wanted, strict=True)])


def f1(written: str, wanted: str) -> float:
    """Harmonic mean of the precision and recall of words, each counted as often as it occurs (SQuAD's F1)."""
    a, b = Counter(words(written)), Counter(words(wanted))
    common = (a & b).total()
    return 2 * common / (a.total() + b.total()) if common else float(a == b)


def mean_f1(written: Sequence[str], wanted: Sequence[str]) -> Estimate:
    """The mean `f1` of captions, and its 95% interval."""
    return mean([f1(a, b) for a, b in zip(written, wanted, strict=True)])


def share(right: Sequence[bool]) -> Estimate:
    """The share of true values, and its 95% Wilson interval.

    Raises:
        ValueError: there are no values.
    """
    if not len(right):
        raise ValueError("a share of nothing is not defined")
    count = int(np.sum(right))
    bounds = binomtest(count, len(right)).proportion_ci(COVERAGE, method="wilson")
    return Estimate(count / len(right), float(bounds.low), float(bounds.high))


def mean(values: Sequence[float]) -> Estimate:
    """The mean of independent values, and its 95% interval of Student's t distribution.

    Raises:
        ValueError: there are no values.
    """
    sums = torch.tensor([[value] for value in values], dtype=torch.float64).reshape(-1, 1)
    found = estimate(moments(sums, torch.ones_like(sums))[:, 0])
    if found is None:
        raise ValueError("a mean of nothing is not defined")
    return found
