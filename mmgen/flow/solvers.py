"""Solvers as generators: each yields (z, t), is sent what it asks for there, and returns z at the last time.

Because a solver only asks, a caller can batch the questions of many solvers, interleave them with other work, or
stop between any two; `solve` is the small driver for a plain function. A solver asks for the velocity v or for the
denoised estimate E[x | z], as `SOLVERS[name].asks` says. A new solver is a function, in a file of its own if it is
long, and a line in `SOLVERS`.

Times rise from noise (0) to data (1) and are either [N + 1], or [N + 1, R] for a grid per row of z. All coefficients
are computed once, in double precision, from the times (`mmgen.flow.grid`); a step is a few passes over z and never
waits for the device.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from mmgen.flow.grid import AffineSteps, Grid
from mmgen.flow.langevin import annealed_langevin, langevin, predictor_corrector
from mmgen.flow.path import Path
from mmgen.flow.schedule import LinearPath
from mmgen.flow.steps import Noise, Solver, add, add_to, normal, take

Level = Callable[[Path, Tensor], Tensor]
"""Noise rate w of an SDE at time t of a path."""


def _check_end(end: str) -> None:
    if end not in ("clean", "full"):
        raise ValueError(f"unknown end '{end}' (one of: clean, full)")


# Rows of the coefficients a_ij, and the weights b_j, of explicit Runge-Kutta schemes (Hairer, Norsett and Wanner).
TABLEAUX: dict[str, tuple[Sequence[Sequence[float]], Sequence[float]]] = {
    "euler": ([[]], [1.0]),
    "midpoint": ([[], [0.5]], [0.0, 1.0]),
    "heun": ([[], [1.0]], [0.5, 0.5]),
    "rk4": ([[], [0.5], [0.0, 0.5], [0.0, 0.0, 1.0]], [1 / 6, 1 / 3, 1 / 3, 1 / 6]),
}


def runge_kutta(
    z: Tensor, times: Tensor, *, scheme: str = "heun", path: Path | None = None, end: str = "clean"
) -> Solver:
    """An explicit Runge-Kutta scheme for dz/dt = v. Asks for v; times may also fall, from data to noise.

    `end`: `clean` replaces the last step, to t = 1, by the clean estimate, for fields that are singular at the data (on
    the linear path that is Euler's step); `full` runs the scheme to the last time, whatever it is.
    """
    path = path or LinearPath()
    _check_end(end)
    if scheme not in TABLEAUX:
        raise ValueError(f"unknown scheme '{scheme}' (one of: {', '.join(TABLEAUX)})")
    stages, weights = TABLEAUX[scheme]
    grid = Grid(z, times, path, rising=end == "clean")
    jumps = grid.arriving if end == "clean" else torch.zeros_like(grid.still)
    clean = grid.to_clean() if end == "clean" else None
    all_jump = jumps.flatten(1).all(1).tolist()
    some_jump = jumps.flatten(1).any(1).tolist()
    # A stage at the end of a step stands at the next time itself, not at a sum that rounds to its neighbour. Rows that
    # jump to the clean estimate are asked once: their later stages only fill the batch.
    nodes = [sum(row) for row in stages]
    stage_times = [grid.t[1:] if node == 1 else grid.t[:-1] + node * grid.gaps for node in nodes]
    stage_times = [
        torch.where(jumps, grid.t[:-1], asked) if node else asked
        for node, asked in zip(nodes, stage_times, strict=True)
    ]
    for asked in stage_times:
        path.require("v", asked[~grid.still] if grid.resting else asked)
    clean_parts = [grid.send(part) for part in clean or ()]
    h = grid.send(torch.where(jumps, 0.0, grid.gaps))
    asked_times = [grid.ask(asked, grid.still).unbind() for asked in stage_times]
    for i in range(grid.steps):
        start, slopes = z, list[Tensor]()
        for row, at in zip(stages[:1] if all_jump[i] else stages, asked_times, strict=False):
            here = start
            for a, slope in zip(row, slopes, strict=True):
                here = add(here, a * h[i], slope) if a else here
            slopes.append((yield here, at[i]))
        if some_jump[i]:  # rows that do not jump have p = 0 and q = 1 here
            p, q = (part[i] for part in clean_parts)
            z = add_to(q * start, p, slopes[0])
        if not all_jump[i]:
            for b, slope in zip(weights, slopes, strict=True):
                z = add(z, b * h[i], slope) if b else z
    return z


def ddim(z: Tensor, times: Tensor, *, path: Path | None = None, noise: Noise | None = None, eta: float = 0.0) -> Solver:
    """DDIM (Song et al. 2020, eq. 12): z_j = alpha_j x + sqrt(sigma_j^2 - s^2) eps + s n, s = eta * ancestral std.

    Asks for the denoised estimate and ends on it at t = 1. eta = 0 is deterministic; eta = 1 samples as `ancestral`
    does.
    """
    grid = Grid(z, times, path or LinearPath())
    return (yield from take(z, grid, grid.ddim(eta), noise or normal()))


def ancestral(z: Tensor, times: Tensor, *, path: Path | None = None, noise: Noise | None = None) -> Solver:
    """DDPM's solver on any path and grid: a draw from q(z_j | z_k, x) at the denoised estimate (Ho et al. 2020).

    With c = 1 - exp(log-SNR_k - log-SNR_j): mean = alpha_j (z (1 - c) / alpha_k + c x), variance c sigma_j^2
    (Kingma et al. 2021, appendix A.4). Asks for the denoised estimate and ends on it at t = 1.
    """
    grid = Grid(z, times, path or LinearPath())
    level = grid.levels()
    # (1 - c) alpha_j / alpha_k, written so that it is also right where alpha_k is zero.
    by_z = level.alpha_k * level.sigma_j.square() / (level.alpha_j * level.sigma_k.square())
    by_x = (1 - level.kept).clamp(min=0) * level.alpha_j
    return (yield from take(z, grid, AffineSteps(by_x, by_z, level.std), noise or normal()))


def dpmpp_2m(z: Tensor, times: Tensor, *, path: Path | None = None) -> Solver:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order in half log-SNR, one evaluation per step.

    Asks for the denoised estimate and ends on it at t = 1. That step and the first are of first order, and so is the
    second where the first began at pure noise, infinitely far away.
    """
    grid = Grid(z, times, path or LinearPath())
    level = grid.levels()
    kept = level.kept
    h = -kept.log() / 2  # of half log-SNR; infinite from pure noise and to clean data
    ratio = torch.zeros_like(h)  # 1 / (2 r), r the last gap over this one
    ratio[1:] = h[1:] / (2 * h[:-1])
    ratio = torch.where(ratio.isfinite(), ratio, 0.0)
    by_x = level.alpha_j * (1 - kept.sqrt())
    t, q = grid.starts().unbind(), grid.send(level.sigma_j / level.sigma_k)
    p, back = grid.send(by_x * (1 + ratio)), grid.send(-by_x * ratio)  # by_x (x + ratio (x - before))
    before: Tensor | None = None
    for i in range(grid.steps):
        x = yield z, t[i]
        z = add_to(q[i] * z, p[i], x)
        if before is not None:
            z = add_to(z, back[i], before)
        before = x
    return z


LEVELS: dict[str, Level] = {
    "ode": lambda path, t: torch.zeros_like(t),
    "sde": lambda path, t: path.diffusion(t),
    "constant": lambda path, t: torch.ones_like(t),
    "sigma": lambda path, t: path.sigma(t),
}
"""Noise rates w(t) by name: none, the time-reversed noising SDE's own g(t), 1, and sigma(t)."""


def euler_maruyama(
    z: Tensor,
    times: Tensor,
    *,
    path: Path | None = None,
    noise: Noise | None = None,
    level: str | Level = "sigma",
    end: str = "clean",
) -> Solver:
    """dz = (v + w^2 score / 2) dt + w dW for any w(t) >= 0: all members share the marginals of the path.

    Asks for v. `level` names w or is a function of (path, t); `end` as in `runge_kutta`. Weak order 1. With w = g this
    is the reverse SDE of Song et al. 2021, eq. 6; the family is that of Albergo et al. 2023, section 2.4.
    """
    path = path or LinearPath()
    _check_end(end)
    grid = Grid(z, times, path)
    if isinstance(level, str):
        if level not in LEVELS:
            raise ValueError(f"unknown level '{level}' (one of: {', '.join(LEVELS)}; or a function of path and t)")
        level = LEVELS[level]
    if not callable(level):
        raise ValueError(f"a level is a name ({', '.join(LEVELS)}) or a function of path and t, not {level!r}")
    h, start = grid.gaps, grid.t[:-1]
    if grid.resting:
        start = torch.where(grid.still, 0.5, start)  # the coefficients of a row that rests are multiplied by zero
    w = torch.as_tensor(level(path, start), dtype=start.dtype)
    if w.shape not in (start.shape, ()) or not bool((w >= 0).all()):
        raise ValueError(f"a level answers {tuple(start.shape)} times with as many rates, none negative; got {w}")
    by_v, by_z = path.coefficients("v", "score", start, clip=0.0)
    half = w.square() / 2
    p, q, s = h * (1 + half * by_v), 1 + h * half * by_z, h.sqrt() * w
    if end == "clean":
        jumps, clean = grid.arriving, grid.to_clean()
        p, q, s = torch.where(jumps, clean[0], p), torch.where(jumps, clean[1], q), torch.where(jumps, 0.0, s)
    return (yield from take(z, grid, AffineSteps(p, q, s), noise or normal()))


@dataclass(frozen=True)
class SolverKind:
    """A solver and what it needs."""

    make: Callable[..., Solver]
    asks: str
    """What is sent to it: `v` or `x`."""
    stochastic: bool = False
    from_noise: bool = True
    """Goes all the way from noise to data."""


SOLVERS: dict[str, SolverKind] = {
    **{name: SolverKind(partial(runge_kutta, scheme=name), "v") for name in TABLEAUX},
    "euler_maruyama": SolverKind(euler_maruyama, "v", stochastic=True),
    "ancestral": SolverKind(ancestral, "x", stochastic=True),
    "ddim": SolverKind(ddim, "x", stochastic=True),
    "dpmpp_2m": SolverKind(dpmpp_2m, "x"),
    "predictor_corrector": SolverKind(predictor_corrector, "x", stochastic=True),
    "annealed_langevin": SolverKind(annealed_langevin, "x", stochastic=True),
    "langevin": SolverKind(langevin, "x", stochastic=True, from_noise=False),
}


@cache
def _options(name: str) -> frozenset[str]:
    """The options that a solver's function takes; looked up once, for that costs as much as some steps."""
    given = {"z", "times", "path", "noise", "scheme"}
    return frozenset(inspect.signature(SOLVERS[name].make).parameters) - given


def build_solver(name: str, z: Tensor, times: Tensor, path: Path, noise: Noise | None = None, **options: Any) -> Solver:
    """The solver `name`, ready to be driven; options are those of its function.

    A solver is a generator: values that do not fit it are refused at its first question.

    Raises:
        ValueError: an unknown solver or an option it does not have.
    """
    if name not in SOLVERS:
        raise ValueError(f"unknown solver '{name}' (one of: {', '.join(SOLVERS)})")
    kind, known = SOLVERS[name], _options(name)
    for option in options:
        if option not in known:
            why = "" if kind.stochastic else " (it is deterministic)"
            raise ValueError(
                f"solver '{name}'{why} has no option '{option}' (it has: {', '.join(sorted(known)) or 'none'})"
            )
    if kind.stochastic:
        options["noise"] = noise
    return kind.make(z, times, path=path, **options)


def solve(solver: Solver, field: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Drive `solver` with `field(z, t)`, a velocity or a denoised estimate as it asks, and return its result."""
    try:
        z, t = next(solver)
        while True:
            found = field(z, t)
            if found.shape != z.shape:
                raise ValueError(f"the field answered {tuple(found.shape)} to a question of {tuple(z.shape)}")
            z, t = solver.send(found)
    except StopIteration as stop:
        result: Tensor = stop.value
        return result
