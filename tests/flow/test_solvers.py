"""Solvers: order of convergence, ends, samples at different times, precision and refused input."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from scipy import integrate
from torch import Tensor

from mmgen.flow.adaptive import solve_adaptive
from mmgen.flow.bridge import drive
from mmgen.flow.field import Field, FiniteSet, GaussianMixture
from mmgen.flow.guide import Guidance, classifier_free
from mmgen.flow.path import Path
from mmgen.flow.schedule import CosinePath, DDPMPath, LinearBetaPath, LinearPath
from mmgen.flow.solvers import (
    LEVELS,
    SOLVERS,
    TABLEAUX,
    build_solver,
    langevin,
    runge_kutta,
    solve,
)
from mmgen.flow.steps import normal
from mmgen.flow.time import cosine_grid, uniform_grid
from mmgen.lab.data import MEANS
from mmgen.lab.moments import slopes
from tests.flow.common import PATHS, each_path, estimate, mixture, start


def orders(end: Callable[[int], Tensor], truth: Tensor, counts: tuple[int, ...]) -> list[float]:
    return slopes([float((end(n) - truth).abs().mean()) for n in counts])


@cache
def truth(path_name: str, low: float = 0.0, high: float = 1.0) -> Tensor:
    """The end of the exact ODE from `start`, by scipy."""
    path = PATHS[path_name]
    return dop853(mixture(path), start(path), (low, high))


def dop853(data: GaussianMixture, z: Tensor, span: tuple[float, float]) -> Tensor:
    def slope(t: float, y: np.ndarray) -> np.ndarray:
        return data.velocity(torch.from_numpy(y).view(-1, 2), torch.tensor(t, dtype=torch.float64)).flatten().numpy()

    result = integrate.solve_ivp(slope, span, z.flatten().numpy(), method="DOP853", rtol=1e-12, atol=1e-13)
    return torch.from_numpy(result.y[:, -1]).view_as(z)


# The interval of t in which each path's field is smooth enough for the step counts below to show the order. Two paths are
# left out: DDPM's rate jumps at every step, and the field of "cosine, noise of 0.5" curves too strongly near the data.
STRETCH = {
    "linear": (0.0, 1.0),
    "linear to sigma 0.02": (0.0, 0.95),
    "linear, noise of 1.5": (0.0, 1.0),
    "cosine": (0.1, 0.9),
    "cosine, -10 to 8, shifted": (0.1, 0.9),
    "vp": (0.2, 0.9),
    "ve": (0.2, 0.9),
}
ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4, "ddim": 1, "dpmpp_2m": 2}


@pytest.mark.broad
@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("path_name", STRETCH)
def test_order_of_convergence(name: str, path_name: str) -> None:
    path, (low, high) = PATHS[path_name], STRETCH[path_name]
    data, z = mixture(path), start(path)
    options = {"end": "full"} if name in TABLEAUX else {}

    def end(n: int) -> Tensor:
        times = low + (high - low) * uniform_grid(n)
        return solve(build_solver(name, z, times, path, **options), estimate(name, data))

    if name == "dpmpp_2m" and path_name.startswith("linear"):
        low, high = 0.1, 0.9
    counts = (80, 160, 320) if name == "rk4" else (160, 320, 640)
    result = orders(end, truth(path_name, low, high), counts)
    assert max(abs(order - ORDERS[name]) for order in result) < 0.15, result


@pytest.mark.broad
def test_a_shifted_time_changes_the_order() -> None:
    """The convergence test can fail: a velocity evaluated one step too late gives order 1, not 2."""
    path = LinearPath()
    data, z = mixture(path), start(path)

    def end(n: int) -> Tensor:
        solver = runge_kutta(z, uniform_grid(n), scheme="heun", end="full")
        return solve(solver, lambda z, t: data.velocity(z, (t + 1 / n).clamp(max=1)))

    assert abs(orders(end, truth("linear"), (320, 640))[0] - 2) > 0.5


def test_adaptive_steps_equal_scipy() -> None:
    path = LinearPath()
    data, z = mixture(path), start(path)
    result = solve_adaptive(data.velocity, z, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(result, truth("linear"), rtol=1e-6, atol=1e-7)


@each_path
@pytest.mark.parametrize("name", [*TABLEAUX, "ddim", "dpmpp_2m", "euler_maruyama", "ancestral", "predictor_corrector"])
def test_solvers_end_on_the_clean_estimate(name: str, path: Path) -> None:
    data, z = mixture(path), start(path)
    seen: list[tuple[Tensor, Tensor]] = []

    def field(z: Tensor, t: Tensor) -> Tensor:
        seen.append((z, t))
        return estimate(name, data)(z, t)

    options = {"level": "constant"} if name == "euler_maruyama" else {}
    end = solve(build_solver(name, z, uniform_grid(6), path, **options), field)
    torch.testing.assert_close(end, data.denoised(*seen[-1]), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("path_name", ["linear", "vp"])
@pytest.mark.parametrize("name", ["heun", "rk4", "ddim", "dpmpp_2m", "ancestral", "euler_maruyama"])
def test_a_repeated_time_changes_nothing(name: str, path_name: str) -> None:
    """This includes t = 1, where the exact field of a finite set diverges and is not evaluated."""
    if (name, path_name) == ("dpmpp_2m", "vp"):
        pytest.skip("its step after a repeated time is of first order")
    path = PATHS[path_name]
    points = FiniteSet(MEANS, path)
    field = points.velocity if SOLVERS[name].asks == "v" else points.denoised
    ends = []
    for grid in ([0.0, 0.5, 0.8, 1.0], [0.0, 0.0, 0.5, 0.5, 0.8, 1.0, 1.0]):
        times, noise = torch.tensor(grid, dtype=torch.float64), normal(torch.Generator().manual_seed(4))
        ends.append(solve(build_solver(name, start(path), times, path, noise), field))
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)


def test_a_sample_at_its_last_time_gets_no_correction() -> None:
    """Its result is the one it has alone, while the other samples still move."""
    path, z = LinearPath(), start(LinearPath(), 2)
    quiet: Callable[[Tensor], Tensor] = torch.zeros_like
    both = torch.tensor([[0.0, 0.0], [0.3, 0.4], [0.6, 0.7], [0.6, 0.9]], dtype=torch.float64)
    together = solve(build_solver("predictor_corrector", z, both, path, quiet), mixture(path).denoised)
    for i, times in enumerate((both[:3, 0], both[:, 1])):
        alone = solve(build_solver("predictor_corrector", z[i : i + 1], times, path, quiet), mixture(path).denoised)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-12, atol=1e-12)


def test_a_full_scheme_evaluates_every_sample_at_the_last_time() -> None:
    """The last stage of Heun's step is at t = 1, with a grid per sample as with a common grid."""
    path, z, times = LinearPath(), start(LinearPath(), 3), uniform_grid(4)
    data = mixture(path)
    flat = solve(runge_kutta(z, times, end="full"), data.velocity)
    per_sample = solve(runge_kutta(z, torch.stack([times] * 3, 1), end="full"), data.velocity)
    torch.testing.assert_close(per_sample, flat, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in SOLVERS if n not in ("langevin", "annealed_langevin")])
def test_samples_may_be_at_different_times(name: str) -> None:
    """A grid per sample equals a run of each sample with its own grid; samples may begin late and end early."""
    path = LinearPath()
    data, z = mixture(path), start(path, 4)
    one = torch.ones(3, dtype=torch.float64)
    grids = torch.stack([
        uniform_grid(8),
        cosine_grid(8),
        torch.cat([0 * one, uniform_grid(5)]),  # begins after three steps of rest
        torch.cat([uniform_grid(5), one]),  # is done three steps before the others
    ], 1)  # fmt: skip
    quiet = {"noise": lambda z: torch.zeros_like(z)} if SOLVERS[name].stochastic else {}
    field = estimate(name, data)

    def finite(z: Tensor, t: Tensor) -> Tensor:
        assert bool((t < 1).all())  # no evaluation at the data, where fields may diverge
        return field(z, t)

    together = solve(build_solver(name, z, grids, path, **quiet), finite)
    assert together.isfinite().all()
    own = [uniform_grid(8), cosine_grid(8), uniform_grid(5), uniform_grid(5)]
    for i, grid in enumerate(own):
        alone = solve(build_solver(name, z[i : i + 1], grid, path, **quiet), field)
        tolerance = 1e-9 if name != "predictor_corrector" or i < 2 else 1.0  # corrections continue while a sample rests
        torch.testing.assert_close(together[i : i + 1], alone, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["euler", "heun", "euler_maruyama", "ddim", "ancestral", "dpmpp_2m"])
def test_a_sample_with_constant_time_does_not_move(name: str) -> None:
    path = LinearPath()
    data, z = mixture(path), start(path, 2)
    grids = torch.stack([0.9 * uniform_grid(6), torch.full((7,), 0.3, dtype=torch.float64)], 1)
    options = {"end": "full"} if name in TABLEAUX or name == "euler_maruyama" else {}
    end = solve(build_solver(name, z, grids, path, **options), estimate(name, data))
    torch.testing.assert_close(end[1], z[1], rtol=0, atol=1e-15)


def test_a_field_that_returns_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="the field returned shape"):
        solve(runge_kutta(start(LinearPath()), uniform_grid(3)), lambda z, t: z[:1])


@pytest.mark.broad
@pytest.mark.parametrize("path", [LinearPath(), CosinePath(), DDPMPath()], ids=["linear", "cosine", "ddpm"])
@pytest.mark.parametrize("name", [n for n in SOLVERS if n not in ("annealed_langevin", "langevin")])
def test_a_step_does_not_read_values_from_the_device(name: str, path: Path) -> None:
    """Solver, conversion, clipping and guidance work on the meta device, where no value can be read."""
    z = torch.empty(4, 2, device="meta")
    network = Field(path, lambda z, t: z * t, "eps", clean_range=(-1.0, 1.0))
    field = network(SOLVERS[name].asks)

    guidance = Guidance(2.0, (0.1, 0.9), rescale=0.5, renorm=True)

    def guided(z: Tensor, t: Tensor) -> Tensor:
        return classifier_free(field(z, t), field(z, t), t, guidance)

    end = solve(build_solver(name, z, uniform_grid(5), path), guided)
    assert end.device.type == "meta"
    with pytest.raises(RuntimeError):
        float(end.sum())


@pytest.mark.parametrize("name", [n for n in SOLVERS if n not in ("annealed_langevin", "langevin")])
def test_precision_is_that_of_the_state(name: str) -> None:
    z, _ = next(build_solver(name, start(LinearPath()).to(torch.bfloat16), uniform_grid(5), LinearPath()))
    end = solve(build_solver(name, z, uniform_grid(5), LinearPath()), lambda z, t: z * t)
    assert end.dtype == torch.bfloat16
    assert end.isfinite().all()


Z = torch.zeros(4, 2)
ZERO = Field(LinearPath(), lambda z, t: 0 * z)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build_solver("eular", Z, uniform_grid(4), LinearPath()), "unknown solver 'eular'"),
        (lambda: build_solver("euler", Z, uniform_grid(4), LinearPath(), eta=1.0), "deterministic.* no option 'eta'"),
        (lambda: build_solver("ddim", Z, uniform_grid(4), LinearPath(), eta=1.5), r"eta must lie in \[0, 1\]"),
        (lambda: build_solver("euler", Z, torch.tensor([0.0]), LinearPath()), "at least one step"),
        (lambda: build_solver("euler", Z, torch.tensor([0.0, 1.2]), LinearPath()), r"\[0, 1\]"),
        (lambda: build_solver("euler", Z, torch.tensor([0.0, 0.6, 0.5, 1]), LinearPath()), "rise"),
        (lambda: build_solver("euler", Z, torch.tensor([1.0, 0.5, 0.6]), LinearPath(), end="full"), "fall all the way"),
        (lambda: build_solver("ddim", Z, torch.tensor([1.0, 0.0]), LinearPath()), "rise"),
        (lambda: build_solver("euler", Z, torch.zeros(5, 3), LinearPath()), "grid per sample"),
        (lambda: build_solver("euler", Z, uniform_grid(4), LinearPath(), end="soon"), "unknown end 'soon'"),
        (lambda: build_solver("euler", Z, 0.5 * uniform_grid(4), LinearPath()), "times must end at 1"),
        (lambda: build_solver("heun", Z, uniform_grid(4), LinearBetaPath(), end="full"), "diverges at t = 1"),
        (
            lambda: build_solver("euler_maruyama", Z, uniform_grid(4), LinearPath(), level="sde"),
            "diffusion of LinearPath",
        ),
        (lambda: build_solver("euler_maruyama", Z, uniform_grid(4), LinearPath(), level="hot"), "unknown level 'hot'"),
        (lambda: build_solver("predictor_corrector", Z, uniform_grid(4), LinearPath(), corrections=-1), "negative"),
        (lambda: langevin(Z, torch.tensor([0.5]), steps=0), "at least one step"),
        (lambda: runge_kutta(Z, uniform_grid(4), scheme="rk5"), "unknown scheme 'rk5'"),
        (
            lambda: iter([drive(EulerDiscreteScheduler(), Field(LinearPath(), lambda z, t: z), Z, 4)]),
            "is not supported",
        ),
        (lambda: build_solver("langevin", Z, torch.ones(2), LinearPath()), "score of LinearPath diverges"),
        (lambda: build_solver("langevin", Z, torch.tensor([0.5, 1]), LinearPath(), snr=2.0), "signal-to-noise ratio"),
        (lambda: build_solver("annealed_langevin", Z, uniform_grid(4), LinearPath()), "alpha = 1"),
        (lambda: drive(DDIMScheduler(), Field(LinearPath(), lambda z, t: z), Z, 0), "at least one step"),
        (lambda: drive(DDIMScheduler(), Field(LinearPath(), lambda z, t: z), Z, 2.5), "whole number"),
        (lambda: drive(FlowMatchEulerDiscreteScheduler(invert_sigmas=True), ZERO, Z, 4), "from data to noise"),
        (lambda: drive(DDPMScheduler(variance_type="learned_range"), ZERO, Z, 4), "fixed_small"),
        (lambda: drive(DPMSolverMultistepScheduler(prediction_type="flow_prediction"), ZERO, Z, 4), "use_flow_sigmas"),
        (
            lambda: drive(DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing"), ZERO, Z, 4),
            "alpha = 0",
        ),
        (lambda: build_solver("langevin", Z, torch.tensor(0.5), LinearPath()), "must be a list"),
        (lambda: build_solver("euler_maruyama", Z, uniform_grid(4), LinearPath(), level=0.5), "a name"),
        (
            lambda: build_solver(
                "euler_maruyama", Z, uniform_grid(4), LinearPath(), level=lambda p, t: p.sigma(t).view(-1)
            ),
            "one noise rate per time",
        ),
        (
            lambda: build_solver("euler_maruyama", Z, uniform_grid(4), LinearPath(), level=lambda p, t: t - 1),
            "none negative",
        ),
        (lambda: drive(DDIMScheduler(), Field(LinearPath(), lambda z, t: z, clean_range=(1, -1)), Z, 4), "must rise"),
        (lambda: solve_adaptive(lambda z, t: z, Z, method="rk4"), "no adaptive steps"),
        (lambda: solve_adaptive(lambda z, t: z, Z, rtol=0.0), "positive tolerances"),
        (lambda: solve_adaptive(lambda z, t: z, Z, atol=0.0), "positive tolerances"),
        (
            lambda: solve(
                build_solver("ancestral", Z, uniform_grid(4), LinearPath(), lambda z: z[:1]), lambda z, t: 0 * z
            ),
            r"the noise has shape \(1, 2\) but the state has shape \(4, 2\)",
        ),
        (lambda: solve_adaptive(lambda z, t: z, Z, (0.5, 0.5)), "a span"),
    ],
)
def test_bad_input_is_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(call())


def test_noise_rates_by_name() -> None:
    path, t = LinearBetaPath(), torch.tensor([0.2, 0.9], dtype=torch.float64)
    torch.testing.assert_close(LEVELS["sde"](path, t), path.beta(t).sqrt())
    assert torch.equal(LEVELS["ode"](path, t), torch.zeros_like(t))
    assert torch.equal(LEVELS["constant"](path, t), torch.ones_like(t))
    assert torch.equal(LEVELS["sigma"](path, t), path.sigma(t))
