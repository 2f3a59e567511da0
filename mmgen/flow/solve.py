"""Samplers as generators: each yields (z, t), is sent what it asks for there, and returns z at the last time.

Because a sampler only asks, a caller can batch the questions of many samplers, interleave them with other work, or
stop between any two; `solve` is the small driver for a plain function. A sampler asks for the velocity v or for the
denoised estimate E[x | z], as `SOLVERS[name].asks` says.

Times rise from noise (0) to data (1) and are either [N + 1], or [N + 1, R] for a grid per row of z. All coefficients
are computed once, in double precision, from the times; a step is a few elementwise products and never waits for the
device.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmgen.flow.path import LinearPath, Path, VEPath, check_times

Solver = Generator[tuple[Tensor, Tensor], Tensor, Tensor]
Noise = Callable[[Tensor], Tensor]
"""Makes standard normal numbers in the shape of its argument."""
Level = Callable[[Path, Tensor], Tensor]
"""Noise rate w of an SDE at time t of a path."""


def normal(generator: torch.Generator | None = None) -> Noise:
    """Standard normal noise from one generator (of torch by default)."""

    def draw(z: Tensor) -> Tensor:
        return torch.randn(z.shape, generator=generator, device=z.device, dtype=z.dtype)

    return draw


class _Grid:
    """Times in double precision on the CPU, one axis per axis of z, and what is computed from them."""

    def __init__(self, z: Tensor, times: Tensor, path: Path, rising: bool = True) -> None:
        times = torch.as_tensor(times).detach().to("cpu", torch.float64)
        if times.ndim not in (1, 2) or (times.ndim == 2 and times.shape[1] != len(z)):
            raise ValueError(
                f"times must be [N + 1], or [N + 1, {len(z)}] with a grid per row, got {list(times.shape)}"
            )
        if len(times) < 2:
            raise ValueError("a sampler needs at least one step: give two times or more")
        check_times(times)
        gaps = times.diff(dim=0)
        if bool((gaps < 0).any()) and (rising or bool((gaps > 0).any())):
            raise ValueError("times must rise from noise (0) to data (1)" + ("" if rising else ", or fall all the way"))
        self.t = times.view(len(times), *([1] * z.ndim if times.ndim == 1 else [-1] + [1] * (z.ndim - 1)))
        self.steps, self.path, self.like, self._flat = len(times) - 1, path, z, times.ndim == 1

    def send(self, coefficient: Tensor) -> Tensor:
        """A coefficient per step, in the precision and on the device of z."""
        return coefficient.to(self.like.device, self.like.dtype)

    def ask(self, t: Tensor) -> Tensor:
        """Times as they are yielded: a scalar per step, or [R, 1, ...]."""
        t = self.send(t)
        return t.flatten() if self._flat else t

    def to_clean(self) -> tuple[Tensor, Tensor]:
        """(p, q) of the last evaluation: the clean estimate is p v + q z."""
        if bool((self.t[-1] != 1).any()):
            raise ValueError("end='clean' returns the clean estimate, so times must end at 1; else use end='full'")
        p, q = self.path.solve("v", "x", self.t[-2], clip=0.0)
        return self.send(p), self.send(q)


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
    stages, weights = TABLEAUX[scheme]
    grid = _Grid(z, times, path, rising=end == "clean")
    nodes = [sum(row) for row in stages]
    full = grid.steps - (end == "clean")
    gaps = grid.t.diff(dim=0)
    # A stage at the end of a step stands at the next time itself, not at a sum that rounds to its neighbour.
    stage_times = [grid.t[1:] if node == 1 else grid.t[:-1] + node * gaps for node in nodes]
    for asked in stage_times:
        path.require("v", asked[:full])
    last = grid.to_clean() if end == "clean" else None
    h, asked_times = grid.send(gaps), [grid.ask(asked) for asked in stage_times]
    for i in range(full):
        slopes: list[Tensor] = []
        for row, at in zip(stages, asked_times, strict=True):
            here = z
            for a, slope in zip(row, slopes, strict=True):
                here = here + (a * h[i]) * slope if a else here
            slopes.append((yield here, at[i]))
        for b, slope in zip(weights, slopes, strict=True):
            z = z + (b * h[i]) * slope if b else z
    if last is not None:
        v = yield z, asked_times[0][full]
        z = last[0] * v + last[1] * z
    return z


def _steps(grid: _Grid) -> tuple[Tensor, ...]:
    """(alpha_k, sigma_k, alpha_j, sigma_j, kept) of every step from noisier k to cleaner j, in double precision.

    `kept` is exp(log-SNR_k - log-SNR_j): it goes to zero where k is pure noise or j is clean.
    """
    alpha, sigma = grid.path.alpha(grid.t), grid.path.sigma(grid.t)
    if bool((sigma[:-1] == 0).any()):
        raise ValueError("a step starts at t = 1, where nothing is left to denoise: only the last time may be 1")
    kept = (alpha[:-1] * sigma[1:] / (alpha[1:] * sigma[:-1])).square()
    return alpha[:-1], sigma[:-1], alpha[1:], sigma[1:], kept


def _ddim_step(grid: _Grid, eta: float) -> tuple[Tensor, Tensor, Tensor]:
    """(by_x, by_z, std) of z_j = by_x x + by_z z + std n for every step."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1] (0 deterministic, 1 ancestral), got {eta}")
    alpha_k, sigma_k, alpha_j, sigma_j, kept = _steps(grid)
    std = eta * (1 - kept).clamp(min=0).sqrt() * sigma_j
    std[-1] = 0
    by_z = (sigma_j.square() - std.square()).clamp(min=0).sqrt() / sigma_k
    return alpha_j - by_z * alpha_k, by_z, std


def ddim(z: Tensor, times: Tensor, *, path: Path | None = None, noise: Noise | None = None, eta: float = 0.0) -> Solver:
    """DDIM (Song et al. 2020, eq. 12): z_j = alpha_j x + sqrt(sigma_j^2 - s^2) eps + s n, s = eta * ancestral std.

    Asks for the denoised estimate. eta = 0 is deterministic; eta = 1 samples as `ancestral` does. The last step
    takes the mean.
    """
    grid = _Grid(z, times, path or LinearPath())
    return (yield from _linear(z, grid, *_ddim_step(grid, eta), noise, draws=eta > 0))


def ancestral(z: Tensor, times: Tensor, *, path: Path | None = None, noise: Noise | None = None) -> Solver:
    """DDPM's sampler on any path and grid: a draw from q(z_j | z_k, x) at the denoised estimate (Ho et al. 2020).

    With c = 1 - exp(log-SNR_k - log-SNR_j): mean = alpha_j (z (1 - c) / alpha_k + c x), variance c sigma_j^2
    (Kingma et al. 2021, appendix A.4). Asks for the denoised estimate. The last step takes the mean.
    """
    grid = _Grid(z, times, path or LinearPath())
    alpha_k, sigma_k, alpha_j, sigma_j, kept = _steps(grid)
    c = (1 - kept).clamp(min=0)
    std = c.sqrt() * sigma_j
    std[-1] = 0
    # (1 - c) alpha_j / alpha_k, written so that it is also right where alpha_k is zero.
    by_z = alpha_k * sigma_j.square() / (alpha_j * sigma_k.square())
    return (yield from _linear(z, grid, c * alpha_j, by_z, std, noise, draws=True))


def _linear(
    z: Tensor, grid: _Grid, by_x: Tensor, by_z: Tensor, std: Tensor, noise: Noise | None, draws: bool
) -> Solver:
    """Steps z <- by_x x + by_z z + std n; no noise in the last one."""
    noise = noise or normal()
    t, p, q, s = grid.ask(grid.t), grid.send(by_x), grid.send(by_z), grid.send(std)
    for i in range(grid.steps):
        x = yield z, t[i]
        z = p[i] * x + q[i] * z
        if draws and i < grid.steps - 1:
            z = z + s[i] * noise(z)
    return z


def dpmpp_2m(z: Tensor, times: Tensor, *, path: Path | None = None) -> Solver:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order in half log-SNR, one evaluation per step.

    Asks for the denoised estimate. The first and the last step are of first order.
    """
    grid = _Grid(z, times, path or LinearPath())
    _, sigma_k, alpha_j, sigma_j, kept = _steps(grid)
    h = -kept.log() / 2  # of half log-SNR; infinite from pure noise and to clean data
    ratio = torch.zeros_like(h)  # 1 / (2 r), r the last gap over this one
    ratio[1:-1] = h[1:-1] / (2 * h[:-2])
    ratio = torch.where(ratio.isfinite(), ratio, 0.0)
    t, p, q = grid.ask(grid.t), grid.send(alpha_j * (1 - kept.sqrt())), grid.send(sigma_j / sigma_k)
    extra = grid.send(ratio)
    before: Tensor | None = None
    for i in range(grid.steps):
        x = yield z, t[i]
        ahead = x if before is None else x + extra[i] * (x - before)
        z, before = p[i] * ahead + q[i] * z, x
    return z


def _no_noise(path: Path, t: Tensor) -> Tensor:
    return torch.zeros_like(t)


def _reverse_rate(path: Path, t: Tensor) -> Tensor:
    path.require("diffusion", t)
    return path.diffusion(t)


LEVELS: dict[str, Level] = {
    "ode": _no_noise,
    "sde": _reverse_rate,
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
    grid, noise = _Grid(z, times, path), noise or normal()
    if isinstance(level, str):
        if level not in LEVELS:
            raise ValueError(f"unknown level '{level}' (one of: {', '.join(LEVELS)}; or a function of path and t)")
        level = LEVELS[level]
    start, h = grid.t[:-1], grid.t.diff(dim=0)
    path.require("v", start)
    w = level(path, start)
    by_v, by_z = path.solve("v", "score", start, clip=0.0)
    half = w.square() / 2
    pull = torch.where(half > 0, half * by_v, 0.0), torch.where(half > 0, half * by_z, 0.0)
    p, q, s = grid.send(h * (1 + pull[0])), grid.send(1 + h * pull[1]), grid.send(h.sqrt() * w)
    t = grid.ask(grid.t)
    last = grid.to_clean() if end == "clean" else None
    for i in range(grid.steps - (last is not None)):
        v = yield z, t[i]
        z = p[i] * v + q[i] * z + s[i] * noise(z)
    if last is not None:
        v = yield z, t[grid.steps - 1]
        z = last[0] * v + last[1] * z
    return z


def _corrected(z: Tensor, x: Tensor, alpha: Tensor, spread: Tensor, snr: float, noise: Noise) -> Tensor:
    """One Langevin step z + h score + sqrt(2 h) n at the denoised estimate x, `spread` being 2 snr sigma.

    Song et al. 2021 (algorithm 5) take h = 2 (snr |n| / |score|)^2.
    Here |score| is its size given x, |n| / sigma: then h = 2 (snr sigma)^2 needs no norm, which may vanish.
    """
    return z + 2 * snr**2 * (alpha * x - z) + spread * noise(z)


def _levels(grid: _Grid, snr: float) -> tuple[Tensor, Tensor]:
    """(alpha, 2 snr sigma) at every time; refuses a step that would overshoot."""
    if not 0 < snr < 1:
        raise ValueError(f"the signal-to-noise ratio of Langevin steps must lie in (0, 1), got {snr}")
    return grid.send(grid.path.alpha(grid.t)), grid.send(2 * snr * grid.path.sigma(grid.t))


def langevin(
    z: Tensor, times: Tensor, *, path: Path | None = None, noise: Noise | None = None, snr: float = 0.16, steps: int = 1
) -> Solver:
    """`steps` Langevin corrections at the one time `times[0]`. Asks for the denoised estimate.

    Leaves the marginal as it is, up to O(snr^2).
    """
    path, noise = path or LinearPath(), noise or normal()
    grid = _Grid(z, torch.stack([torch.as_tensor(times[0])] * 2), path)
    path.require("score", grid.t[0])
    alpha, spread = _levels(grid, snr)
    t = grid.ask(grid.t)
    for _ in range(steps):
        x = yield z, t[0]
        z = _corrected(z, x, alpha[0], spread[0], snr, noise)
    return z


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

    Asks for the denoised estimate. The last step takes the mean and gets no correction.
    """
    path, noise = path or LinearPath(), noise or normal()
    grid = _Grid(z, times, path)
    by_x, by_z, std = _ddim_step(grid, eta)
    p, q, s, t = grid.send(by_x), grid.send(by_z), grid.send(std), grid.ask(grid.t)
    alpha, spread = _levels(grid, snr)
    for i in range(grid.steps):
        x = yield z, t[i]
        z = p[i] * x + q[i] * z
        if i < grid.steps - 1:
            z = z + s[i] * noise(z)
            for _ in range(corrections):
                x = yield z, t[i + 1]
                z = _corrected(z, x, alpha[i + 1], spread[i + 1], snr, noise)
    return z


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
    path, noise = path or VEPath(), noise or normal()
    grid = _Grid(z, times, path)
    if bool((path.alpha(grid.t) != 1).any()):
        raise ValueError(f"annealed_langevin needs a path with alpha = 1 (VEPath), not {type(path).__name__}")
    alpha, spread = _levels(grid, snr)
    t = grid.ask(grid.t)
    for i in range(grid.steps):
        for _ in range(corrections):
            x = yield z, t[i]
            z = _corrected(z, x, alpha[i], spread[i], snr, noise)
    return (yield z, t[grid.steps - 1])


@dataclass(frozen=True)
class SolverKind:
    """A sampler and what it needs."""

    make: Callable[..., Solver]
    asks: str
    """What is sent to it: `v` or `x`."""
    stochastic: bool = False


SOLVERS: dict[str, SolverKind] = {
    **{name: SolverKind(partial(runge_kutta, scheme=name), "v") for name in TABLEAUX},
    "euler_maruyama": SolverKind(euler_maruyama, "v", stochastic=True),
    "ancestral": SolverKind(ancestral, "x", stochastic=True),
    "ddim": SolverKind(ddim, "x", stochastic=True),
    "dpmpp_2m": SolverKind(dpmpp_2m, "x"),
    "predictor_corrector": SolverKind(predictor_corrector, "x", stochastic=True),
    "annealed_langevin": SolverKind(annealed_langevin, "x", stochastic=True),
    "langevin": SolverKind(langevin, "x", stochastic=True),
}


def build_solver(name: str, z: Tensor, times: Tensor, path: Path, noise: Noise | None = None, **options: Any) -> Solver:
    """The sampler `name`, ready to be driven; options are those of its function.

    Raises:
        ValueError: an unknown sampler or an option it does not have.
    """
    if name not in SOLVERS:
        raise ValueError(f"unknown solver '{name}' (one of: {', '.join(SOLVERS)})")
    kind = SOLVERS[name]
    known = set(inspect.signature(kind.make).parameters) - {"z", "times", "path", "noise", "scheme"}
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
            z, t = solver.send(field(z, t))
    except StopIteration as stop:
        result: Tensor = stop.value
        return result


def solve_adaptive(
    field: Callable[[Tensor, Tensor], Tensor],
    z: Tensor,
    span: tuple[float, float] = (0.0, 1.0),
    *,
    rtol: float = 1e-5,
    atol: float = 1e-6,
    method: str = "dopri5",
) -> Tensor:
    """dz/dt = field(z, t) over `span` with adaptive steps, by torchdiffeq (extra `ode`).

    A driver and no generator: torchdiffeq calls the field itself, and its step sizes wait for the device.
    """
    try:
        from torchdiffeq import odeint
    except ImportError:
        raise ImportError("adaptive steps need torchdiffeq: pip install 'mmgen[ode]'") from None
    times = torch.tensor(span, dtype=z.dtype, device=z.device)
    end: Tensor = odeint(lambda t, y: field(y, t), z, times, rtol=rtol, atol=atol, method=method)[-1]
    return end
