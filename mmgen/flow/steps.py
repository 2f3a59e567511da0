"""What solvers are made of: the type of a solver, its noise, and the affine step that most of them take."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Protocol

import torch
from torch import Tensor

from mmgen.flow.grid import AffineSteps, Coefficient, Grid

Solver = Generator[tuple[Tensor, Tensor], Tensor, Tensor]
"""Yields (z, t), is sent a velocity or a denoised estimate, and returns z at the last time."""
Noise = Callable[[Tensor], Tensor]
"""Makes standard normal numbers in the shape of its argument."""


class Correction(Protocol):
    """Moves z at time i of a grid, between two steps."""

    def __call__(self, z: Tensor, i: int) -> Solver: ...


def normal(generator: torch.Generator | None = None) -> Noise:
    """Standard normal noise from one generator (of torch by default)."""

    def draw(z: Tensor) -> Tensor:
        # What torch.randn gives, in half its time for the few numbers of a small state.
        return torch.empty_like(z, memory_format=torch.contiguous_format).normal_(generator=generator)

    return draw


def add(z: Tensor, coefficient: Coefficient, value: Tensor) -> Tensor:
    """z + coefficient * value, with a number in one pass over memory."""
    if isinstance(coefficient, Tensor):
        return torch.addcmul(z, coefficient, value)
    return torch.add(z, value, alpha=coefficient)


def add_to(z: Tensor, coefficient: Coefficient, value: Tensor) -> Tensor:
    """As `add`, into z, which no other code may hold."""
    return z.addcmul_(coefficient, value) if isinstance(coefficient, Tensor) else z.add_(value, alpha=coefficient)


def add_noise(z: Tensor, coefficient: Coefficient, noise: Noise) -> Tensor:
    """z + coefficient * noise, into z, which no other code may hold."""
    n = noise(z)
    if n.shape != z.shape:
        raise ValueError(
            f"the noise has the shape {tuple(n.shape)}, the state {tuple(z.shape)}: draw one like the other"
        )
    return add_to(z, coefficient, n)


def take(z: Tensor, grid: Grid, steps: AffineSteps, noise: Noise, correct: Correction | None = None) -> Solver:
    """Affine steps along a grid, each but the last followed by `correct` where it is given."""
    t = grid.starts().unbind()
    p, q, s = grid.send(steps.by_answer), grid.send(steps.by_z), grid.send(steps.std)
    noisy = (steps.std > 0).flatten(1).any(1).tolist()
    for i in range(grid.steps):
        answer = yield z, t[i]
        z = add_to(q[i] * z, p[i], answer)
        if noisy[i]:
            z = add_noise(z, s[i], noise)
        if correct is not None and i < grid.steps - 1:
            z = yield from correct(z, i + 1)
    return z
