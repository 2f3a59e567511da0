"""Losses per term over documents, with intervals: from six sums, which add up over batches, ranks and sources.

Suffixes: D documents, C losses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.special import stdtrit
from torch import Tensor

COVERAGE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean per term, and its 95% interval; a single document has no interval."""

    mean: float
    low: float | None
    high: float | None

    def flat(self, name: str) -> dict[str, float]:
        """The values under the keys `name`, `name_low` and `name_high`."""
        bounds = {} if self.low is None or self.high is None else {f"{name}_low": self.low, f"{name}_high": self.high}
        return {name: self.mean, **bounds}


def moments(sums_DC: Tensor, counts_DC: Tensor) -> Tensor:
    """Six sums over documents [6, C], float64, from the loss sum and the number of terms of each document.

    They are the number of documents with terms, and the sums of s, n, s^2, s n and n^2.
    """
    s, n = sums_DC.double(), counts_DC.double()
    return torch.stack([(n > 0).double(), s, n, s * s, s * n, n * n]).sum(dim=1)


def estimate(moments_6: Tensor) -> Estimate | None:
    """The mean loss per term, R = sum s / sum n, and its interval over documents; None without terms.

    Documents are the sampling units: the terms of one document are not independent. The variance of the ratio is
    D / (D - 1) * sum (s_d - R n_d)^2 / (sum n)^2 (Cochran 1977, Sampling Techniques, section 6.4), and the interval
    uses Student's t distribution with D - 1 degrees of freedom.
    """
    documents, s, n, ss, sn, nn = moments_6.tolist()
    if not n:
        return None
    ratio = s / n
    if documents < 2:
        return Estimate(ratio, None, None)
    squares = max(0.0, ss - 2 * ratio * sn + ratio * ratio * nn)
    half = float(stdtrit(documents - 1, (1 + COVERAGE) / 2)) * math.sqrt(documents / (documents - 1) * squares) / n
    return Estimate(ratio, ratio - half, ratio + half)
