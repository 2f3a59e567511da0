"""Langevin corrections at one time of a path, alone and between the steps of another solver."""

from __future__ import annotations

import torch
from torch import Tensor

from mmgen.flow.grid import Grid
from mmgen.flow.path import Path
from mmgen.flow.schedule import LinearPath, VEPath
from mmgen.flow.steps import Noise, Solver, add_noise, add_to, normal, take


class Corrector:
    """Langevin steps z + h score + sqrt(2 h) n at the denoised estimate x, `count` of them at a time of a grid.

    Song et al. 2021 (algorithm 5) take h = 2 (snr |n| / |score|)^2. Here |score| is its size given x, |n| / sigma: then
    h = 2 (snr sigma)^2 needs no norm, which may vanish. Rows at the data stay, and so do those at the end of the step
    of a predictor (`after_step`) that did not move them or brought them to their last time.
    """

    def __init__(self, grid: Grid, noise: Noise | None, snr: float, count: int, after_step: bool = False) -> None:
        if count < 0:
            raise ValueError(f"the number of Langevin corrections cannot be negative, got {count}")
        if not 0 < snr < 1:
            raise ValueError(f"the signal-to-noise ratio of Langevin steps must lie in (0, 1), got {snr}")
        there = grid.t == 1
        if after_step:
            there = there | (grid.t == grid.t[-1]) | torch.cat([grid.still[:1], grid.still])
        self.count, self.noise, self.t = count, noise or normal(), grid.ask(grid.t, there).unbind()
        pull = torch.where(there, 0 * grid.t, 2 * snr**2)
        self.keep, self.pull = grid.send(1 - pull), grid.send(pull * grid.path.alpha(grid.t))
        self.spread = grid.send(torch.where(there, 0.0, 2 * snr * grid.path.sigma(grid.t)))

    def __call__(self, z: Tensor, i: int) -> Solver:
        """The corrections at time i."""
        for _ in range(self.count):
            x = yield z, self.t[i]
            z = add_noise(add_to(self.keep[i] * z, self.pull[i], x), self.spread[i], self.noise)
        return z


def langevin(
    z: Tensor, times: Tensor, *, path: Path | None = None, noise: Noise | None = None, snr: float = 0.16, steps: int = 1
) -> Solver:
    """`steps` Langevin corrections at the one time `times[0]`. Asks for the denoised estimate.

    Leaves the marginal as it is, up to O(snr^2).
    """
    path = path or LinearPath()
    if steps < 1:
        raise ValueError(f"langevin needs at least one step, got {steps}")
    times = torch.as_tensor(times)
    if not times.ndim:
        raise ValueError("times must be a list, of which langevin takes the first, as in torch.tensor([0.5])")
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
    """A DDIM(eta) step, then `corrections` Langevin steps at the new time (Song et al. 2021, algorithm 1).

    Asks for the denoised estimate and ends on it at t = 1. The last step gets no correction.
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
    """`corrections` Langevin steps at every time but the last, and nothing else (Song and Ermon 2019, algorithm 1).

    Asks for the denoised estimate; ends on it. Needs a path whose alpha stays 1, for nothing rescales z between levels.
    """
    path = path or VEPath()
    grid = Grid(z, times, path)
    if bool((path.alpha(grid.t) != 1).any()):
        raise ValueError(f"annealed_langevin needs a path with alpha = 1 (VEPath), not {type(path).__name__}")
    correct = Corrector(grid, noise, snr, corrections)
    for i in range(grid.steps):
        z = yield from correct(z, i)
    return (yield z, correct.t[grid.steps - 1])
