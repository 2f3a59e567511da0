"""Parts of solvers: the solver type, the noise source, and the affine step that most solvers take."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Protocol

import torch
from torch import Tensor

from mmgen.flow.grid import AffineSteps, Coefficient, Grid

Solver = Generator[tuple[Tensor, Tensor], Tensor, Tensor]
"""A generator that yields (z, t), receives the velocity or the denoised estimate there, and returns the last z."""
Noise = Callable[[Tensor], Tensor]
"""Returns standard normal noise of the shape, type and device of its argument."""

Pull = Callable[[Tensor, Tensor], Tensor]
"""(z, t) to a gradient of the shape of z, in whose direction a stochastic step moves its mean."""


class Correction(Protocol):
    """Changes z at time i of a grid, between two steps."""

    def __call__(self, z: Tensor, i: int) -> Solver: ...


def normal(generator: torch.Generator | None = None) -> Noise:
    """Return a source of standard normal noise that uses `generator`, torch's default one if absent."""

    def draw(z: Tensor) -> Tensor:
        # The values of torch.randn, in half its time for a small state.
        return torch.empty_like(z, memory_format=torch.contiguous_format).normal_(generator=generator)

    return draw


def add(z: Tensor, coefficient: Coefficient, value: Tensor) -> Tensor:
    """Return z + coefficient * value, in one pass over memory."""
    if isinstance(coefficient, Tensor):
        return torch.addcmul(z, coefficient, value)
    return torch.add(z, value, alpha=coefficient)


def add_to(z: Tensor, coefficient: Coefficient, value: Tensor) -> Tensor:
    """As `add`, but in place: no other code may use z afterwards."""
    return z.addcmul_(coefficient, value) if isinstance(coefficient, Tensor) else z.add_(value, alpha=coefficient)


def add_noise(z: Tensor, coefficient: Coefficient, noise: Noise) -> Tensor:
    """Add coefficient * noise to z in place: no other code may use z afterwards.

    Raises:
        ValueError: noise of another shape than z.
    """
    n = noise(z)
    if n.shape != z.shape:
        raise ValueError(
            f"the noise has shape {tuple(n.shape)} but the state has shape {tuple(z.shape)}: they must be equal"
        )
    return add_to(z, coefficient, n)


def take(
    z: Tensor,
    grid: Grid,
    steps: AffineSteps,
    noise: Noise,
    correct: Correction | None = None,
    pull: Pull | None = None,
) -> Solver:
    """Take affine steps along a grid.

    `correct`, if given, follows every step except the last. `pull`, if given, moves the mean of every step with noise
    by its variance times the gradient at its start.
    """
    t = grid.starts().unbind()
    p, q, s = grid.send(steps.by_estimate), grid.send(steps.by_z), grid.send(steps.std)
    variance = grid.send(steps.std.square())
    noisy = (steps.std > 0).flatten(1).any(1).tolist()
    for i in range(grid.steps):
        estimate = yield z, t[i]
        gradient = pull(z, t[i]) if pull is not None and noisy[i] else None
        z = add_to(q[i] * z, p[i], estimate)
        if gradient is not None:
            if gradient.shape != z.shape:
                raise ValueError(
                    f"the gradient has shape {tuple(gradient.shape)} but the state has shape {tuple(z.shape)}: they "
                    "must be equal"
                )
            z = add_to(z, variance[i], gradient)
        if noisy[i]:
            z = add_noise(z, s[i], noise)
        if correct is not None and i < grid.steps - 1:
            z = yield from correct(z, i + 1)
    return z
