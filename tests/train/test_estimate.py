"""Intervals of losses over documents: they cover the truth, and agree with the bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from mmgen.train.estimate import Estimate, estimate, moments


def ratios(rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
    """Loss sums and numbers of terms of documents: longer ones are harder, and the terms of one are not independent."""
    n = rng.integers(1, 30, size=count)
    s = n * (0.5 + 0.02 * n + rng.gamma(2.0, 0.3, size=count))
    return torch.from_numpy(s)[:, None], torch.from_numpy(n)[:, None]


@pytest.mark.parametrize("count", [60, 400])
def test_intervals_cover_the_truth(count: int) -> None:
    n = np.arange(1, 30)
    truth = float((n * (0.5 + 0.02 * n + 0.6)).sum() / n.sum())
    rng = np.random.default_rng(0)
    found = [estimate(moments(*ratios(rng, count))[:, 0]) for _ in range(2000)]
    covered = np.mean([e.low <= truth <= e.high for e in found])
    assert 0.93 <= covered <= 0.97


def test_an_interval_is_that_of_the_bootstrap() -> None:
    s, n = ratios(np.random.default_rng(3), 150)
    found = estimate(moments(s, n)[:, 0])

    def ratio(s, n, axis):
        return s.sum(axis=axis) / n.sum(axis=axis)

    drawn = stats.bootstrap(
        (s[:, 0].numpy(), n[:, 0].numpy()), ratio, paired=True, n_resamples=4000, rng=np.random.default_rng(0)
    ).confidence_interval
    assert found.mean == pytest.approx(float(s.sum() / n.sum()), rel=1e-12)
    assert (found.low, found.high) == pytest.approx((drawn.low, drawn.high), abs=0.1 * (drawn.high - drawn.low))


def test_moments_add_up() -> None:
    s, n = ratios(np.random.default_rng(4), 90)
    whole, parts = moments(s, n), moments(s[:40], n[:40]) + moments(s[40:], n[40:])
    torch.testing.assert_close(whole, parts, rtol=1e-13, atol=0)
    assert estimate(moments(s[:0], n[:0])[:, 0]) is None
    assert estimate(moments(s[:1], n[:1])[:, 0]) == Estimate(pytest.approx(float(s[0] / n[0])), None, None)
