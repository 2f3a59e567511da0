"""Timestep distributions for training, as quantile functions, and time grids for solvers.

A quantile function maps a uniform number in [0, 1) to t. The caller therefore chooses how the uniform numbers are
drawn: independently, or stratified over a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mmgen.flow.path import Path, check_times


def uniform(u: Tensor, mu: float, sigma: float) -> Tensor:
    """t is uniform on [0, 1); `mu` and `sigma` are ignored."""
    return u


def logit_normal(u: Tensor, mu: float, sigma: float) -> Tensor:
    """t = sigmoid(mu + sigma n) with n standard normal.

    Source: Esser et al. 2024, section 3.1. `u` is any shape in [0, 1); the result has its shape. Larger `mu` means less
    noise.
    """
    return torch.sigmoid(mu + sigma * torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)))


def constant(u: Tensor, mu: float, sigma: float) -> Tensor:
    """t = sigmoid(mu) in every draw; `sigma` is ignored."""
    return torch.sigmoid(torch.full_like(u, mu))


TIMES: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "uniform": uniform,
    "logit_normal": logit_normal,
    "constant": constant,
}
"""Timestep distributions by name, each a quantile function (u, mu, sigma) to t of the shape of u."""


def stratified(u: float, ordinal: float, count: int) -> float:
    """Return the `ordinal`-th of `count` stratified uniform numbers: (u + ordinal / count) mod 1.

    All `count` numbers share the one draw `u`. Each is uniform on [0, 1), and together they cover the interval evenly
    (Kingma et al. 2021, appendix I).
    """
    return (u + ordinal / count) % 1.0


def discrete(u: Tensor, steps: int) -> Tensor:
    """Map uniform numbers to the times at which a DDPM of K steps is trained: t = 1 - k / K, k uniform on 1..K.

    Args:
        u: uniform numbers in [0, 1), any shape.
        steps: K.

    Returns:
        t, of the shape of `u`.

    Raises:
        ValueError: steps that are not a whole number above 0.
    """
    if steps < 1 or steps != int(steps):
        raise ValueError(f"a DDPM has a whole number of steps, at least one, got {steps}")
    return 1 - ((u * steps).floor() + 1).clamp(max=steps) / steps


def shifted(t: Tensor, shift: float) -> Tensor:
    """Shift times for the resolution: t / (t + shift (1 - t)) (Esser et al. 2024, eq. 23).

    Args:
        t: times in [0, 1], any shape.
        shift: above 1 moves times towards the noise, for larger images; 1 changes nothing.

    Returns:
        The shifted times, of the shape of `t`.

    Raises:
        ValueError: a shift that is not positive and finite, or times outside [0, 1].
    """
    if not 0 < shift < math.inf:
        raise ValueError(f"the time shift must be positive, got {shift}")
    check_times(t)
    return t / (t + shift * (1 - t))


def uniform_grid(steps: int) -> Tensor:
    """Return the times i / N for i = 0..N, [N + 1] in double precision.

    Each is a quotient, not a running sum, so the last is exactly 1.

    Raises:
        ValueError: steps that are not a whole number above 0.
    """
    if steps < 1 or steps != int(steps):
        raise ValueError(f"a solver needs a whole number of steps, at least one step, got {steps}")
    return torch.arange(steps + 1, dtype=torch.float64) / steps


def cosine_grid(steps: int) -> Tensor:
    """Return the times 1 - cos(pi i / (2 N)) for i = 0..N, [N + 1], which are denser near the noise."""
    grid = 1 - (math.pi / 2 * uniform_grid(steps)).cos()
    grid[-1] = 1
    return grid


def shifted_grid(steps: int, shift: float) -> Tensor:
    """Return the uniform grid after `shifted`, [N + 1]."""
    return shifted(uniform_grid(steps), shift)


def log_snr_grid(steps: int, path: Path, low: float, high: float) -> Tensor:
    """Return times whose log-SNR on `path` rises evenly from `low` to `high`, followed by t = 1, [N + 1].

    Args:
        steps: N, two or more; the last step goes from log-SNR `high` to t = 1.
        path: the path of the field.
        low: log-SNR of the first time, in nats.
        high: log-SNR of the last time before t = 1, in nats.

    Raises:
        ValueError: bounds that do not rise or that the path does not reach, or fewer than two steps.
    """
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"log-SNR must rise from one number to another: low {low}, high {high}")
    if steps < 2:
        raise ValueError(f"a grid in log-SNR needs two steps or more, because its last step goes to t = 1; got {steps}")
    inner = path.time_of(torch.linspace(low, high, steps, dtype=torch.float64))
    if bool((inner < 0).any()) or bool((inner >= 1).any()):
        raise ValueError(f"{type(path).__name__} does not reach log-SNR {low} to {high} inside t in [0, 1)")
    return torch.cat([inner, torch.ones(1, dtype=torch.float64)])
