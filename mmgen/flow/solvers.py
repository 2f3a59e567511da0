"""Samplers as generators: each yields (z, t), is sent what it asks for there, and returns z at the last time.

Because a sampler only asks, a caller can batch the questions of many samplers, interleave them with other work, or
stop between any two; `solve` is the small driver for a plain function. A sampler asks for the velocity v or for the
denoised estimate E[x | z], as `SOLVERS[name].asks` says.

Times rise from noise (0) to data (1) and are either [N + 1], or [N + 1, R] for a grid per row of z. All coefficients
are computed once, in double precision, from the times; a step is a few passes over z and never waits for the device.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from mmgen.flow.path import Path, check_times
from mmgen.flow.schedule import LinearPath, VEPath

Solver = Generator[tuple[Tensor, Tensor], Tensor, Tensor]
Noise = Callable[[Tensor], Tensor]
"""Makes standard normal numbers in the shape of its argument."""
Level = Callable[[Path, Tensor], Tensor]
"""Noise rate w of an SDE at time t of a path."""


def normal(generator: torch.Generator | None = None) -> Noise:
    """Standard normal noise from one generator (of torch by default)."""

    def draw(z: Tensor) -> Tensor:
        # What torch.randn gives, in half its time for the few numbers of a small state.
        return torch.empty_like(z, memory_format=torch.contiguous_format).normal_(generator=generator)

    return draw


Coefficient = float | Tensor


def _add(z: Tensor, coefficient: Coefficient, value: Tensor) -> Tensor:
    """z + coefficient * value, with a number in one pass over memory."""
    if isinstance(coefficient, Tensor):
        return torch.addcmul(z, coefficient, value)
    return torch.add(z, value, alpha=coefficient)


def _add_to(z: Tensor, coefficient: Coefficient, value: Tensor) -> Tensor:
    """As `_add`, into z, which nobody else may hold."""
    return z.addcmul_(coefficient, value) if isinstance(coefficient, Tensor) else z.add_(value, alpha=coefficient)


def _add_noise(z: Tensor, coefficient: Coefficient, noise: Noise) -> Tensor:
    """z + coefficient * noise, into z, which nobody else may hold."""
    n = noise(z)
    if n.shape != z.shape:
        raise ValueError(
            f"the noise has the shape {tuple(n.shape)}, the state {tuple(z.shape)}: draw one like the other"
        )
    return _add_to(z, coefficient, n)


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
        self.t = times.view(len(times), *([1] * z.ndim if times.ndim == 1 else [-1] + [1] * (z.ndim - 1)))
        self.gaps = self.t.diff(dim=0)
        least, most = (float(end) for end in self.gaps.aminmax())
        if least < 0 and (rising or most > 0):
            raise ValueError("times must rise from noise (0) to data (1)" + ("" if rising else ", or fall all the way"))
        self.steps, self.path, self.like, self._flat = len(times) - 1, path, z, times.ndim == 1
        self.still = self.gaps == 0
        """Rows that rest during a step: not yet begun, or already at their end."""
        self.resting = least <= 0 <= most and bool(self.still.any())
        """Whether there are any: most grids have none, and need none of what keeps them where they are."""
        self.arriving = self.t[1:] == 1
        """Steps [N, ...] that bring a row to the data."""
        if self.resting:
            self.arriving &= ~self.still

    def send(self, coefficient: Tensor) -> Sequence[Coefficient]:
        """A coefficient per step: a number where all rows share it, else [R, 1, ...] on the device of z."""
        if self._flat:
            numbers: list[float] = coefficient.flatten().tolist()
            return numbers
        return coefficient.to(self.like.device, self.like.dtype).unbind()

    def ask(self, t: Tensor, idle: Tensor) -> Tensor:
        """Times as they are yielded, [N] or [N, R, 1, ...], in single precision or better.

        A row that is at the data and `idle` is asked about its last time before, where every field is finite.
        """
        if self.resting or not self._flat:
            before = torch.where(self.t < 1, self.t, -1.0).amax(0, keepdim=True).clamp(min=0)
            t = torch.where((t == 1) & idle, before, t)
        t = t.to(self.like.device, torch.promote_types(self.like.dtype, torch.float32))
        return t.flatten() if self._flat else t

    def starts(self) -> Tensor:
        """The times at which the steps begin, as they are yielded."""
        return self.ask(self.t[:-1], self.still)

    def to_clean(self) -> tuple[Tensor, Tensor]:
        """(p, q) [N, ...] such that p v + q z is the clean estimate where a row arrives, and z where it does not."""
        if float(self.t[-1].min()) < 1:
            raise ValueError("end='clean' returns the clean estimate, so times must end at 1; else use end='full'")
        p, q = self.path.coefficients("v", "x", torch.where(self.arriving, self.t[:-1], 0.5), clip=0.0)
        return torch.where(self.arriving, p, 0.0), torch.where(self.arriving, q, 1.0)


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
    grid = _Grid(z, times, path, rising=end == "clean")
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
                here = _add(here, a * h[i], slope) if a else here
            slopes.append((yield here, at[i]))
        if some_jump[i]:  # rows that do not jump have p = 0 and q = 1 here
            p, q = (part[i] for part in clean_parts)
            z = _add_to(q * start, p, slopes[0])
        if not all_jump[i]:
            for b, slope in zip(weights, slopes, strict=True):
                z = _add(z, b * h[i], slope) if b else z
    return z


def _steps(grid: _Grid) -> tuple[Tensor, ...]:
    """(alpha_k, sigma_k, alpha_j, sigma_j, kept, std) of every step from noisier k to cleaner j, in double precision.

    `kept` is exp(log-SNR_k - log-SNR_j): it goes to zero where k is pure noise or j is clean. `std` is that of the
    ancestral step, sigma_j sqrt(1 - kept). A step that arrives at the data ends on the clean estimate, also where the
    path keeps some noise there.
    """
    alpha, sigma = grid.path.alpha(grid.t), grid.path.sigma(grid.t)
    alpha_k, sigma_k = alpha[:-1], sigma[:-1]
    alpha_j, sigma_j = torch.where(grid.arriving, 1.0, alpha[1:]), torch.where(grid.arriving, 0.0, sigma[1:])
    if grid.resting:  # rows that rest get the numbers of a step that does nothing
        alpha_k, sigma_k, alpha_j, sigma_j = (
            torch.where(grid.still, 1.0, level) for level in (alpha_k, sigma_k, alpha_j, sigma_j)
        )
    kept = (alpha_k * sigma_j / (alpha_j * sigma_k)).square()
    std = (1 - kept).clamp(min=0).sqrt() * sigma_j
    return alpha_k, sigma_k, alpha_j, sigma_j, kept, std


def _ddim_step(grid: _Grid, eta: float) -> tuple[Tensor, Tensor, Tensor]:
    """(by_x, by_z, std) of z_j = by_x x + by_z z + std n for every step."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1] (0 deterministic, 1 ancestral), got {eta}")
    alpha_k, sigma_k, alpha_j, sigma_j, _, std = _steps(grid)
    by_z = (sigma_j.square() - (eta * std).square()).clamp(min=0).sqrt() / sigma_k
    return alpha_j - by_z * alpha_k, by_z, eta * std


def _affine(
    z: Tensor,
    grid: _Grid,
    by_answer: Tensor,
    by_z: Tensor,
    std: Tensor,
    noise: Noise,
    correct: _Corrector | None = None,
) -> Solver:
    """Steps z <- by_answer answer + by_z z + std n, each but the last followed by corrections where there are some."""
    t, p, q, s = grid.starts().unbind(), grid.send(by_answer), grid.send(by_z), grid.send(std)
    noisy = (std > 0).flatten(1).any(1).tolist()
    for i in range(grid.steps):
        answer = yield z, t[i]
        z = _add_to(q[i] * z, p[i], answer)
        if noisy[i]:
            z = _add_noise(z, s[i], noise)
        if correct is not None and i < grid.steps - 1:
            z = yield from correct(z, i + 1)
    return z


def ddim(z: Tensor, times: Tensor, *, path: Path | None = None, noise: Noise | None = None, eta: float = 0.0) -> Solver:
    """DDIM (Song et al. 2020, eq. 12): z_j = alpha_j x + sqrt(sigma_j^2 - s^2) eps + s n, s = eta * ancestral std.

    Asks for the denoised estimate and ends on it at t = 1. eta = 0 is deterministic; eta = 1 samples as `ancestral`
    does.
    """
    grid = _Grid(z, times, path or LinearPath())
    return (yield from _affine(z, grid, *_ddim_step(grid, eta), noise or normal()))


def ancestral(z: Tensor, times: Tensor, *, path: Path | None = None, noise: Noise | None = None) -> Solver:
    """DDPM's sampler on any path and grid: a draw from q(z_j | z_k, x) at the denoised estimate (Ho et al. 2020).

    With c = 1 - exp(log-SNR_k - log-SNR_j): mean = alpha_j (z (1 - c) / alpha_k + c x), variance c sigma_j^2
    (Kingma et al. 2021, appendix A.4). Asks for the denoised estimate and ends on it at t = 1.
    """
    grid = _Grid(z, times, path or LinearPath())
    alpha_k, sigma_k, alpha_j, sigma_j, kept, std = _steps(grid)
    # (1 - c) alpha_j / alpha_k, written so that it is also right where alpha_k is zero.
    by_z = alpha_k * sigma_j.square() / (alpha_j * sigma_k.square())
    return (yield from _affine(z, grid, (1 - kept).clamp(min=0) * alpha_j, by_z, std, noise or normal()))


def dpmpp_2m(z: Tensor, times: Tensor, *, path: Path | None = None) -> Solver:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order in half log-SNR, one evaluation per step.

    Asks for the denoised estimate and ends on it at t = 1. That step and the first are of first order, and so is the
    second where the first began at pure noise, infinitely far away.
    """
    grid = _Grid(z, times, path or LinearPath())
    _, sigma_k, alpha_j, sigma_j, kept, _ = _steps(grid)
    h = -kept.log() / 2  # of half log-SNR; infinite from pure noise and to clean data
    ratio = torch.zeros_like(h)  # 1 / (2 r), r the last gap over this one
    ratio[1:] = h[1:] / (2 * h[:-1])
    ratio = torch.where(ratio.isfinite(), ratio, 0.0)
    by_x = alpha_j * (1 - kept.sqrt())
    t, q = grid.starts().unbind(), grid.send(sigma_j / sigma_k)
    p, back = grid.send(by_x * (1 + ratio)), grid.send(-by_x * ratio)  # by_x (x + ratio (x - before))
    before: Tensor | None = None
    for i in range(grid.steps):
        x = yield z, t[i]
        z = _add_to(q[i] * z, p[i], x)
        if before is not None:
            z = _add_to(z, back[i], before)
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
    grid = _Grid(z, times, path)
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
    return (yield from _affine(z, grid, p, q, s, noise or normal()))


class _Corrector:
    """Langevin steps z + h score + sqrt(2 h) n at the denoised estimate x, `count` of them at a time of a grid.

    Song et al. 2021 (algorithm 5) take h = 2 (snr |n| / |score|)^2. Here |score| is its size given x, |n| / sigma: then
    h = 2 (snr sigma)^2 needs no norm, which may vanish. Rows at the data stay, and so do those at the end of the step
    of a predictor (`after_step`) that did not move them or brought them to their last time.
    """

    def __init__(self, grid: _Grid, noise: Noise | None, snr: float, count: int, after_step: bool = False) -> None:
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
            z = _add_noise(_add_to(self.keep[i] * z, self.pull[i], x), self.spread[i], self.noise)
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
    grid = _Grid(z, torch.stack([times[0]] * 2), path)
    path.require("score", grid.t[0])
    return (yield from _Corrector(grid, noise, snr, steps)(z, 0))


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
    grid = _Grid(z, times, path or LinearPath())
    correct = _Corrector(grid, noise, snr, corrections, after_step=True)
    return (yield from _affine(z, grid, *_ddim_step(grid, eta), noise or normal(), correct))


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
    grid = _Grid(z, times, path)
    if bool((path.alpha(grid.t) != 1).any()):
        raise ValueError(f"annealed_langevin needs a path with alpha = 1 (VEPath), not {type(path).__name__}")
    correct = _Corrector(grid, noise, snr, corrections)
    for i in range(grid.steps):
        z = yield from correct(z, i)
    return (yield z, correct.t[grid.steps - 1])


@dataclass(frozen=True)
class SolverKind:
    """A sampler and what it needs."""

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
    """The options that a sampler's function takes; looked up once, for that costs as much as some steps."""
    given = {"z", "times", "path", "noise", "scheme"}
    return frozenset(inspect.signature(SOLVERS[name].make).parameters) - given


def build_solver(name: str, z: Tensor, times: Tensor, path: Path, noise: Noise | None = None, **options: Any) -> Solver:
    """The sampler `name`, ready to be driven; options are those of its function.

    A sampler is a generator: values that do not fit it are refused at its first question.

    Raises:
        ValueError: an unknown sampler or an option it does not have.
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


ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
"""Methods of torchdiffeq that choose their steps."""


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

    Raises:
        ValueError: a method without adaptive steps, a tolerance that is not positive, or an empty span.
    """
    if method not in ADAPTIVE:
        raise ValueError(f"'{method}' has no adaptive steps (one of: {', '.join(ADAPTIVE)}); `runge_kutta` has fixed")
    if not (rtol > 0 and atol > 0) or span[0] == span[1]:
        raise ValueError(f"adaptive steps need positive tolerances and a span, got {rtol}, {atol} and {span}")
    try:
        from torchdiffeq import odeint
    except ImportError:
        raise ImportError("adaptive steps need torchdiffeq: pip install 'mmgen[ode]'") from None
    check_times(torch.tensor(span))
    times = torch.tensor(span, dtype=z.dtype, device=z.device)
    # The last step lands on the end of the span, not beyond it, where no field is defined.
    options = {"step_t": times[1:]}
    end: Tensor = odeint(lambda t, y: field(y, t), z, times, rtol=rtol, atol=atol, method=method, options=options)[-1]
    return end
