"""Solvers that use Langevin steps at a fixed time, alone or between the steps of another solver."""

from __future__ import annotations

import torch
from torch import Tensor

from mmgen.flow.grid import Grid
from mmgen.flow.path import Path
from mmgen.flow.schedule import LinearPath, VEPath
from mmgen.flow.steps import Noise, Solver, add_noise, add_to, normal, take


class Corrector:
    """Applies `count` Langevin steps z + h score + sqrt(2 h) n at a time of a grid.

    The score follows from the denoised estimate x. Song et al. 2021 (algorithm 5) choose h = 2 (snr |n| / |score|)^2.
    Here |score| is replaced by its size given x, |n| / sigma. The resulting h = 2 (snr sigma)^2 contains no norm, which
    might vanish.

    Samples at the data are not corrected. With `after_step`, samples that the predictor's step did not move, or brought
    to their last time, are not corrected either.

    Raises:
        ValueError: a negative count, or `snr` outside (0, 1).
    """

    def __init__(self, grid: Grid, noise: Noise | None, snr: float, count: int, after_step: bool = False) -> None:
        if count < 0:
            raise ValueError(f"the number of Langevin corrections cannot be negative, got {count}")
        if not 0 < snr < 1:
            raise ValueError(f"the signal-to-noise ratio of Langevin steps must lie in (0, 1), got {snr}")
        there = grid.t == 1
        if after_step:
            there = there | (grid.t == grid.t[-1]) | torch.cat([grid.still[:1], grid.still])
        self.count, self.noise, self.t = count, noise or normal(), grid.yielded(grid.t, there).unbind()
        pull = torch.where(there, 0 * grid.t, 2 * snr**2)
        self.keep, self.pull = grid.send(1 - pull), grid.send(pull * grid.path.alpha(grid.t))
        self.spread = grid.send(torch.where(there, 0.0, 2 * snr * grid.path.sigma(grid.t)))

    def __call__(self, z: Tensor, i: int) -> Solver:
        """Correct z at time i of the grid."""
        for _ in range(self.count):
            x = yield z, self.t[i]
            z = add_noise(add_to(self.keep[i] * z, self.pull[i], x), self.spread[i], self.noise)
        return z


def langevin(
    z: Tensor, times: Tensor, *, path: Path | None = None, noise: Noise | None = None, snr: float = 0.16, steps: int = 1
) -> Solver:
    """Langevin steps at one time, which leave the marginal of that time unchanged up to O(snr^2).

    Requests the denoised estimate. It does not move from noise to data.

    Args:
        z: [R, ...], a state at `times[0]`.
        times: a tensor with at least one axis; only `times[0]` is used.
        path: `LinearPath()` by default.
        noise: standard normal by default.
        snr: signal-to-noise ratio of a step, in (0, 1); the step size is 2 (snr sigma)^2.
        steps: number of steps.

    Raises:
        ValueError: no step, `snr` outside (0, 1), a scalar `times`, or a time at which the score diverges.
    """
    path = path or LinearPath()
    if steps < 1:
        raise ValueError(f"langevin needs at least one step, got {steps}")
    times = torch.as_tensor(times)
    if not times.ndim:
        raise ValueError("times must be a list; langevin uses its first entry, as in torch.tensor([0.5])")
    grid = Grid(z, torch.stack([times[0]] * 2), path)
    path.require("score", grid.t[0])
    return (yield from Corrector(grid, noise, snr, steps)(z, 0))


def predictor_corrector(
    z: Tensor,
    times: Tensor,
    *,
    path: Path | None = None,
    noise: Noise | None = None,
    corrections: int = 1,
    snr: float = 0.16,
    eta: float = 1.0,
) -> Solver:
    """Predictor-corrector sampling: each DDIM step is followed by Langevin steps at the new time.

    Source: Song et al. 2021, algorithm 1. Requests the denoised estimate and ends on it at t = 1. The last step has no
    correction.

    Args:
        z: the initial state, [R, ...].
        times: [N + 1] or [N + 1, R], rising.
        path: `LinearPath()` by default.
        noise: standard normal by default.
        corrections: Langevin steps after each predictor step.
        snr: signal-to-noise ratio of a Langevin step, in (0, 1).
        eta: noise of the DDIM step, in [0, 1].

    Raises:
        ValueError: times that do not fit, or `corrections`, `snr` or `eta` out of range.
    """
    grid = Grid(z, times, path or LinearPath())
    correct = Corrector(grid, noise, snr, corrections, after_step=True)
    return (yield from take(z, grid, grid.ddim(eta), noise or normal(), correct))


def annealed_langevin(
    z: Tensor,
    times: Tensor,
    *,
    path: Path | None = None,
    noise: Noise | None = None,
    corrections: int = 10,
    snr: float = 0.2,
) -> Solver:
    """Annealed Langevin dynamics: only Langevin steps, at every time of the grid except the last.

    Source: Song and Ermon 2019, algorithm 1. Requests the denoised estimate and ends on it. The path must have
    alpha = 1, because z is not rescaled between noise levels.

    Args:
        z: the initial state, [R, ...], with standard deviation sigma at `times[0]`.
        times: [N + 1] or [N + 1, R], rising.
        path: `VEPath()` by default.
        noise: standard normal by default.
        corrections: Langevin steps at each time.
        snr: signal-to-noise ratio of a Langevin step, in (0, 1).

    Raises:
        ValueError: a path whose alpha is not 1, times that do not fit, or `corrections` or `snr` out of range.
    """
    path = path or VEPath()
    grid = Grid(z, times, path)
    if bool((path.alpha(grid.t) != 1).any()):
        raise ValueError(f"annealed_langevin needs a path with alpha = 1, such as VEPath, not {type(path).__name__}")
    correct = Corrector(grid, noise, snr, corrections)
    for i in range(grid.steps):
        z = yield from correct(z, i)
    return (yield z, correct.t[grid.steps - 1])
