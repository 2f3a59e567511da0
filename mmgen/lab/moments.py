"""The exact mean and variance of a solver's result on Gaussian data, without random draws."""

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
    """Propagates mean and variance through a solver, for Gaussian data N(mean, std^2).

    The state of the solver is a vector: the mean, and the weight of every noise so far. Every step is affine in the
    state, so the moments at the end are exact.
    """

    def __init__(self, path: Path, mean: float = 0.7, std: float = 0.5) -> None:
        self.path, self.mean, self.std, self.used = path, mean, std, 1

    def noise(self, z: Tensor) -> Tensor:
        """Return a new unit vector, which represents the next independent noise."""
        self.used += 1
        return torch.nn.functional.one_hot(torch.tensor(self.used), len(z)).to(z)

    def field(self, kind: str) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the exact estimate of `kind` as a function of (state, t)."""

        def estimate(z: Tensor, t: Tensor) -> Tensor:
            t = t.reshape(())
            alpha, sigma = self.path.alpha(t), self.path.sigma(t)
            gain = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
            x = gain * z
            x[0] += (1 - gain * alpha) * self.mean
            return x if kind == "x" else self.path.convert("x", kind, x, z, t, 0.0)

        return estimate

    def marginal(self, t: Tensor) -> tuple[float, float]:
        """Return (mean, variance) of z at time t of the path."""
        alpha, sigma = float(self.path.alpha(t)), float(self.path.sigma(t))
        return alpha * self.mean, alpha**2 * self.std**2 + sigma**2

    def states(self, name: str, times: Tensor, **options: Any) -> list[Tensor]:
        """Return the state at every evaluation and at the end, starting from the marginal at the first time."""
        draws = 1 + options.get("corrections", options.get("steps", 1))
        z = torch.zeros(3 + draws * len(times), dtype=torch.float64)
        mean, variance = self.marginal(times[0])
        z[0], z[1], self.used = mean, variance**0.5, 1
        estimate, seen = self.field(SOLVERS[name].asks), list[Tensor]()

        def recorded(z: Tensor, t: Tensor) -> Tensor:
            seen.append(z)
            return estimate(z, t)

        end = solve(build_solver(name, z, times, self.path, self.noise, **options), recorded)
        return [*seen, end]

    def end(self, name: str, times: Tensor, **options: Any) -> tuple[float, float]:
        """Return (mean, variance) of the solver's result."""
        return self.of(self.states(name, times, **options)[-1])

    @staticmethod
    def of(state: Tensor) -> tuple[float, float]:
        """Return (mean, variance) of a state."""
        return float(state[0]), float(state[1:].square().sum())

    def error(self, name: str, times: Tensor, **options: Any) -> float:
        """Return the larger of the errors of mean and variance at the last time."""
        pairs = zip(self.end(name, times, **options), self.marginal(times[-1]), strict=True)
        return max(abs(value - exact) for value, exact in pairs)


def slopes(errors: list[float]) -> list[float]:
    """Return log2 of the ratios of successive errors: the order of convergence if each step size halves the last."""
    return [math.log2(a / b) for a, b in pairwise(errors)]
