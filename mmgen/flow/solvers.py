"""Solvers as generators: each yields (z, t), receives the network's estimate there, and returns z at the last time.

A solver does not call the network itself. The caller can therefore batch the evaluations of many solvers, interleave
them with other work, or stop between any two. `solve` runs a solver with a plain function. A solver requests either the
velocity v or the denoised estimate E[x | z]; `SOLVERS[name].asks` is `"v"` or `"x"`.

Common arguments of all solvers:
    z: the initial state, [R, ...]; noise with standard deviation sigma at the first time. It is not modified.
    times: rising from noise (0) to data (1), [N + 1], or [N + 1, R] for a grid per sample. Times that repeat leave a
        sample unchanged.
    path: the path of the field; `LinearPath()` by default, unless noted.
    noise: the source of standard normal noise of a stochastic solver (`mmgen.flow.steps.normal`).

All coefficients are computed once from the times, in double precision (`mmgen.flow.grid`). A step is a few passes over
z and does not synchronise with the device. The generator checks its arguments when it is first advanced. A new solver
is a function and a line in `SOLVERS`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mmgen.flow.grid import AffineSteps, Grid
from mmgen.flow.langevin import annealed_langevin, langevin, predictor_corrector
from mmgen.flow.path import Path
from mmgen.flow.schedule import LinearPath
from mmgen.flow.steps import Noise, Pull, Solver, add, add_to, normal, take

Level = Callable[[Path, Tensor], Tensor]
"""(path, t) to the noise rate w(t) of an SDE."""


def _check_end(end: str) -> None:
    if end not in ("clean", "full"):
        raise ValueError(f"unknown end '{end}' (one of: clean, full)")


# The coefficients a_ij and the weights b_j of explicit Runge-Kutta schemes (Hairer, Norsett and Wanner).
TABLEAUX: dict[str, tuple[Sequence[Sequence[float]], Sequence[float]]] = {
    "euler": ([[]], [1.0]),
    "midpoint": ([[], [0.5]], [0.0, 1.0]),
    "heun": ([[], [1.0]], [0.5, 0.5]),
    "rk4": ([[], [0.5], [0.0, 0.5], [0.0, 0.0, 1.0]], [1 / 6, 1 / 3, 1 / 3, 1 / 6]),
}


def runge_kutta(
    z: Tensor, times: Tensor, *, scheme: str = "heun", path: Path | None = None, end: str = "clean"
) -> Solver:
    """An explicit Runge-Kutta scheme for the ODE dz/dt = v.

    Requests v.

    Args:
        z: the initial state, [R, ...].
        times: [N + 1] or [N + 1, R], rising; with `end="full"` they may fall instead, from data to noise.
        scheme: `euler`, `midpoint`, `heun` or `rk4`, of order 1, 2, 2 and 4.
        path: `LinearPath()` by default.
        end: `clean` replaces the last step, to t = 1, by the clean estimate, for fields that diverge at the data. On
            the linear path this is a step of Euler's method. `full` applies the scheme up to the last time, which
            need not be 1.

    Raises:
        ValueError: an unknown scheme or end, times that do not fit, or a time at which v diverges.
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
    # A stage at the end of a step uses the next time itself, since t + h may round to a neighbouring number. Samples
    # that jump to the clean estimate need one evaluation; in later stages they only fill the batch.
    nodes = [sum(coefficients) for coefficients in stages]
    stage_times = [grid.t[1:] if node == 1 else grid.t[:-1] + node * grid.gaps for node in nodes]
    stage_times = [
        torch.where(jumps, grid.t[:-1], t) if node else t for node, t in zip(nodes, stage_times, strict=True)
    ]
    for t in stage_times:
        path.require("v", t[~grid.still] if grid.resting else t)
    clean_parts = [grid.send(part) for part in clean or ()]
    h = grid.send(torch.where(jumps, 0.0, grid.gaps))
    yielded_times = [grid.yielded(t, grid.still).unbind() for t in stage_times]
    for i in range(grid.steps):
        start, slopes = z, list[Tensor]()
        for coefficients, at in zip(stages[:1] if all_jump[i] else stages, yielded_times, strict=False):
            here = start
            for a, slope in zip(coefficients, slopes, strict=True):
                here = add(here, a * h[i], slope) if a else here
            slopes.append((yield here, at[i]))
        if some_jump[i]:  # samples that do not jump have p = 0 and q = 1 here
            p, q = (part[i] for part in clean_parts)
            z = add_to(q * start, p, slopes[0])
        if not all_jump[i]:
            for b, slope in zip(weights, slopes, strict=True):
                z = add(z, b * h[i], slope) if b else z
    return z


def euler(z: Tensor, times: Tensor, *, path: Path | None = None, end: str = "clean") -> Solver:
    """Euler's method for the ODE: order 1, one evaluation per step; see `runge_kutta`."""
    return runge_kutta(z, times, scheme="euler", path=path, end=end)


def midpoint(z: Tensor, times: Tensor, *, path: Path | None = None, end: str = "clean") -> Solver:
    """The explicit midpoint method for the ODE: order 2, two evaluations per step; see `runge_kutta`."""
    return runge_kutta(z, times, scheme="midpoint", path=path, end=end)


def heun(z: Tensor, times: Tensor, *, path: Path | None = None, end: str = "clean") -> Solver:
    """Heun's method for the ODE: order 2, two evaluations per step; see `runge_kutta`."""
    return runge_kutta(z, times, scheme="heun", path=path, end=end)


def rk4(z: Tensor, times: Tensor, *, path: Path | None = None, end: str = "clean") -> Solver:
    """The classical Runge-Kutta method for the ODE: order 4, four evaluations per step; see `runge_kutta`."""
    return runge_kutta(z, times, scheme="rk4", path=path, end=end)


def ddim(z: Tensor, times: Tensor, *, path: Path | None = None, noise: Noise | None = None, eta: float = 0.0) -> Solver:
    """DDIM: deterministic with eta 0, the default, and equal to ancestral sampling with eta 1.

    From time k to j, z_j = alpha_j x + sqrt(sigma_j^2 - s^2) eps + s n, where s is eta times the standard deviation of
    an ancestral step (Song et al. 2020, eq. 12). Requests the denoised estimate x and ends on it at t = 1.

    Raises:
        ValueError: eta outside [0, 1], or times that do not fit.
    """
    grid = Grid(z, times, path or LinearPath())
    return (yield from take(z, grid, grid.ddim(eta), noise or normal()))


def ancestral(
    z: Tensor,
    times: Tensor,
    *,
    path: Path | None = None,
    noise: Noise | None = None,
    gradient: Pull | None = None,
) -> Solver:
    """Ancestral sampling, the solver of DDPM, on any path and grid.

    From time k to j it draws from q(z_j | z_k, x) at the denoised estimate x (Ho et al. 2020). With
    c = 1 - exp(log-SNR_k - log-SNR_j), the mean is alpha_j (z (1 - c) / alpha_k + c x) and the variance c sigma_j^2
    (Kingma et al. 2021, appendix A.4). Requests the denoised estimate and ends on it at t = 1.

    Args:
        z: the initial state, [R, ...].
        times: [N + 1] or [N + 1, R], rising.
        path: `LinearPath()` by default.
        noise: standard normal by default.
        gradient: classifier guidance: (z, t) to the gradient of log p(y | z_t), of the shape of z, times the guidance
            scale; `mmgen.flow.guide.gradient_of` makes one of a classifier. The mean of each step moves by the variance
            of the step times the gradient at its start (Dhariwal and Nichol 2021, algorithm 1).

    Raises:
        ValueError: times that do not fit, or a gradient that is no function or has another shape than z.
    """
    if gradient is not None and not callable(gradient):
        raise ValueError(f"gradient must be a function of z and t, not {gradient!r}")
    grid = Grid(z, times, path or LinearPath())
    noise_levels = grid.noise_levels()
    # (1 - c) alpha_j / alpha_k, in a form that also holds where alpha_k is zero.
    by_z = noise_levels.alpha_k * noise_levels.sigma_j.square() / (noise_levels.alpha_j * noise_levels.sigma_k.square())
    by_x = (1 - noise_levels.kept).clamp(min=0) * noise_levels.alpha_j
    return (yield from take(z, grid, AffineSteps(by_x, by_z, noise_levels.std), noise or normal(), pull=gradient))


def dpmpp_2m(z: Tensor, times: Tensor, *, path: Path | None = None) -> Solver:
    """DPM-Solver++(2M): order 2 in half log-SNR, one evaluation per step, deterministic.

    Source: Lu et al. 2022, algorithm 2. Requests the denoised estimate and ends on it at t = 1. The first and the last
    step have order 1. If the first step begins at pure noise, where log-SNR is infinite, the second also has order 1.

    Raises:
        ValueError: times that do not fit.
    """
    grid = Grid(z, times, path or LinearPath())
    noise_levels = grid.noise_levels()
    kept = noise_levels.kept
    h = -kept.log() / 2  # step of half log-SNR; infinite from pure noise and to clean data
    ratio = torch.zeros_like(h)  # 1 / (2 r), r the previous step over this one
    ratio[1:] = h[1:] / (2 * h[:-1])
    ratio = torch.where(ratio.isfinite(), ratio, 0.0)
    by_x = noise_levels.alpha_j * (1 - kept.sqrt())
    t, q = grid.starts().unbind(), grid.send(noise_levels.sigma_j / noise_levels.sigma_k)
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
"""Noise rates w(t) by name: zero, g(t) of the time-reversed noising SDE, one, and sigma(t)."""


def euler_maruyama(
    z: Tensor,
    times: Tensor,
    *,
    path: Path | None = None,
    noise: Noise | None = None,
    level: str | Level = "sigma",
    end: str = "clean",
) -> Solver:
    """Euler-Maruyama for the SDE with any noise rate w(t): weak order 1, one evaluation per step.

    With rising times, from noise to data, the SDE is dz = (v + w^2 score / 2) dt + w dW. With falling times, from data
    to noise, it is dz = (-v + w^2 score / 2) |dt| + w dW. Both have the marginals of the path for every w(t) >= 0
    (Albergo et al. 2023, section 2.4). w = 0 is the ODE. w = g is the reverse SDE of Song et al. 2021, eq. 6, and with
    falling times the noising SDE dz = f z |dt| + g dW, in which the field has no part. Requests v.

    Args:
        z: the initial state, [R, ...].
        times: [N + 1] or [N + 1, R], rising; with `end="full"` they may fall instead.
        path: `LinearPath()` by default.
        noise: standard normal by default.
        level: the noise rate w: a name of `LEVELS`, or a function (path, t) to a tensor of the shape of t.
        end: as in `runge_kutta`.

    Raises:
        ValueError: an unknown or negative noise rate, an unknown end, or a time at which v, the rate or the score
            diverges.
    """
    path = path or LinearPath()
    _check_end(end)
    grid = Grid(z, times, path, rising=end == "clean")
    if isinstance(level, str):
        if level not in LEVELS:
            raise ValueError(f"unknown level '{level}' (one of: {', '.join(LEVELS)}; or a function of path and t)")
        level = LEVELS[level]
    if not callable(level):
        raise ValueError(f"level must be a name ({', '.join(LEVELS)}) or a function of path and t, not {level!r}")
    h, start = grid.gaps, grid.t[:-1]
    if grid.resting:
        start = torch.where(grid.still, 0.5, start)  # any time will do: the step of a resting sample is zero
    path.require("v", start)
    w = torch.as_tensor(level(path, start), dtype=start.dtype)
    if w.shape not in (start.shape, ()) or not bool((w >= 0).all()):
        raise ValueError(
            f"level must return one noise rate per time, none negative, in the shape {tuple(start.shape)}; got {w}"
        )
    # Where w is zero the score has no part; it may diverge there, as at the data.
    by_v, by_z = path.coefficients("v", "score", torch.where(w == 0, 0.5, start), clip=0.0)
    half = w.square() / 2
    p, q, s = h + h.abs() * half * by_v, 1 + h.abs() * half * by_z, h.abs().sqrt() * w
    if end == "clean":
        jumps, clean = grid.arriving, grid.to_clean()
        p, q, s = torch.where(jumps, clean[0], p), torch.where(jumps, clean[1], q), torch.where(jumps, 0.0, s)
    return (yield from take(z, grid, AffineSteps(p, q, s), noise or normal()))


@dataclass(frozen=True)
class SolverKind:
    """A solver of the registry and its properties."""

    make: Callable[..., Solver]
    """The solver function."""
    asks: str
    """The estimate that the solver requests: `v` or `x`."""
    stochastic: bool = False
    """Whether the function has an argument `noise`."""
    from_noise: bool = True
    """Whether the solver moves from noise to data."""
    noisy_with: str = ""
    """The option without which a stochastic solver adds no noise."""


SOLVERS: dict[str, SolverKind] = {
    "euler": SolverKind(euler, "v"),
    "midpoint": SolverKind(midpoint, "v"),
    "heun": SolverKind(heun, "v"),
    "rk4": SolverKind(rk4, "v"),
    "euler_maruyama": SolverKind(euler_maruyama, "v", stochastic=True),
    "ancestral": SolverKind(ancestral, "x", stochastic=True),
    "ddim": SolverKind(ddim, "x", stochastic=True, noisy_with="eta"),
    "dpmpp_2m": SolverKind(dpmpp_2m, "x"),
    "predictor_corrector": SolverKind(predictor_corrector, "x", stochastic=True),
    "annealed_langevin": SolverKind(annealed_langevin, "x", stochastic=True),
    "langevin": SolverKind(langevin, "x", stochastic=True, from_noise=False),
}
"""All solvers, by name."""
NOISY = tuple(
    name + (f" with {kind.noisy_with}" if kind.noisy_with else "")
    for name, kind in SOLVERS.items()
    if kind.stochastic and kind.from_noise
)
"""The solvers that start from noise and add noise on the way, for messages."""


@cache
def _options(name: str) -> frozenset[str]:
    """Return the names of a solver's options; cached, because the inspection takes as long as several steps."""
    common = {"z", "times", "path", "noise"}
    return frozenset(inspect.signature(SOLVERS[name].make).parameters) - common


def build_solver(name: str, z: Tensor, times: Tensor, path: Path, noise: Noise | None = None, **options: Any) -> Solver:
    """Return the solver `name` as a generator, for `solve` or a loop of your own.

    Args:
        name: a name of `SOLVERS`.
        z: the initial state, [R, ...]: noise with standard deviation sigma at the first time.
        times: [N + 1] or [N + 1, R], rising from noise (0) to data (1).
        path: the path of the field.
        noise: the noise source of a stochastic solver, standard normal by default; deterministic solvers ignore it.
        options: further arguments of the solver's function, such as `eta` of `ddim`.

    Raises:
        ValueError: an unknown solver, or an option that it does not have. The solver checks the values of z, times and
            options when the generator is first advanced, and then raises a ValueError as well.
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


def adds_noise(name: str, times: Tensor, path: Path, **options: Any) -> bool:
    """Return whether the solver `name` draws noise on this grid with these options; see `build_solver`."""
    drawn: list[Tensor] = []

    def noise(z: Tensor) -> Tensor:
        drawn.append(z)
        return torch.zeros_like(z)

    solve(build_solver(name, torch.zeros(1, dtype=torch.float64), times, path, noise, **options), lambda z, t: z)
    return bool(drawn)


def solve(solver: Solver, field: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Run `solver` with `field` and return its result.

    Args:
        solver: a generator, such as `build_solver` returns.
        field: (z, t) to the estimate that the solver requests (`SOLVERS[name].asks`), of the shape of z.

    Returns:
        z at the last time, of the shape and type of the initial state.

    Raises:
        ValueError: a field that returns another shape than that of z, or arguments that the solver refuses.
    """
    try:
        z, t = next(solver)
        while True:
            estimate = field(z, t)
            if estimate.shape != z.shape:
                raise ValueError(
                    f"the field returned shape {tuple(estimate.shape)} for z {tuple(z.shape)}: they must be equal"
                )
            z, t = solver.send(estimate)
    except StopIteration as stop:
        result: Tensor = stop.value
        return result
