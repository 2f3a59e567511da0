"""Solvers without a counterpart in a library, against implementations in plain floats from the papers; limits of settings.

Every evaluation, noise draw and result must agree. `test_oracles` compares the other solvers with diffusers, azula and
torchdiffeq.
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


# Paths are constructed inside the tests, so that the constructors are covered too.
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

Estimate = Callable[[float, float], float]


def clean(z: float, t: float) -> float:
    """An arbitrary denoised estimate; it belongs to no data set, so that no terms cancel."""
    return 0.4 * z + 0.3 * math.sin(3 * t) - 0.2


def velocity(plain: Plain) -> Estimate:
    """The velocity that this estimate implies."""

    def v(z: float, t: float) -> float:
        x = clean(z, t)
        return plain.alpha_slope(t) * x + plain.sigma_slope(t) * (z - plain.alpha(t) * x) / plain.sigma(t)

    return v


def draws() -> Iterator[float]:
    """The noise of the solver and of its reference."""
    return iter([0.7, -1.1, 0.4, 1.6, -0.3, 0.9, -0.8, 0.2, -1.4, 0.6] * 10)


def plain_rk4(plain: Plain, z: float, times: list[float], noise: Iterator[float], estimate: Estimate) -> float:
    for t, u in itertools.pairwise(times):
        h = u - t
        k = estimate(z, t)
        if u == 1:  # the last step gives the clean estimate
            rate = plain.alpha_slope(t) * plain.sigma(t) - plain.alpha(t) * plain.sigma_slope(t)
            return (plain.sigma(t) * k - plain.sigma_slope(t) * z) / rate
        b = estimate(z + h / 2 * k, t + h / 2)
        c = estimate(z + h / 2 * b, t + h / 2)
        z += h / 6 * (k + 2 * b + 2 * c + estimate(z + h * c, u))
    return z


def plain_ddim(eta: float, corrections: int = 0, snr: float = 0.0) -> Callable[..., float]:
    def run(plain: Plain, z: float, times: list[float], noise: Iterator[float], estimate: Estimate) -> float:
        for t, u in itertools.pairwise(times):
            x = estimate(z, t)
            if u == 1:
                return x
            eps = (z - plain.alpha(t) * x) / plain.sigma(t)
            ratio = plain.alpha(t) * plain.sigma(u) / (plain.alpha(u) * plain.sigma(t))
            s = eta * plain.sigma(u) * (1 - ratio**2) ** 0.5
            z = plain.alpha(u) * x + (plain.sigma(u) ** 2 - s**2) ** 0.5 * eps
            if s:
                z += s * next(noise)
            z = plain_langevin(plain, z, u, noise, estimate, corrections, snr)
        return z

    return run


def plain_langevin(
    plain: Plain, z: float, t: float, noise: Iterator[float], estimate: Estimate, count: int, snr: float
) -> float:
    h = 2 * (snr * plain.sigma(t)) ** 2
    for _ in range(count):
        score = (plain.alpha(t) * estimate(z, t) - z) / plain.sigma(t) ** 2
        z += h * score + (2 * h) ** 0.5 * next(noise)
    return z


def plain_maruyama(w: Callable[[Plain, float], float], full: bool = False) -> Callable[..., float]:
    def run(plain: Plain, z: float, times: list[float], noise: Iterator[float], estimate: Estimate) -> float:
        for t, u in itertools.pairwise(times):
            v, h = estimate(z, t), u - t
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
    def run(plain: Plain, z: float, times: list[float], noise: Iterator[float], estimate: Estimate) -> float:
        for t in times[:-1]:
            z = plain_langevin(plain, z, t, noise, estimate, corrections, snr)
        return estimate(z, times[-2])

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
def test_solvers_equal_plain_floats(case: str, make: Callable[[], Path], plain: Plain) -> None:
    """The evaluations, their order, the number of noise draws and the result are equal."""
    path = make()
    name, options, reference = CASES[case]
    if name == "annealed_langevin" and not isinstance(path, VEPath):
        pytest.skip("refused: alpha is not 1")
    estimate = velocity(plain) if SOLVERS[name].asks == "v" else clean
    start = 0.0 if case not in ("maruyama_sde",) and isinstance(path, LinearPath) and path.sigma_min == 0 else 0.1
    times = [start + (1 - start) * share for share in (0.0, 0.15, 0.4, 0.55, 0.8, 1.0)]
    mine, theirs, left, right = list[tuple[float, float]](), list[tuple[float, float]](), draws(), draws()

    def field(z: Tensor, t: Tensor) -> Tensor:
        mine.append((z.item(), t.item()))
        return torch.full_like(z, estimate(*mine[-1]))

    def noted(z: float, t: float) -> float:
        theirs.append((z, t))
        return estimate(z, t)

    noise = {"noise": lambda z: torch.full_like(z, next(left))} if SOLVERS[name].stochastic else {}
    z = torch.full((1, 1), 1.3, dtype=torch.float64)
    result = solve(build_solver(name, z, torch.tensor(times, dtype=torch.float64), path, **noise, **options), field)
    known = reference(plain, 1.3, times, right, noted)
    assert result.item() == pytest.approx(known, rel=1e-6, abs=1e-6)
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-6, abs=1e-6)
    assert next(left) == next(right)
    assert z.item() == 1.3


def test_full_and_falling_grids_equal_plain_floats() -> None:
    """With `end="full"` the last step is like the others and times may fall; Euler-Maruyama has this end too."""
    path, plain = CosinePath(-6, 8, -1.5), PAIRS["cosine_shifted"][1]
    estimate = velocity(plain)
    for times in ([0.2, 0.5, 0.9], [0.9, 0.6, 0.1], [0.3, 1.0]):
        z = torch.full((1, 1), 0.8, dtype=torch.float64)
        grid = torch.tensor(times, dtype=torch.float64)
        field = lambda z, t: torch.full_like(z, estimate(z.item(), t.item()))  # noqa: E731
        result = solve(build_solver("rk4", z, grid, path, end="full"), field)
        shifted = [t if t != 1 else 1 - 1e-13 for t in times]  # the reference jumps at exactly 1
        assert result.item() == pytest.approx(plain_rk4(plain, 0.8, shifted, draws(), estimate), rel=1e-6)
    left = draws()
    options: dict[str, Any] = {"level": "constant", "end": "full", "noise": lambda z: torch.full_like(z, next(left))}
    z, grid = torch.full((1, 1), 0.8, dtype=torch.float64), torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    result = solve(build_solver("euler_maruyama", z, grid, path, **options), field)
    run = plain_maruyama(lambda plain, t: 1.0, full=True)
    assert result.item() == pytest.approx(run(plain, 0.8, [0.2, 0.5, 0.9], draws(), estimate), rel=1e-6)


def test_langevin_equals_plain_floats() -> None:
    path, plain = LinearPath(0.1), PAIRS["sigma_min"][1]
    for options, count, snr in (({}, 1, 0.16), ({"steps": 3, "snr": 0.3}, 3, 0.3)):
        left = draws()
        z = torch.full((1, 1), 0.8, dtype=torch.float64)
        solver = langevin(
            z, double(0.6).view(1), path=path, noise=lambda z, left=left: torch.full_like(z, next(left)), **options
        )
        result = solve(solver, lambda z, t: torch.full_like(z, clean(z.item(), t.item())))
        assert result.item() == pytest.approx(plain_langevin(plain, 0.8, 0.6, draws(), clean, count, snr), rel=1e-12)
    # The defaults are the linear path and noise from torch's default generator.
    torch.manual_seed(0)
    z = torch.zeros(1, 1, dtype=torch.float64)
    result = solve(langevin(z, double(0.6).view(1)), lambda z, t: 0 * z)
    torch.manual_seed(0)
    n = torch.randn(1, 1, dtype=torch.float64)
    torch.testing.assert_close(result, 2 * 0.16 * 0.4 * n)


# --- limits ------------------------------------------------------------------------------------------------


def test_settings_at_their_limits() -> None:
    """The limits of a range are accepted or refused as documented."""
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
    # A log-SNR that the path does not reach gives a time outside [0, 1], not nan.
    assert LinearBetaPath().time_of(double(-math.inf)).item() < 0
    assert DDPMPath([0.1, 0.3, 0.2]).time_of(double(-9.0)).item() < 0
    assert DDPMPath([0.1, 0.3, 0.2]).time_of(double(math.inf)).item() == 1


def test_the_smallest_alpha_or_sigma_of_a_grid() -> None:
    """Half the smallest nonzero alpha or sigma of the times before t = 1."""
    for times, smallest in (([0.0, 0.2, 0.7, 1.0], 0.1), ([0.0, 0.4, 0.9, 1.0], 0.05), ([0.3, 1.0], 0.15)):
        grid = torch.tensor(times, dtype=torch.float64)
        assert LinearPath().smallest_level(grid) == pytest.approx(smallest)
        assert ScaledNoise(LinearPath(), 4.0).smallest_level(grid) == pytest.approx(smallest)


def test_samples_at_the_data_get_no_corrections() -> None:
    """A sample at t = 1 does not move while the others are corrected."""
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
def test_a_grid_per_sample_keeps_the_type(name: str, dtype: torch.dtype) -> None:
    """Times have single precision or better, also where z has less."""
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
        ("ancestral", r"^solver 'ancestral' has no option 'eta' \(it has: gradient\)$"),
        ("euler_maruyama", r"^solver 'euler_maruyama' has no option 'eta' \(it has: end, level\)$"),
    ],
)
def test_an_unknown_option_lists_the_options_of_the_solver(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_solver(name, torch.ones(2, 3), uniform_grid(4), LinearPath(), eta=0.5)


def test_adaptive_steps_keep_to_their_tolerances() -> None:
    """On dz/dt = -5 z a looser tolerance needs fewer evaluations and has a larger error; defaults are 1e-5 and 1e-6."""
    result = {}
    for name, options in {"default": {}, "rtol": {"rtol": 1e-2}, "both": {"rtol": 1e-2, "atol": 1e-2}}.items():
        calls = []
        end = solve_adaptive(lambda z, t, calls=calls: calls.append(1) or -5 * z, torch.ones(3), **options)
        assert end.dtype == torch.float32
        result[name] = len(calls), float((end - math.exp(-5)).abs().max())
    assert result["default"][0] > result["rtol"][0] >= result["both"][0]
    assert result["default"][1] < 2e-6 < result["both"][1]
