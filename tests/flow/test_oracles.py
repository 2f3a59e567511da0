"""Solvers against diffusers, azula and torchdiffeq, in double precision."""

from __future__ import annotations

from functools import partial
from typing import Any

import azula.denoise
import azula.noise
import azula.sample
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from torch import Tensor

from mmgen.flow.bridge import drive
from mmgen.flow.field import Field, GaussianMixture
from mmgen.flow.path import Path
from mmgen.flow.schedule import DDPMPath, LinearBetaPath, LinearPath
from mmgen.flow.solvers import (
    build_solver,
    runge_kutta,
    solve,
)
from mmgen.flow.time import uniform_grid
from tests.flow.common import PATHS, each_path, mixture, start


@pytest.mark.parametrize("scheme", ["euler", "midpoint", "heun"])  # torchdiffeq's rk4 is the 3/8 rule
def test_runge_kutta_equals_torchdiffeq(scheme: str) -> None:
    from torchdiffeq import odeint

    path = LinearPath()
    data, z, times = mixture(path), start(path), uniform_grid(12)
    method = {"heun": "heun2"}.get(scheme, scheme)
    options = {"perturb": False}
    theirs = odeint(lambda t, y: data.velocity(y, t), z, times, method=method, options=options)[-1]
    ours = solve(runge_kutta(z, times, scheme=scheme, end="full"), data.velocity)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_euler_equals_diffusers(steps: int) -> None:
    """Every step is compared. diffusers runs sigma from 1 to 0 on z = (1 - sigma) x + sigma eps, with velocity eps - x."""
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


def test_heun_equals_diffusers() -> None:
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
    """The scheduler's steps as times: index k is step k + 1 of the table, and the last step goes to the data."""
    steps = 1 - (scheduler.timesteps.double() + 1) / 1000
    return torch.cat([steps, torch.ones(1, dtype=torch.float64)])


@pytest.mark.parametrize("name", ["ddim", "ancestral", "dpmpp_2m"])
def test_variance_preserving_solvers_equal_diffusers(name: str) -> None:
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
    """A path as a schedule of azula, whose time runs from data to noise."""

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


@each_path
@pytest.mark.parametrize("name", ["ddim", "ddim_1", "ddim_half", "ancestral"])
def test_solvers_equal_azula(name: str, path: Path) -> None:
    """azula's eta multiplies the variance; here, as in the paper, eta multiplies the standard deviation."""
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
def test_deterministic_ddim_equals_euler_of_azula(path: Path) -> None:
    """DDIM with eta 0 is Euler's method in (z / alpha, sigma / alpha)."""
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
def test_deterministic_schedulers_of_diffusers_follow_the_ode(name: str, path_name: str) -> None:
    """Each scheduler ends where the exact ODE ends, also where its schedule differs from the path of the field.

    Some schedulers end closer to the data than some paths.
    """
    make, options, tolerance = BRIDGED[name]
    path, z = PATHS[path_name], start(LinearPath(), 200)
    data = mixture(path)
    truth = solve(runge_kutta(z, uniform_grid(200), scheme="rk4"), mixture(LinearPath()).velocity)
    result = drive(make(**options), Field(path, data.velocity), z, 50)
    left = float(path.sigma(torch.ones(())))  # noise that the path keeps at t = 1
    assert float((result - truth).abs().mean()) < tolerance + 1.5 * left


def test_a_scheduler_takes_options_of_set_timesteps_and_half_precision() -> None:
    """Times stay in single precision: rounded to bfloat16, the last one would be t = 1, where v diverges."""
    shifting = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    path, z = LinearPath(), start(LinearPath(), 50)
    result = drive(shifting, Field(path, mixture(path).velocity), z, 60, schedule={"mu": 0.5})
    truth = solve(runge_kutta(z, uniform_grid(200), scheme="rk4"), mixture(path).velocity)
    assert float((result - truth).abs().mean()) < 3e-2
    field = Field(LinearBetaPath(), lambda z, t: z)
    assert drive(FlowMatchEulerDiscreteScheduler(), field, z.bfloat16(), 50).dtype == torch.bfloat16


@pytest.mark.broad
def test_ddpm_scheduler_equals_ancestral_sampling() -> None:
    """With equal noise and the same table, DDPMScheduler and `ancestral` give equal samples."""
    scheduler = DDPMScheduler(clip_sample=False, timestep_spacing="trailing")
    z = start(LinearPath())
    torch.manual_seed(1)
    theirs = drive(scheduler, Field(LinearPath(), mixture(LinearPath()).velocity, clip=1e-9), z, 25)
    path = DDPMPath(scheduler.betas.double())
    torch.manual_seed(1)
    ours = solve(build_solver("ancestral", z, ddpm_times(scheduler), path), mixture(path).denoised)
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3)
