"""Samplers of flow time t for training, as quantile functions, and grids of times for sampling.

A quantile function takes a uniform number in [0, 1) and returns t. That lets a caller choose how the uniform
numbers are made: independent, or stratified over a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mmgen.flow.path import Path, check_times


def uniform(u: Tensor, mu: float, sigma: float) -> Tensor:
    """t uniform on [0, 1); `mu` and `sigma` play no part."""
    return u


def logit_normal(u: Tensor, mu: float, sigma: float) -> Tensor:
    """t = sigmoid(mu + sigma n), n standard normal (Esser et al. 2024, section 3.1)."""
    return torch.sigmoid(mu + sigma * torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)))


def constant(u: Tensor, mu: float, sigma: float) -> Tensor:
    """t = sigmoid(mu), always."""
    return torch.sigmoid(torch.full_like(u, mu))


TIMES: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "uniform": uniform,
    "logit_normal": logit_normal,
    "constant": constant,
}


def stratified(u: float, ordinal: float, count: int) -> float:
    """The `ordinal`-th of `count` uniform numbers that share one draw `u`: (u + ordinal / count) mod 1.

    Each is uniform on its own; together they fill the unit interval evenly (Kingma et al. 2021, appendix I).
    """
    return (u + ordinal / count) % 1.0


def discrete(u: Tensor, steps: int) -> Tensor:
    """t = 1 - k / K with k uniform on 1..K: the times at which a DDPM of K steps is trained."""
    if steps < 1 or steps != int(steps):
        raise ValueError(f"a DDPM has a whole number of steps, at least one, got {steps}")
    return 1 - ((u * steps).floor() + 1).clamp(max=steps) / steps


def shifted(t: Tensor, shift: float) -> Tensor:
    """t / (t + shift (1 - t)): more noise for `shift` above 1, as larger images need (Esser et al. 2024, eq. 23)."""
    if not 0 < shift < math.inf:
        raise ValueError(f"the time shift must be positive, got {shift}")
    check_times(t)
    return t / (t + shift * (1 - t))


def uniform_grid(steps: int) -> Tensor:
    """i / N for i = 0..N, in double precision; never summed up."""
    if steps < 1 or steps != int(steps):
        raise ValueError(f"a sampler needs a whole number of steps, at least one step, got {steps}")
    return torch.arange(steps + 1, dtype=torch.float64) / steps


def cosine_grid(steps: int) -> Tensor:
    """1 - cos(pi i / (2 N)): denser near the noise."""
    grid = 1 - (math.pi / 2 * uniform_grid(steps)).cos()
    grid[-1] = 1
    return grid


def shifted_grid(steps: int, shift: float) -> Tensor:
    """The uniform grid through `shifted`."""
    return shifted(uniform_grid(steps), shift)


def log_snr_grid(steps: int, path: Path, low: float, high: float) -> Tensor:
    """Times whose log-SNR on `path` rises evenly from `low` to `high`, then t = 1, the clean end."""
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"log-SNR must rise from one number to another: low {low}, high {high}")
    if steps < 2:
        raise ValueError(f"a grid in log-SNR needs two steps or more, the last of which reaches t = 1; got {steps}")
    inner = path.time_of(torch.linspace(low, high, steps, dtype=torch.float64))
    if bool((inner < 0).any()) or bool((inner >= 1).any()):
        raise ValueError(f"{type(path).__name__} does not reach log-SNR {low} to {high} inside t in [0, 1)")
    return torch.cat([inner, torch.ones(1, dtype=torch.float64)])
