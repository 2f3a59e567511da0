"""Samplers on Gaussian data without a single draw: their mean and variance, exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mmgen.flow.path import Path
from mmgen.flow.solvers import SOLVERS, build_solver, solve


class Moments:
    """Gaussian data N(mean, std^2): the state of a sampler is its mean and the weights of all noises so far.

    Every sampler's step is affine in the state, so nothing is drawn and the moments at the end are exact.
    """

    def __init__(self, path: Path, mean: float = 0.7, std: float = 0.5) -> None:
        self.path, self.mean, self.std, self.used = path, mean, std, 1

    def noise(self, z: Tensor) -> Tensor:
        """A new unit direction."""
        self.used += 1
        return torch.nn.functional.one_hot(torch.tensor(self.used), len(z)).to(z)

    def field(self, kind: str) -> Callable[[Tensor, Tensor], Tensor]:
        """The exact estimate of `kind`, applied to mean and weights."""

        def estimate(z: Tensor, t: Tensor) -> Tensor:
            t = t.reshape(())
            alpha, sigma = self.path.alpha(t), self.path.sigma(t)
            gain = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
            x = gain * z
            x[0] += (1 - gain * alpha) * self.mean
            return x if kind == "x" else self.path.convert("x", kind, x, z, t, 0.0)

        return estimate

    def marginal(self, t: Tensor) -> tuple[float, float]:
        """(mean, variance) of z at time t of the path."""
        alpha, sigma = float(self.path.alpha(t)), float(self.path.sigma(t))
        return alpha * self.mean, alpha**2 * self.std**2 + sigma**2

    def states(self, name: str, times: Tensor, **options: Any) -> list[Tensor]:
        """The state at every question and at the end; the start has the marginal of the first time."""
        draws = 1 + options.get("corrections", options.get("steps", 1))
        z = torch.zeros(3 + draws * len(times), dtype=torch.float64)
        mean, variance = self.marginal(times[0])
        z[0], z[1], self.used = mean, variance**0.5, 1
        ask, seen = self.field(SOLVERS[name].asks), list[Tensor]()

        def noted(z: Tensor, t: Tensor) -> Tensor:
            seen.append(z)
            return ask(z, t)

        end = solve(build_solver(name, z, times, self.path, self.noise, **options), noted)
        return [*seen, end]

    def end(self, name: str, times: Tensor, **options: Any) -> tuple[float, float]:
        """(mean, variance) of the sampler's result."""
        return self.of(self.states(name, times, **options)[-1])

    @staticmethod
    def of(state: Tensor) -> tuple[float, float]:
        """(mean, variance) of a state."""
        return float(state[0]), float(state[1:].square().sum())

    def error(self, name: str, times: Tensor, **options: Any) -> float:
        """Larger of the errors of mean and variance at the last time."""
        pairs = zip(self.end(name, times, **options), self.marginal(times[-1]), strict=True)
        return max(abs(found - wanted) for found, wanted in pairs)


def slopes(errors: list[float]) -> list[float]:
    """log2 of successive ratios: the order, where each error belongs to half the step of the one before."""
    return [math.log2(a / b) for a, b in pairwise(errors)]
