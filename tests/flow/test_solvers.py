"""Samplers against diffusers, azula, scipy and torchdiffeq, closed forms and exact moments, all in double precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import azula.denoise
import azula.noise
import azula.sample
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from scipy import integrate
from torch import Tensor

from mmgen.flow.adaptive import solve_adaptive
from mmgen.flow.bridge import drive
from mmgen.flow.field import Field, FiniteSet, GaussianMixture
from mmgen.flow.guide import Guidance, classifier_free
from mmgen.flow.path import Path
from mmgen.flow.schedule import CosinePath, DDPMPath, LinearBetaPath, LinearPath, ScaledNoise, VEPath
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
from mmgen.lab.faults import injected
from mmgen.lab.moments import Moments, slopes

PATHS: dict[str, Path] = {
    "linear": LinearPath(),
    "linear to sigma 0.02": LinearPath(0.02),
    "cosine": CosinePath(),
    "cosine, -10 to 8, shifted": CosinePath(-10.0, 8.0, 2 * math.log(64 / 128)),
    "vp": LinearBetaPath(),
    "ddpm": DDPMPath(),
    "ve": VEPath(0.01, 10.0),
    "linear, noise of 1.5": ScaledNoise(LinearPath(), 1.5),
    "cosine, noise of 0.5": ScaledNoise(CosinePath(), 0.5),
}
each_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def mixture(path: Path) -> GaussianMixture:
    return GaussianMixture(MEANS, 0.3, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), path)


def start(path: Path, rows: int = 12) -> Tensor:
    noise = torch.randn(rows, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return noise * path.sigma(torch.zeros((), dtype=torch.float64))


def answer(name: str, data: GaussianMixture) -> Callable[[Tensor, Tensor], Tensor]:
    return data.velocity if SOLVERS[name].asks == "v" else data.denoised


def orders(end: Callable[[int], Tensor], truth: Tensor, counts: tuple[int, ...]) -> list[float]:
    return slopes([float((end(n) - truth).abs().mean()) for n in counts])


@cache
def truth(path_name: str, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Where the exact ODE takes `start`, by scipy."""
    path = PATHS[path_name]
    return dop853(mixture(path), start(path), (low, high))


def dop853(data: GaussianMixture, z: Tensor, span: tuple[float, float]) -> Tensor:
    def slope(t: float, y: np.ndarray) -> np.ndarray:
        return data.velocity(torch.from_numpy(y).view(-1, 2), torch.tensor(t, dtype=torch.float64)).flatten().numpy()

    found = integrate.solve_ivp(slope, span, z.flatten().numpy(), method="DOP853", rtol=1e-12, atol=1e-13)
    return torch.from_numpy(found.y[:, -1]).view_as(z)


# The stretch in which each path's field is smooth enough for the step counts below to show its order. DDPM's rate jumps at
# every step, and half the noise bends too sharply near the data.
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
        return solve(build_solver(name, z, times, path, **options), answer(name, data))

    if name == "dpmpp_2m" and path_name.startswith("linear"):
        low, high = 0.1, 0.9
    counts = (80, 160, 320) if name == "rk4" else (160, 320, 640)
    found = orders(end, truth(path_name, low, high), counts)
    assert max(abs(order - ORDERS[name]) for order in found) < 0.15, found


@pytest.mark.broad
def test_a_shifted_time_is_noticed() -> None:
    """The convergence test can fail: a velocity asked at the wrong end of each step has order 1, not 2."""
    path = LinearPath()
    data, z = mixture(path), start(path)

    def end(n: int) -> Tensor:
        solver = runge_kutta(z, uniform_grid(n), scheme="heun", end="full")
        return solve(solver, lambda z, t: data.velocity(z, (t + 1 / n).clamp(max=1)))

    assert abs(orders(end, truth("linear"), (320, 640))[0] - 2) > 0.5


@pytest.mark.parametrize("scheme", ["euler", "midpoint", "heun"])  # their rk4 is the 3/8 rule
def test_fixed_steps_are_torchdiffeqs(scheme: str) -> None:
    from torchdiffeq import odeint

    path = LinearPath()
    data, z, times = mixture(path), start(path), uniform_grid(12)
    method = {"heun": "heun2"}.get(scheme, scheme)
    options = {"perturb": False}
    theirs = odeint(lambda t, y: data.velocity(y, t), z, times, method=method, options=options)[-1]
    ours = solve(runge_kutta(z, times, scheme=scheme, end="full"), data.velocity)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_adaptive_steps_reach_the_truth() -> None:
    path = LinearPath()
    data, z = mixture(path), start(path)
    found = solve_adaptive(data.velocity, z, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found, truth("linear"), rtol=1e-6, atol=1e-7)


@each_path
@pytest.mark.parametrize("name", [*TABLEAUX, "ddim", "dpmpp_2m", "euler_maruyama", "ancestral", "predictor_corrector"])
def test_samplers_end_on_the_clean_estimate(name: str, path: Path) -> None:
    data, z = mixture(path), start(path)
    seen: list[tuple[Tensor, Tensor]] = []

    def field(z: Tensor, t: Tensor) -> Tensor:
        seen.append((z, t))
        return answer(name, data)(z, t)

    options = {"level": "constant"} if name == "euler_maruyama" else {}
    end = solve(build_solver(name, z, uniform_grid(6), path, **options), field)
    torch.testing.assert_close(end, data.denoised(*seen[-1]), rtol=1e-8, atol=1e-8)


# --- oracles -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_euler_is_diffusers_euler(steps: int) -> None:
    """Step by step; diffusers runs sigma from 1 to 0 on z = (1 - sigma) x + sigma eps, with velocity eps - x."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    data, z = mixture(LinearPath()), start(LinearPath())
    theirs, seen = z, []
    for i, step in enumerate(scheduler.timesteps):
        velocity = data.velocity(theirs, torch.tensor(i / steps, dtype=torch.float64))
        theirs = scheduler.step(-velocity, step, theirs).prev_sample
        seen.append(theirs)
    path: list[Tensor] = []
    solve(runge_kutta(z, uniform_grid(steps), scheme="euler"), lambda z, t: path.append(z) or data.velocity(z, t))
    for mine, other in zip(path[1:], seen, strict=False):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_heun_is_diffusers_heun() -> None:
    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(10)
    data, z = mixture(LinearPath()), start(LinearPath())
    times = torch.cat([1 - scheduler.sigmas[:1], 1 - scheduler.sigmas[1:-1:2], torch.ones(1)]).double().unique()
    theirs = z
    for i, step in enumerate(scheduler.timesteps):
        velocity = data.velocity(theirs, 1 - scheduler.sigmas[i].double())
        theirs = scheduler.step(-velocity, step, theirs).prev_sample
    ours = solve(runge_kutta(z, times, scheme="heun"), data.velocity)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def ddpm_times(scheduler: Any) -> Tensor:
    """The scheduler's steps as times: its index k is step k + 1 of the table, and after the last one comes the data."""
    steps = 1 - (scheduler.timesteps.double() + 1) / 1000
    return torch.cat([steps, torch.ones(1, dtype=torch.float64)])


@pytest.mark.parametrize("name", ["ddim", "ancestral", "dpmpp_2m"])
def test_vp_samplers_are_diffusers(name: str) -> None:
    common = {"timestep_spacing": "trailing", "prediction_type": "epsilon"}
    scheduler: Any = {
        "ddim": partial(DDIMScheduler, clip_sample=False, set_alpha_to_one=True),
        "ancestral": partial(DDPMScheduler, clip_sample=False),
        "dpmpp_2m": partial(DPMSolverMultistepScheduler, final_sigmas_type="zero"),
    }[name](**common)
    steps = 20
    scheduler.set_timesteps(steps)
    times, path = ddpm_times(scheduler), DDPMPath(scheduler.betas.double())
    data = mixture(path)
    z = start(LinearPath())
    theirs = z
    torch.manual_seed(5)
    for k in scheduler.timesteps:
        t = 1 - (k.double() + 1) / 1000
        eps = path.convert("x", "eps", data.denoised(theirs, t), theirs, t, 0.0)
        theirs = scheduler.step(eps, k, theirs).prev_sample
    torch.manual_seed(5)
    ours = solve(build_solver(name, z, times, path), data.denoised)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


class _Schedule(azula.noise.Schedule):  # type: ignore[misc]
    """Our path as azula's schedule, whose time runs from data to noise."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.path.alpha(1 - t), self.path.sigma(1 - t)


class _Denoiser(azula.denoise.Denoiser):  # type: ignore[misc]
    def __init__(self, data: GaussianMixture) -> None:
        super().__init__()
        self.schedule, self.data = _Schedule(data.path), data

    def forward(self, x_t: Tensor, t: Tensor, **_: Any) -> Any:
        return azula.denoise.DiracPosterior(self.data.denoised(x_t, 1 - t))


@pytest.mark.parametrize("path_name", ["linear", "vp"])
@pytest.mark.parametrize("name", ["heun", "rk4", "ddim", "dpmpp_2m", "ancestral", "euler_maruyama"])
def test_a_time_that_is_repeated_changes_nothing(name: str, path_name: str) -> None:
    """Also at the data, where the exact field of points has no value and is not asked."""
    if (name, path_name) == ("dpmpp_2m", "vp"):
        pytest.skip("its step after a repeated time is of first order")
    path = PATHS[path_name]
    points = FiniteSet(MEANS, path)
    ask = points.velocity if SOLVERS[name].asks == "v" else points.denoised
    ends = []
    for grid in ([0.0, 0.5, 0.8, 1.0], [0.0, 0.0, 0.5, 0.5, 0.8, 1.0, 1.0]):
        times, noise = torch.tensor(grid, dtype=torch.float64), normal(torch.Generator().manual_seed(4))
        ends.append(solve(build_solver(name, start(path), times, path, noise), ask))
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)


def test_a_row_at_its_own_end_is_corrected_no_more() -> None:
    """It gives what it gives alone, whatever the other rows do."""
    path, z = LinearPath(), start(LinearPath(), 2)
    quiet: Callable[[Tensor], Tensor] = torch.zeros_like
    both = torch.tensor([[0.0, 0.0], [0.3, 0.4], [0.6, 0.7], [0.6, 0.9]], dtype=torch.float64)
    together = solve(build_solver("predictor_corrector", z, both, path, quiet), mixture(path).denoised)
    for row, times in enumerate((both[:3, 0], both[:, 1])):
        alone = solve(build_solver("predictor_corrector", z[row : row + 1], times, path, quiet), mixture(path).denoised)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-12, atol=1e-12)


def test_a_full_scheme_asks_every_row_at_its_end() -> None:
    """The last stage of Heun's step stands at t = 1, for a grid per row as for one grid."""
    path, z, times = LinearPath(), start(LinearPath(), 3), uniform_grid(4)
    data = mixture(path)
    flat = solve(runge_kutta(z, times, end="full"), data.velocity)
    rows = solve(runge_kutta(z, torch.stack([times] * 3, 1), end="full"), data.velocity)
    torch.testing.assert_close(rows, flat, rtol=1e-12, atol=1e-12)


@each_path
@pytest.mark.parametrize("name", ["ddim", "ddim_1", "ddim_half", "ancestral"])
def test_samplers_are_azulas(name: str, path: Path) -> None:
    """azula's eta multiplies the variance, ours (as in the paper) the standard deviation."""
    data, z, steps = mixture(path), start(path), 15
    eta = {"ddim_1": 1.0, "ddim_half": 0.5}.get(name, 0.0)
    common = {"steps": steps, "silent": True, "dtype": torch.float64, "start": 0.99, "stop": 0.02}
    theirs: Any = (
        azula.sample.DDPMSampler(_Denoiser(data), **common)
        if name == "ancestral"
        else azula.sample.DDIMSampler(_Denoiser(data), eta=eta**2, **common)
    )
    states: list[Tensor] = []
    pairs = theirs.timesteps.unfold(0, 2, 1)
    torch.manual_seed(7)
    x = z
    for t, s in pairs[:-1]:
        x = theirs.step(x, t, s)
        if name == "ddim":
            torch.manual_seed(7)
        states.append(x)
    seen: list[Tensor] = []
    torch.manual_seed(7)
    options = {} if name == "ancestral" else {"eta": eta}
    solver = build_solver(name.split("_")[0], z, 1 - theirs.timesteps, path, **options)
    solve(solver, lambda z, t: seen.append(z) or data.denoised(z, t))
    for mine, other in zip(seen[1:], states, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-9)


@each_path
def test_deterministic_ddim_is_azulas_euler(path: Path) -> None:
    """DDIM(0) is Euler in (z / alpha, sigma / alpha)."""
    data, z = mixture(path), start(path)
    theirs = azula.sample.EulerSampler(
        _Denoiser(data), steps=9, silent=True, dtype=torch.float64, start=0.99, stop=0.02
    )
    ours = solve(build_solver("ddim", z, 1 - theirs.timesteps, path), data.denoised)
    torch.testing.assert_close(ours, theirs(z), rtol=1e-8, atol=1e-9)


BRIDGED = {
    "flow euler": (FlowMatchEulerDiscreteScheduler, {}, 2e-2),
    "flow heun": (FlowMatchHeunDiscreteScheduler, {}, 1e-3),
    "ddim": (DDIMScheduler, {"clip_sample": False, "timestep_spacing": "trailing"}, 3e-2),
    "ddim v": (DDIMScheduler, {"clip_sample": False, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}, 3e-2),
    "ddim x": (DDIMScheduler, {"clip_sample": False, "timestep_spacing": "trailing", "prediction_type": "sample"}, 3e-2),
    "dpm": (DPMSolverMultistepScheduler, {"timestep_spacing": "trailing"}, 1e-2),
    "dpm v on flow": (DPMSolverMultistepScheduler, {"use_flow_sigmas": True, "prediction_type": "v_prediction"}, 1e-2),
    "dpm flow": (DPMSolverMultistepScheduler, {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, 1e-2),
}  # fmt: skip


@pytest.mark.broad
@pytest.mark.parametrize("name", BRIDGED)
@pytest.mark.parametrize("path_name", PATHS)
def test_schedulers_of_diffusers_drive_our_field(name: str, path_name: str) -> None:
    """Each deterministic scheduler ends where the exact ODE ends, though made for another path than the field.

    Some of theirs go nearer to the data than some of ours.
    """
    make, options, tolerance = BRIDGED[name]
    path, z = PATHS[path_name], start(LinearPath(), 200)
    data = mixture(path)
    truth = solve(runge_kutta(z, uniform_grid(200), scheme="rk4"), mixture(LinearPath()).velocity)
    found = drive(make(**options), Field(path, data.velocity), z, 50)
    left = float(path.sigma(torch.ones(())))  # noise that the path itself leaves in its data
    assert float((found - truth).abs().mean()) < tolerance + 1.5 * left


def test_a_scheduler_takes_options_for_its_times_and_half_precision() -> None:
    """Times are told apart in single precision: in bfloat16 the last one would be the data's, where v diverges."""
    shifting = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    path, z = LinearPath(), start(LinearPath(), 50)
    found = drive(shifting, Field(path, mixture(path).velocity), z, 60, schedule={"mu": 0.5})
    truth = solve(runge_kutta(z, uniform_grid(200), scheme="rk4"), mixture(path).velocity)
    assert float((found - truth).abs().mean()) < 3e-2
    field = Field(LinearBetaPath(), lambda z, t: z)
    assert drive(FlowMatchEulerDiscreteScheduler(), field, z.bfloat16(), 50).dtype == torch.bfloat16


@pytest.mark.broad
def test_ddpm_scheduler_drives_our_field() -> None:
    """The same noise gives the sample of our own ancestral sampler on the same table."""
    scheduler = DDPMScheduler(clip_sample=False, timestep_spacing="trailing")
    z = start(LinearPath())
    torch.manual_seed(1)
    theirs = drive(scheduler, Field(LinearPath(), mixture(LinearPath()).velocity, clip=1e-9), z, 25)
    path = DDPMPath(scheduler.betas.double())
    torch.manual_seed(1)
    ours = solve(build_solver("ancestral", z, ddpm_times(scheduler), path), mixture(path).denoised)
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3)


# --- exact moments -----------------------------------------------------------------------------------------


FAMILY: dict[str, Any] = {
    "none": "ode",
    "sqrt(2(1-t))": lambda path, t: (2 * (1 - t)).sqrt(),
    "2(1-t)": lambda path, t: 2 * (1 - t),
    "one": "constant",
    "sigma": "sigma",
}


@pytest.mark.broad
@pytest.mark.parametrize("level", FAMILY)
@pytest.mark.parametrize("path_name", ["linear", "cosine"])
def test_every_member_of_the_family_has_the_marginals(level: str, path_name: str) -> None:
    moments = Moments(PATHS[path_name])
    low, high = (0.0, 0.9) if path_name == "linear" else (0.05, 0.95)
    errors = [
        moments.error("euler_maruyama", low + (high - low) * uniform_grid(n), level=FAMILY[level], end="full")
        for n in (400, 800, 1600)
    ]
    assert errors[-1] < 5e-3
    assert all(0.9 < slope < 1.1 for slope in slopes(errors)), errors


@pytest.mark.broad
def test_the_reverse_sde_has_the_marginals() -> None:
    """w = g: on the variance-preserving path, from nearly pure noise."""
    moments = Moments(LinearBetaPath())
    errors = [
        moments.error("euler_maruyama", 0.01 + 0.9 * uniform_grid(n), level="sde", end="full") for n in (800, 1600)
    ]
    assert errors[-1] < 5e-3
    assert 0.9 < slopes(errors)[0] < 1.1


@pytest.mark.broad
@pytest.mark.parametrize(
    ("name", "options"),
    [("ancestral", {}), ("ddim", {"eta": 0.0}), ("ddim", {"eta": 0.6}), ("ddim", {"eta": 1.0})],
)
@pytest.mark.parametrize("path_name", [name for name in PATHS if "shifted" not in name])
def test_stochastic_samplers_converge_to_the_data(name: str, options: dict[str, Any], path_name: str) -> None:
    """Where the path ends with little noise: the clean estimate, on which they end, lacks its variance."""
    moments = Moments(PATHS[path_name])
    errors = [moments.error(name, uniform_grid(n), **options) for n in (100, 200, 400)]
    assert errors[-1] < 0.02
    assert all(0.75 < slope < 2.2 for slope in slopes(errors)), errors


@pytest.mark.broad
@each_path
def test_corrections_bring_a_sampler_closer(path: Path) -> None:
    """A predictor without corrections is ancestral sampling; each Langevin step pulls toward the marginal."""
    moments, times = Moments(path), uniform_grid(200)
    plain = moments.error("ancestral", times)
    assert moments.error("predictor_corrector", times, corrections=0) == pytest.approx(plain, rel=0.05)
    errors = [moments.error("predictor_corrector", times, corrections=n, snr=0.1) for n in (1, 3)]
    assert errors[1] < errors[0] < plain


def test_ancestral_is_ddim_with_eta_one() -> None:
    """N(0, 0.25) on the cosine path: the same moments, and the same draws from the same seed."""
    path = CosinePath()
    pairs: tuple[tuple[str, dict[str, float]], ...] = (("ancestral", {}), ("ddim", {"eta": 1.0}))
    variances = []
    for name, options in pairs:
        states = Moments(path, 0.0, 0.5).states(name, uniform_grid(50), **options)[:-1]
        variances.append([Moments.of(z)[1] for z in states])
    assert variances[0] == pytest.approx(variances[1], rel=1e-5)
    data, z, seen = mixture(path), start(path), []
    for name, options in pairs:
        torch.manual_seed(3)
        states = []
        solver = build_solver(name, z, uniform_grid(20), path, **options)
        end = solve(solver, lambda z, t, states=states: states.append(z) or data.denoised(z, t))
        seen.append([*states, end])
    for a, b in zip(seen[0][:-1], seen[1][:-1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(seen[0][-1], seen[1][-1], rtol=1e-3, atol=1e-3)


@pytest.mark.broad
def test_langevin_keeps_the_marginal() -> None:
    """Corrections at one time leave its variance, up to the square of their size."""
    path, time = LinearPath(), 0.6
    moments = Moments(path)
    errors = []
    for snr in (0.2, 0.1, 0.05):
        mean, variance = moments.end("langevin", torch.tensor([time, time], dtype=torch.float64), snr=snr, steps=400)
        wanted = time**2 * 0.25 + (1 - time) ** 2
        assert mean == pytest.approx(time * 0.7, abs=1e-9)
        errors.append(abs(variance - wanted))
    assert errors[-1] < 2e-3
    assert all(1.8 < slope < 2.3 for slope in slopes(errors)), errors


@pytest.mark.slow
def test_annealed_langevin_reaches_the_data() -> None:
    path = VEPath(0.01, 10.0)
    moments = Moments(path)
    ends = [moments.end("annealed_langevin", uniform_grid(60), corrections=n, snr=0.2) for n in (20, 80, 320)]
    assert [mean for mean, _ in ends] == pytest.approx([0.7] * 3, abs=1e-9)
    # Where sigma is far below the data's own width a level mixes too slowly; more corrections bring it home.
    errors = [variance - 0.25 for _, variance in ends]
    assert errors[0] > errors[1] > errors[2] > 0
    assert errors[2] < 2e-3


# --- faults: each check above turns red --------------------------------------------------------------------


def family_error(level: Any) -> float:
    return Moments(LinearPath()).error("euler_maruyama", 0.96 * uniform_grid(800), level=level, end="full")


@pytest.mark.broad
def test_a_dropped_half_is_noticed() -> None:
    assert family_error("constant") < 5e-3
    with injected("half"):
        assert family_error("constant") > 5e-3


@pytest.mark.broad
@pytest.mark.parametrize("fault", ["no minus s^2", "sign of the score", "shifted t"])
def test_faults_of_stochastic_samplers_are_noticed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    moments, times = Moments(CosinePath()), uniform_grid(400)
    healthy = moments.error("ddim", times, eta=1.0)
    field = moments.field

    def wrong(kind: str) -> Callable[[Tensor, Tensor], Tensor]:
        inner = field(kind)
        if fault == "shifted t":
            return lambda z, t: inner(z, (t - 0.01).clamp(min=0))
        return lambda z, t: 2 * z / moments.path.alpha(t) - inner(z, t)

    with injected("minus_s2" if fault == "no minus s^2" else None):
        if fault != "no minus s^2":
            monkeypatch.setattr(moments, "field", wrong)
        assert moments.error("ddim", times, eta=1.0) > 3 * healthy


# --- the protocol ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in SOLVERS if n not in ("langevin", "annealed_langevin")])
def test_rows_may_stand_at_different_times(name: str) -> None:
    """A grid per row gives what each row's own grid gives; rows may begin late and arrive early."""
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
    field = answer(name, data)

    def finite(z: Tensor, t: Tensor) -> Tensor:
        assert bool((t < 1).all())  # nobody is asked at the data, where fields may be singular
        return field(z, t)

    together = solve(build_solver(name, z, grids, path, **quiet), finite)
    assert together.isfinite().all()
    own = [uniform_grid(8), cosine_grid(8), uniform_grid(5), uniform_grid(5)]
    for row, grid in enumerate(own):
        alone = solve(build_solver(name, z[row : row + 1], grid, path, **quiet), field)
        tolerance = 1e-9 if name != "predictor_corrector" or row < 2 else 1.0  # corrections go on while a row waits
        torch.testing.assert_close(together[row : row + 1], alone, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["euler", "heun", "euler_maruyama", "ddim", "ancestral", "dpmpp_2m"])
def test_a_row_whose_time_stands_still_does_not_move(name: str) -> None:
    path = LinearPath()
    data, z = mixture(path), start(path, 2)
    grids = torch.stack([0.9 * uniform_grid(6), torch.full((7,), 0.3, dtype=torch.float64)], 1)
    options = {"end": "full"} if name in TABLEAUX or name == "euler_maruyama" else {}
    end = solve(build_solver(name, z, grids, path, **options), answer(name, data))
    torch.testing.assert_close(end[1], z[1], rtol=0, atol=1e-15)


def test_a_field_that_answers_in_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="answered"):
        solve(runge_kutta(start(LinearPath()), uniform_grid(3)), lambda z, t: z[:1])


@pytest.mark.broad
@pytest.mark.parametrize("path", [LinearPath(), CosinePath(), DDPMPath()], ids=["linear", "cosine", "ddpm"])
@pytest.mark.parametrize("name", [n for n in SOLVERS if n not in ("annealed_langevin", "langevin")])
def test_a_step_never_waits_for_the_device(name: str, path: Path) -> None:
    """On the meta device no value can be read: sampler, conversion, clipping and guidance must do without."""
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
        (lambda: build_solver("euler", Z, torch.zeros(5, 3), LinearPath()), "grid per row"),
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
            "not among the known",
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
            "signal of zero",
        ),
        (lambda: build_solver("langevin", Z, torch.tensor(0.5), LinearPath()), "must be a list"),
        (lambda: build_solver("euler_maruyama", Z, uniform_grid(4), LinearPath(), level=0.5), "a name"),
        (
            lambda: build_solver(
                "euler_maruyama", Z, uniform_grid(4), LinearPath(), level=lambda p, t: p.sigma(t).view(-1)
            ),
            "as many rates",
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
            r"the noise has the shape \(1, 2\), the state \(4, 2\)",
        ),
        (lambda: solve_adaptive(lambda z, t: z, Z, (0.5, 0.5)), "a span"),
    ],
)
def test_bad_input_is_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(call())


def test_levels_are_what_their_names_say() -> None:
    path, t = LinearBetaPath(), torch.tensor([0.2, 0.9], dtype=torch.float64)
    torch.testing.assert_close(LEVELS["sde"](path, t), path.beta(t).sqrt())
    assert torch.equal(LEVELS["ode"](path, t), torch.zeros_like(t))
    assert torch.equal(LEVELS["constant"](path, t), torch.ones_like(t))
    assert torch.equal(LEVELS["sigma"](path, t), path.sigma(t))
