"""Sampling a field with a scheduler of diffusers, also where the two use different noise schedules.

Two points on different paths with the same signal-to-noise ratio are equal up to a factor. The scheduler's
(alpha, sigma) therefore determines a time on the field's path. The network is evaluated at that time, and its output is
converted to the prediction type that the scheduler expects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mmgen.flow.field import Field

# Prediction types of diffusers as functions of (x, z, alpha, sigma). The schedulers' own formulas recover x from these
# values, also where alpha^2 + sigma^2 is not 1.
PREDICTIONS: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "epsilon": lambda x, z, alpha, sigma: (z - alpha * x) / sigma,
    "sample": lambda x, z, alpha, sigma: x,
    "v_prediction": lambda x, z, alpha, sigma: (alpha * z - x) / sigma,
    "flow_prediction": lambda x, z, alpha, sigma: (z - x) / sigma,
}


def alpha_sigma(scheduler: Any, index: int) -> tuple[float, float]:
    """Return (alpha, sigma) of the scheduler's marginal at its `index`-th timestep; call `set_timesteps` first."""
    config = scheduler.config
    if "FlowMatch" in type(scheduler).__name__ or config.get("use_flow_sigmas", False):
        sigma = float(scheduler.sigmas[index])
        return 1 - sigma, sigma
    if hasattr(scheduler, "sigmas"):
        ratio = float(scheduler.sigmas[index])
        alpha = (1 + ratio**2) ** -0.5
        return alpha, ratio * alpha
    kept = float(scheduler.alphas_cumprod[int(scheduler.timesteps[index])])
    return kept**0.5, (1 - kept) ** 0.5


SCHEDULERS = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
)
"""Supported schedulers: those whose state is alpha x + sigma eps with the values of `alpha_sigma`."""


def prediction_type(scheduler: Any) -> str:
    """Return the prediction type that the scheduler expects, one of `PREDICTIONS`.

    Raises:
        ValueError: an unsupported scheduler, or settings of it that no field can satisfy.
    """
    if type(scheduler).__name__ not in SCHEDULERS:
        raise ValueError(f"{type(scheduler).__name__} is not supported: use one of {', '.join(SCHEDULERS)}")
    if "FlowMatch" in type(scheduler).__name__:
        return "flow_prediction"
    kind = str(scheduler.config.prediction_type)
    if kind not in PREDICTIONS:
        raise ValueError(
            f"{type(scheduler).__name__} has prediction_type '{kind}': set it to one of {', '.join(PREDICTIONS)}"
        )
    if kind == "flow_prediction" and not scheduler.config.get("use_flow_sigmas", False):
        raise ValueError(f"{type(scheduler).__name__} needs use_flow_sigmas=True for flow_prediction")
    if str(scheduler.config.get("variance_type", "")).startswith("learned"):
        raise ValueError(
            f"{type(scheduler).__name__} expects a learned variance, which a field does not output: set "
            "variance_type='fixed_small'"
        )
    return kind


def drive(
    scheduler: Any,
    field: Field,
    noise: Tensor,
    steps: int,
    schedule: Mapping[str, Any] | None = None,
    **step_options: Any,
) -> Tensor:
    """Sample from `field` with a scheduler of diffusers.

    Args:
        scheduler: an instance of one of `SCHEDULERS`; its noise schedule may differ from the path of the field.
        field: the network and its path.
        noise: standard normal, of the shape of the samples.
        steps: `num_inference_steps` of the scheduler.
        schedule: further arguments of the scheduler's `set_timesteps`, such as `{"mu": 1.15}` for a shift that depends
            on the resolution.
        step_options: further arguments of the scheduler's `step`, such as `eta` or `generator`.

    Returns:
        The samples, of the shape and type of `noise`.

    Raises:
        ValueError: steps that are not a whole number above 0, an unsupported scheduler, or settings of it that do not
            run from noise to data or do not fit a field.
    """
    if steps < 1 or steps != int(steps):
        raise ValueError(f"a solver needs a whole number of steps, at least one step, got {steps}")
    kind, name = prediction_type(scheduler), type(scheduler).__name__
    predict = PREDICTIONS[kind]
    scheduler.set_timesteps(int(steps), device=noise.device, **(schedule or {}))
    marginals = [alpha_sigma(scheduler, index) for index in range(len(scheduler.timesteps))]
    pairs = torch.tensor(marginals, dtype=torch.float64)
    ratios = 2 * (pairs[:, 0].log() - pairs[:, 1].log())
    if bool((ratios.diff() < 0).any()) or bool((pairs[:, 1] == 0).any()):
        raise ValueError(f"{name} evaluates the network on clean data or runs from data to noise: remove invert_sigmas")
    if kind == "epsilon" and bool((pairs[:, 0] == 0).any()):
        raise ValueError(
            f"{name} divides by alpha = 0 to use an eps prediction: set its prediction_type to v_prediction"
        )
    times = field.path.time_of(ratios).clamp(0, 1)
    # Factors that scale the scheduler's state to the point of our path with the same signal-to-noise ratio. Where the
    # scheduler passes the ends of our path the ratios differ; then the larger part of z is matched, which near the data
    # is the signal.
    by_signal, by_noise = field.path.alpha(times) / pairs[:, 0], field.path.sigma(times) / pairs[:, 1]
    factors = torch.where(ratios > 0, by_signal, by_noise).to(noise.device, noise.dtype)
    times = times.to(noise.device, torch.promote_types(noise.dtype, torch.float32))
    clean, z = field("x"), noise * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for (alpha, sigma), t, factor, timestep in zip(marginals, times, factors, scheduler.timesteps, strict=True):
        x = clean(z * factor, t)
        z = scheduler.step(predict(x, z, alpha, sigma), timestep, z, **step_options).prev_sample
    return z
