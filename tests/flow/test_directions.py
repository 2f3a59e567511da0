"""The family of SDEs in both directions of time, and ancestral sampling with classifier guidance, on Gaussians."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from scipy import integrate
from torch import Tensor

from mmgen.flow import solvers, steps
from mmgen.flow.guide import gradient_of
from mmgen.flow.path import Path
from mmgen.flow.schedule import CosinePath, DDPMPath, LinearBetaPath, LinearPath
from mmgen.flow.solvers import SOLVERS, build_solver, solve
from mmgen.flow.time import uniform_grid
from mmgen.lab.faults import injected
from mmgen.lab.moments import Moments, slopes
from tests.flow.common import PATHS, mixture, start

LEVELS = {"none": "ode", "2(1-t)": lambda path, t: 2 * (1 - t), "sigma": "sigma", "one": "constant"}


def falling(low: float, high: float, count: int) -> Tensor:
    return (low + (high - low) * uniform_grid(count)).flip(0)


def mutated(function: FunctionType, module: ModuleType, old: str, new: str) -> Any:
    """The function with one expression of its source replaced."""
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) >= 1, f"{old!r} is not in {function.__name__}"
    namespace = dict(vars(module))
    exec(source.replace(old, new), namespace)
    return namespace[function.__name__]


def backwards(level: Any, path: Path, low: float = 0.1, high: float = 0.9) -> tuple[list[float], float]:
    """Errors of mean and variance at t = low of data noised from t = high, and the order of convergence."""
    moments = Moments(path)
    errors = [moments.error("euler_maruyama", falling(low, high, n), level=level, end="full") for n in (400, 800, 1600)]
    return errors, slopes(errors)[-1]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("path_name", ["linear", "cosine", "vp"])
def test_falling_times_have_the_marginals_of_the_path(level: str, path_name: str) -> None:
    errors, slope = backwards(LEVELS[level], PATHS[path_name])
    assert errors[-1] < 5e-3
    assert 0.9 < slope < 1.1, errors


@pytest.mark.parametrize("fault", ["sign", "half"])
def test_a_wrong_score_is_detected_in_falling_times(fault: str) -> None:
    with injected(fault):
        errors, _ = backwards("constant", LinearPath())
    assert errors[-1] > 0.05


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            "p, q, s = h + h.abs() * half * by_v",
            "p, q, s = h.abs() + h.abs() * half * by_v",
        ),  # v in the other direction
        ("h + h.abs() * half * by_v, 1 + h.abs() * half * by_z", "h + h * half * by_v, 1 + h * half * by_z"),
        ("half = w.square() / 2", "half = w.square()"),
        ("h.abs().sqrt() * w", "h.abs() * w"),
    ],
)
def test_a_wrong_step_is_detected_in_falling_times(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = SOLVERS["euler_maruyama"]
    wrong = mutated(solvers.euler_maruyama, solvers, old, new)
    monkeypatch.setitem(SOLVERS, "euler_maruyama", type(kind)(wrong, kind.asks, stochastic=True))
    errors, _ = backwards("constant", LinearPath())
    assert errors[-1] > 0.05


@pytest.mark.parametrize("path", [LinearPath(), CosinePath(), LinearBetaPath()], ids=["linear", "cosine", "vp"])
def test_the_noising_sde_needs_no_field(path: Path) -> None:
    """With w = g and falling times the estimate has no weight, and the moments are those of q(z_j | z_k), by scipy."""
    high, low = 0.9, 0.2
    ends = []
    for n in (200, 400, 800):
        z = torch.zeros(n + 1, dtype=torch.float64)  # the weight of z, and of each step's noise
        z[0] = 1.0
        used = iter(torch.eye(n + 1, dtype=torch.float64)[1:])
        nonsense = torch.full_like(z, 1e3)
        solver = build_solver(
            "euler_maruyama", z, falling(low, high, n), path, lambda z, used=used: next(used), level="sde", end="full"
        )
        end = solve(solver, lambda z, t, nonsense=nonsense: nonsense)
        ends.append((float(end[0]), float(end[1:].square().sum())))

    def slope(s: float, y: np.ndarray) -> list[float]:
        t = torch.tensor(1 - s, dtype=torch.float64)
        f, g = float(path.drift(t)), float(path.diffusion(t))
        return [f * y[0], 2 * f * y[1] + g**2]

    exact = integrate.solve_ivp(slope, (1 - high, 1 - low), [1.0, 0.0], rtol=1e-10, atol=1e-12).y[:, -1]
    t = torch.tensor([high, low], dtype=torch.float64)
    (alpha_k, alpha_j), (sigma_k, sigma_j) = path.alpha(t).tolist(), path.sigma(t).tolist()
    ratio = alpha_j / alpha_k
    assert exact == pytest.approx([ratio, sigma_j**2 - (ratio * sigma_k) ** 2], rel=1e-6)
    errors = [max(abs(mean - exact[0]), abs(variance - exact[1])) for mean, variance in ends]
    assert errors[-1] < 5e-3
    assert all(0.9 < order < 1.1 for order in slopes(errors)), errors


def test_the_noising_sde_equals_the_noise_that_diffusers_adds() -> None:
    """On DDPM's own table, from step 1 to step 600, one step of the solver for each step of the table."""
    scheduler, path = DDPMScheduler(), DDPMPath()
    x, k = 0.8, 600
    state = torch.zeros(k + 1, dtype=torch.float64)
    one, none = torch.ones(1), torch.zeros(1)
    state[0] = float(scheduler.add_noise(x * one, none, torch.tensor([0])))  # the mean; noise is weighted after it
    state[1] = float(scheduler.add_noise(none, one, torch.tensor([0])))
    used = iter(torch.eye(k + 1, dtype=torch.float64)[2:])
    times = 1 - torch.arange(1, k + 1, dtype=torch.float64) / path.steps
    end = solve(
        build_solver("euler_maruyama", state, times, path, lambda z: next(used), level="sde", end="full"),
        lambda z, t: z,
    )
    last = torch.tensor([k - 1])
    assert float(end[0]) == pytest.approx(float(scheduler.add_noise(x * one, none, last)), rel=5e-3)
    assert float(end[1:].norm()) == pytest.approx(float(scheduler.add_noise(none, one, last)), rel=5e-3)


def test_noise_and_back_returns_the_marginal() -> None:
    """Falling and then rising times, with different noise rates, end in the marginal from which they began."""
    path, moments = LinearPath(), Moments(LinearPath())
    down, up = falling(0.3, 0.9, 800), falling(0.3, 0.9, 800).flip(0)
    noised = moments.states("euler_maruyama", down, level="sigma", end="full")[-1]
    z = torch.cat([noised, torch.zeros(802, dtype=torch.float64)])
    moments.used = len(noised)
    end = solve(
        build_solver("euler_maruyama", z, up, path, moments.noise, level="constant", end="full"), moments.field("v")
    )
    assert Moments.of(end) == pytest.approx(moments.marginal(torch.tensor(0.9)), abs=5e-3)


def test_falling_times_may_begin_at_the_data_where_no_noise_is_added() -> None:
    """On the linear path the rates `sigma`, `sde` and `ode` vanish at t = 1, where the score diverges."""
    z, times = start(LinearPath()), falling(0.5, 1.0, 8)
    for level in ("sigma", "sde", "ode"):
        end = solve(build_solver("euler_maruyama", z, times, LinearPath(), level=level, end="full"), lambda z, t: -z)
        assert end.isfinite().all()
    for level, path, message in (
        ("constant", LinearPath(), "zero at t = 1"),
        ("sigma", LinearBetaPath(), "v of LinearBetaPath diverges at t = 1"),
    ):
        with pytest.raises(ValueError, match=message):
            next(build_solver("euler_maruyama", z, times, path, level=level, end="full"))
    with pytest.raises(ValueError, match="rise"):
        next(build_solver("euler_maruyama", z, times, LinearPath()))


# Classifier guidance: data N(0.7, 0.25) and an observation y of x with noise N(0, 0.16). Everything is Gaussian.
SEEN, SPREAD = 1.4, 0.4


def pull(moments: Moments, scale: float = 1.0) -> Callable[[Tensor, Tensor], Tensor]:
    """The exact gradient of log p(y | z_t), on the states of `Moments` (the mean first, then weights of noises)."""

    def gradient(z: Tensor, t: Tensor) -> Tensor:
        t = t.reshape(())
        alpha, sigma = moments.path.alpha(t), moments.path.sigma(t)
        total = alpha**2 * moments.std**2 + sigma**2
        gain, variance = alpha * moments.std**2 / total, moments.std**2 * sigma**2 / total
        x = gain * z
        x[0] += (1 - gain * alpha) * moments.mean
        rest = -x
        rest[0] += SEEN
        return scale * gain * rest / (variance + SPREAD**2)

    return gradient


def guided_errors(path: Path, **wrong: Any) -> list[float]:
    moments = Moments(path)
    precision = 1 / moments.std**2 + 1 / SPREAD**2
    exact = (moments.mean / moments.std**2 + SEEN / SPREAD**2) / precision, 1 / precision
    errors = []
    for n in (100, 200, 400):
        gradient = wrong.get("gradient", pull(moments))
        end = moments.end("ancestral", uniform_grid(n), gradient=gradient)
        errors.append(max(abs(a - b) for a, b in zip(end, exact, strict=True)))
    return errors


@pytest.mark.parametrize("path_name", ["linear", "cosine", "vp", "ddpm"])
def test_ancestral_sampling_with_a_classifier_draws_the_posterior(path_name: str) -> None:
    """Mean and variance converge to those of p(x | y), a product of Gaussians, as fast as unguided ones do."""
    errors = guided_errors(PATHS[path_name])
    assert errors[-1] < 0.02
    assert all(0.7 < slope < 1.6 for slope in slopes(errors)), errors


@pytest.mark.parametrize("scale", [-1.0, 0.5, 2.0, 0.0])
def test_a_wrong_weight_of_the_gradient_is_detected(scale: float) -> None:
    assert guided_errors(CosinePath(), gradient=pull(Moments(CosinePath()), scale))[-1] > 0.05


@pytest.mark.parametrize(
    ("old", "new"),
    [("variance[i], gradient", "s[i], gradient"), ("pull(z, t[i])", "pull(z, 1 - t[i])")],
    ids=["deviation for variance", "time"],
)
def test_a_wrong_shift_of_the_mean_is_detected(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solvers, "take", mutated(steps.take, steps, old, new))
    assert guided_errors(CosinePath())[-1] > 0.05


def test_a_guided_step_is_that_of_diffusers_plus_the_variance_times_the_gradient() -> None:
    """Algorithm 1 of Dhariwal and Nichol, with the mean and variance of DDPMScheduler, on its own steps and noise."""
    scheduler = DDPMScheduler(clip_sample=False, variance_type="fixed_small", timestep_spacing="trailing")
    scheduler.set_timesteps(25)
    path, data = DDPMPath(), mixture(DDPMPath())

    def log_likelihood(z: Tensor, t: Tensor) -> Tensor:
        return torch.log_softmax(data.log_joint(z, t), 1)[:, 0]

    gradient, z = gradient_of(log_likelihood, 1.5), start(path)
    count = path.steps
    times = torch.tensor([1 - (int(k) + 1) / count for k in scheduler.timesteps] + [1.0], dtype=torch.float64)
    torch.manual_seed(5)
    drawn = [torch.randn_like(z) for _ in range(25)]
    expected = z.clone()
    for i, k in enumerate(scheduler.timesteps):
        t = times[i]
        eps = path.convert("x", "eps", data.denoised(expected, t), expected, t, 0.0)
        mean = scheduler.step(eps, k, expected, generator=torch.Generator().manual_seed(i)).prev_sample
        if k > 0:
            variance = scheduler._get_variance(k)
            noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(i), dtype=z.dtype)
            mean = mean - variance.sqrt() * noise + variance * gradient(expected, t) + variance.sqrt() * drawn[i]
        expected = mean
    following = iter(drawn)
    solver = build_solver("ancestral", z, times, path, lambda z: next(following), gradient=gradient)
    torch.testing.assert_close(solve(solver, data.denoised), expected, rtol=1e-3, atol=1e-3)
    plain = solve(build_solver("ancestral", z, times, path, lambda z: torch.zeros_like(z)), data.denoised)
    assert float((plain - expected).abs().max()) > 0.1


def test_a_gradient_of_another_shape_raises() -> None:
    with pytest.raises(ValueError, match="gradient must be a function of z and t, not 2"):
        next(build_solver("ancestral", start(LinearPath()), uniform_grid(4), LinearPath(), gradient=2.0))
    with pytest.raises(ValueError, match=r"the gradient has shape \(1, 2\) but the state has shape \(12, 2\)"):
        solve(
            build_solver("ancestral", start(LinearPath()), uniform_grid(4), LinearPath(), gradient=lambda z, t: z[:1]),
            lambda z, t: z,
        )
