"""Solvers that no library has, written out in plain floats from their papers; and what settings and states are allowed.

Every question, draw and step must agree. What diffusers, azula and torchdiffeq have is compared with them in
`test_oracles`, paths in `test_path`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from mmgen.flow.adaptive import solve_adaptive
from mmgen.flow.path import Path
from mmgen.flow.schedule import CosinePath, DDPMPath, LinearBetaPath, LinearPath, ScaledNoise, VEPath
from mmgen.flow.solvers import SOLVERS, build_solver, langevin, solve
from mmgen.flow.steps import normal
from mmgen.flow.time import uniform_grid

STEPS = 5


@dataclass(frozen=True)
class Plain:
    """A path in plain floats."""

    alpha: Callable[[float], float]
    sigma: Callable[[float], float]
    alpha_slope: Callable[[float], float]
    sigma_slope: Callable[[float], float]


def numeric(f: Callable[[float], float]) -> Callable[[float], float]:
    """A central difference of fourth order."""
    h = 1e-3
    return lambda t: (8 * (f(t + h) - f(t - h)) - (f(t + 2 * h) - f(t - 2 * h))) / (12 * h)


def differenced(alpha: Callable[[float], float], sigma: Callable[[float], float]) -> Plain:
    return Plain(alpha, sigma, numeric(alpha), numeric(sigma))


def cosine(low: float, high: float, shift: float) -> Plain:
    a, b = math.atan(math.exp(-high / 2)), math.atan(math.exp(-low / 2))

    def log_snr(t: float) -> float:
        return -2 * math.log(math.tan(a + (1 - t) * (b - a))) + shift

    return differenced(
        lambda t: (1 / (1 + math.exp(-log_snr(t)))) ** 0.5, lambda t: (1 / (1 + math.exp(log_snr(t)))) ** 0.5
    )


def preserving(low: float, high: float) -> Plain:
    def kept(t: float) -> float:
        return math.exp(-((1 - t) * low + (1 - t) ** 2 * (high - low) / 2))

    return differenced(lambda t: kept(t) ** 0.5, lambda t: abs(1 - kept(t)) ** 0.5)


# Paths are made inside the tests, so that what their constructors do is tested, too.
PAIRS: dict[str, tuple[Callable[[], Path], Plain]] = {
    "linear": (LinearPath, Plain(lambda t: t, lambda t: 1 - t, lambda t: 1.0, lambda t: -1.0)),
    "sigma_min": (lambda: LinearPath(0.1), Plain(lambda t: t, lambda t: 1 - 0.9 * t, lambda t: 1.0, lambda t: -0.9)),
    "cosine": (CosinePath, cosine(-15, 15, 0)),
    "cosine_shifted": (lambda: CosinePath(-6, 8, -1.5), cosine(-6, 8, -1.5)),
    "vp": (lambda: LinearBetaPath(0.3, 8.0), preserving(0.3, 8.0)),
    "vp_default": (LinearBetaPath, preserving(0.1, 20.0)),
    "ve": (VEPath, differenced(lambda t: 1.0, lambda t: 0.01 * 5000 ** (1 - t))),
    "ve_own": (lambda: VEPath(0.2, 3.0), differenced(lambda t: 1.0, lambda t: 0.2 * 15 ** (1 - t))),
    "scaled": (
        lambda: ScaledNoise(LinearPath(), 2.5),
        Plain(lambda t: t, lambda t: 2.5 * (1 - t), lambda t: 1.0, lambda t: -2.5),
    ),
}
each_path = pytest.mark.parametrize(("make", "plain"), PAIRS.values(), ids=PAIRS)


def double(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


# --- solvers ----------------------------------------------------------------------------------------------

Ask = Callable[[float, float], float]


def clean(z: float, t: float) -> float:
    """Some denoised estimate; it belongs to no data, so nothing cancels."""
    return 0.4 * z + 0.3 * math.sin(3 * t) - 0.2


def velocity(plain: Plain) -> Ask:
    """What that estimate implies."""

    def v(z: float, t: float) -> float:
        x = clean(z, t)
        return plain.alpha_slope(t) * x + plain.sigma_slope(t) * (z - plain.alpha(t) * x) / plain.sigma(t)

    return v


def draws() -> Iterator[float]:
    """The noise of both sides."""
    return iter([0.7, -1.1, 0.4, 1.6, -0.3, 0.9, -0.8, 0.2, -1.4, 0.6] * 10)


def plain_rk4(plain: Plain, z: float, times: list[float], noise: Iterator[float], ask: Ask) -> float:
    for t, u in itertools.pairwise(times):
        h = u - t
        k = ask(z, t)
        if u == 1:  # ends on the clean estimate
            rate = plain.alpha_slope(t) * plain.sigma(t) - plain.alpha(t) * plain.sigma_slope(t)
            return (plain.sigma(t) * k - plain.sigma_slope(t) * z) / rate
        b = ask(z + h / 2 * k, t + h / 2)
        c = ask(z + h / 2 * b, t + h / 2)
        z += h / 6 * (k + 2 * b + 2 * c + ask(z + h * c, u))
    return z


def plain_ddim(eta: float, corrections: int = 0, snr: float = 0.0) -> Callable[..., float]:
    def run(plain: Plain, z: float, times: list[float], noise: Iterator[float], ask: Ask) -> float:
        for t, u in itertools.pairwise(times):
            x = ask(z, t)
            if u == 1:
                return x
            eps = (z - plain.alpha(t) * x) / plain.sigma(t)
            ratio = plain.alpha(t) * plain.sigma(u) / (plain.alpha(u) * plain.sigma(t))
            s = eta * plain.sigma(u) * (1 - ratio**2) ** 0.5
            z = plain.alpha(u) * x + (plain.sigma(u) ** 2 - s**2) ** 0.5 * eps
            if s:
                z += s * next(noise)
            z = plain_langevin(plain, z, u, noise, ask, corrections, snr)
        return z

    return run


def plain_langevin(plain: Plain, z: float, t: float, noise: Iterator[float], ask: Ask, count: int, snr: float) -> float:
    h = 2 * (snr * plain.sigma(t)) ** 2
    for _ in range(count):
        score = (plain.alpha(t) * ask(z, t) - z) / plain.sigma(t) ** 2
        z += h * score + (2 * h) ** 0.5 * next(noise)
    return z


def plain_maruyama(w: Callable[[Plain, float], float], full: bool = False) -> Callable[..., float]:
    def run(plain: Plain, z: float, times: list[float], noise: Iterator[float], ask: Ask) -> float:
        for t, u in itertools.pairwise(times):
            v, h = ask(z, t), u - t
            rate = plain.alpha_slope(t) * plain.sigma(t) - plain.alpha(t) * plain.sigma_slope(t)
            if u == 1 and not full:
                return (plain.sigma(t) * v - plain.sigma_slope(t) * z) / rate
            score = (plain.alpha(t) * v - plain.alpha_slope(t) * z) / (plain.sigma(t) * rate)
            z += h * (v + w(plain, t) ** 2 / 2 * score)
            if w(plain, t):
                z += h**0.5 * w(plain, t) * next(noise)
        return z

    return run


def plain_annealed(corrections: int, snr: float) -> Callable[..., float]:
    def run(plain: Plain, z: float, times: list[float], noise: Iterator[float], ask: Ask) -> float:
        for t in times[:-1]:
            z = plain_langevin(plain, z, t, noise, ask, corrections, snr)
        return ask(z, times[-2])

    return run


def rate_of_noise(plain: Plain, t: float) -> float:
    return (
        2 * plain.sigma(t) ** 2 * (plain.alpha_slope(t) / plain.alpha(t) - plain.sigma_slope(t) / plain.sigma(t))
    ) ** 0.5


CASES: dict[str, tuple[str, dict[str, Any], Callable[..., float]]] = {
    "rk4": ("rk4", {}, plain_rk4),
    "maruyama": ("euler_maruyama", {}, plain_maruyama(lambda plain, t: plain.sigma(t))),
    "maruyama_ode": ("euler_maruyama", {"level": "ode"}, plain_maruyama(lambda plain, t: 0.0)),
    "maruyama_one": ("euler_maruyama", {"level": "constant"}, plain_maruyama(lambda plain, t: 1.0)),
    "maruyama_sde": ("euler_maruyama", {"level": "sde"}, plain_maruyama(rate_of_noise)),
    "maruyama_own": ("euler_maruyama", {"level": lambda path, t: 0.3 + t}, plain_maruyama(lambda plain, t: 0.3 + t)),
    "corrected": ("predictor_corrector", {}, plain_ddim(1.0, 1, 0.16)),
    "corrected_own": ("predictor_corrector", {"eta": 0.3, "corrections": 3, "snr": 0.4}, plain_ddim(0.3, 3, 0.4)),
    "annealed": ("annealed_langevin", {}, plain_annealed(10, 0.2)),
    "annealed_own": ("annealed_langevin", {"corrections": 2, "snr": 0.1}, plain_annealed(2, 0.1)),
}  # fmt: skip


@each_path
@pytest.mark.parametrize("case", CASES)
def test_solvers_in_plain_floats(case: str, make: Callable[[], Path], plain: Plain) -> None:
    """The same questions in the same order, the same number of draws and the same end."""
    path = make()
    name, options, reference = CASES[case]
    if name == "annealed_langevin" and not isinstance(path, VEPath):
        pytest.skip("refused: alpha is not 1")
    ask = velocity(plain) if SOLVERS[name].asks == "v" else clean
    start = 0.0 if case not in ("maruyama_sde",) and isinstance(path, LinearPath) and path.sigma_min == 0 else 0.1
    times = [start + (1 - start) * share for share in (0.0, 0.15, 0.4, 0.55, 0.8, 1.0)]
    mine, theirs, left, right = list[tuple[float, float]](), list[tuple[float, float]](), draws(), draws()

    def field(z: Tensor, t: Tensor) -> Tensor:
        mine.append((z.item(), t.item()))
        return torch.full_like(z, ask(*mine[-1]))

    def noted(z: float, t: float) -> float:
        theirs.append((z, t))
        return ask(z, t)

    noise = {"noise": lambda z: torch.full_like(z, next(left))} if SOLVERS[name].stochastic else {}
    z = torch.full((1, 1), 1.3, dtype=torch.float64)
    found = solve(build_solver(name, z, torch.tensor(times, dtype=torch.float64), path, **noise, **options), field)
    known = reference(plain, 1.3, times, right, noted)
    assert found.item() == pytest.approx(known, rel=1e-6, abs=1e-6)
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-6, abs=1e-6)
    assert next(left) == next(right)
    assert z.item() == 1.3


def test_full_and_falling_grids_in_plain_floats() -> None:
    """`full` takes the last step as any other, and times may fall; Euler-Maruyama has a full end, too."""
    path, plain = CosinePath(-6, 8, -1.5), PAIRS["cosine_shifted"][1]
    ask = velocity(plain)
    for times in ([0.2, 0.5, 0.9], [0.9, 0.6, 0.1], [0.3, 1.0]):
        z = torch.full((1, 1), 0.8, dtype=torch.float64)
        grid = torch.tensor(times, dtype=torch.float64)
        asked = lambda z, t: torch.full_like(z, ask(z.item(), t.item()))  # noqa: E731
        found = solve(build_solver("rk4", z, grid, path, end="full"), asked)
        shifted = [t if t != 1 else 1 - 1e-13 for t in times]  # the reference jumps at exactly 1
        assert found.item() == pytest.approx(plain_rk4(plain, 0.8, shifted, draws(), ask), rel=1e-6)
    left = draws()
    options: dict[str, Any] = {"level": "constant", "end": "full", "noise": lambda z: torch.full_like(z, next(left))}
    z, grid = torch.full((1, 1), 0.8, dtype=torch.float64), torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    found = solve(build_solver("euler_maruyama", z, grid, path, **options), asked)
    run = plain_maruyama(lambda plain, t: 1.0, full=True)
    assert found.item() == pytest.approx(run(plain, 0.8, [0.2, 0.5, 0.9], draws(), ask), rel=1e-6)


def test_langevin_in_plain_floats() -> None:
    path, plain = LinearPath(0.1), PAIRS["sigma_min"][1]
    for options, count, snr in (({}, 1, 0.16), ({"steps": 3, "snr": 0.3}, 3, 0.3)):
        left = draws()
        z = torch.full((1, 1), 0.8, dtype=torch.float64)
        solver = langevin(
            z, double(0.6).view(1), path=path, noise=lambda z, left=left: torch.full_like(z, next(left)), **options
        )
        found = solve(solver, lambda z, t: torch.full_like(z, clean(z.item(), t.item())))
        assert found.item() == pytest.approx(plain_langevin(plain, 0.8, 0.6, draws(), clean, count, snr), rel=1e-12)
    # By default on the linear path, with torch's own normal numbers.
    torch.manual_seed(0)
    z = torch.zeros(1, 1, dtype=torch.float64)
    found = solve(langevin(z, double(0.6).view(1)), lambda z, t: 0 * z)
    torch.manual_seed(0)
    n = torch.randn(1, 1, dtype=torch.float64)
    torch.testing.assert_close(found, 2 * 0.16 * 0.4 * n)


# --- limits ------------------------------------------------------------------------------------------------


def test_settings_at_their_limits() -> None:
    """What is just allowed is taken, and what is just not allowed is refused."""
    z, times = torch.zeros(1, 1, dtype=torch.float64), torch.tensor([0.5, 1.0], dtype=torch.float64)
    for bad in (
        lambda: LinearPath(1.0),
        lambda: CosinePath(2.0, 2.0),
        lambda: LinearBetaPath(0.0, 1.0),
        lambda: LinearBetaPath(1.0, 1.0),
        lambda: VEPath(0.0, 1.0),
        lambda: VEPath(1.0, 1.0),
        lambda: ScaledNoise(LinearPath(), 0.0),
        lambda: DDPMPath([0.0, 0.5]),
        lambda: DDPMPath([0.5, 1.0]),
        lambda: next(build_solver("predictor_corrector", z, times, LinearPath(), snr=0.0)),
        lambda: next(build_solver("predictor_corrector", z, times, LinearPath(), snr=1.0)),
        lambda: next(build_solver("ddim", z, times, LinearPath(), eta=-0.01)),
        lambda: next(build_solver("ddim", z, times, LinearPath(), eta=1.01)),
        lambda: next(langevin(z, times, steps=0)),
    ):
        with pytest.raises(ValueError, match=r"\w"):
            bad()
    assert ScaledNoise(LinearPath(), 0.5).scale == 0.5
    assert LinearPath(0.0).sigma(double(1.0)).item() == 0
    next(build_solver("predictor_corrector", z, times, LinearPath(), corrections=0))
    next(build_solver("ddim", z, torch.tensor([0.0, 1.0]), LinearPath(), eta=1))
    # Beyond what a path reaches lie times outside [0, 1], not numbers that are none.
    assert LinearBetaPath().time_of(double(-math.inf)).item() < 0
    assert DDPMPath([0.1, 0.3, 0.2]).time_of(double(-9.0)).item() < 0
    assert DDPMPath([0.1, 0.3, 0.2]).time_of(double(math.inf)).item() == 1


def test_the_smallest_level_of_a_grid() -> None:
    """Half of the smallest alpha or sigma above zero that is asked about; t = 1 is not."""
    for times, level in (([0.0, 0.2, 0.7, 1.0], 0.1), ([0.0, 0.4, 0.9, 1.0], 0.05), ([0.3, 1.0], 0.15)):
        grid = torch.tensor(times, dtype=torch.float64)
        assert LinearPath().smallest_level(grid) == pytest.approx(level)
        assert ScaledNoise(LinearPath(), 4.0).smallest_level(grid) == pytest.approx(level)


def test_rows_that_are_done_get_no_corrections() -> None:
    """A row at the data stays there while the others are corrected."""
    grids = torch.tensor([[0.2, 0.2], [0.5, 1.0], [0.8, 1.0], [1.0, 1.0]], dtype=torch.float64)
    z = torch.tensor([[0.4], [1.1]], dtype=torch.float64)
    seen: list[Tensor] = []
    options: dict[str, Any] = {"noise": lambda z: torch.full_like(z, 0.7), "corrections": 2, "snr": 0.3, "eta": 0.0}
    solver = build_solver("predictor_corrector", z, grids, LinearPath(), **options)
    end = solve(solver, lambda z, t: seen.append(z) or 0.4 * z + 0.1)  # type: ignore[func-returns-value]
    assert end[1].item() == pytest.approx(0.4 * 1.1 + 0.1, abs=1e-12)
    alone = build_solver("predictor_corrector", z[:1], grids[:, 0], LinearPath(), **options)
    assert end[0].item() == pytest.approx(solve(alone, lambda z, t: 0.4 * z + 0.1).item(), abs=1e-12)


def test_noise_follows_its_generator() -> None:
    z = torch.zeros(3, 5, dtype=torch.float64)
    expected = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    assert torch.equal(normal(torch.Generator().manual_seed(7))(z), expected)
    assert torch.equal(normal(torch.Generator().manual_seed(7))(z.T.contiguous().T), expected), "strides do not matter"
    torch.manual_seed(7)
    assert torch.equal(normal()(z), expected)


@pytest.mark.parametrize("name", [name for name in SOLVERS if name not in ("langevin", "annealed_langevin")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_grid_per_row_keeps_the_type(name: str, dtype: torch.dtype) -> None:
    """Times come in single precision or better, also where z is shorter."""
    grids = torch.stack([uniform_grid(4), uniform_grid(4).clamp(min=0.25)], 1)
    solver = build_solver(name, torch.ones(2, 3, dtype=dtype), grids, LinearPath())

    def field(z: Tensor, t: Tensor) -> Tensor:
        assert (z.dtype, t.dtype, t.shape) == (dtype, torch.float32, (2, 1))
        return 0.5 * z

    assert solve(solver, field).dtype == dtype


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("heun", r"^solver 'heun' \(it is deterministic\) has no option 'eta' \(it has: end\)$"),
        ("ancestral", r"^solver 'ancestral' has no option 'eta' \(it has: none\)$"),
        ("euler_maruyama", r"^solver 'euler_maruyama' has no option 'eta' \(it has: end, level\)$"),
    ],
)
def test_options_that_a_solver_has(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_solver(name, torch.ones(2, 3), uniform_grid(4), LinearPath(), eta=0.5)


def test_adaptive_steps_keep_to_their_tolerances() -> None:
    """dz/dt = -5 z: a looser tolerance is cheaper and further off; the defaults are 1e-5 and 1e-6."""
    found = {}
    for name, options in {"default": {}, "rtol": {"rtol": 1e-2}, "both": {"rtol": 1e-2, "atol": 1e-2}}.items():
        calls = []
        end = solve_adaptive(lambda z, t, calls=calls: calls.append(1) or -5 * z, torch.ones(3), **options)
        assert end.dtype == torch.float32
        found[name] = len(calls), float((end - math.exp(-5)).abs().max())
    assert found["default"][0] > found["rtol"][0] >= found["both"][0]
    assert found["default"][1] < 2e-6 < found["both"][1]
