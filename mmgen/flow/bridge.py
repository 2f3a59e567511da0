"""A field of ours driven by a scheduler of diffusers, whatever noise schedule either was made for.

Two points on different paths with the same signal-to-noise ratio are the same point up to a factor. So the scheduler's
(alpha, sigma) name a time of our path, the network is asked there, and its answer is handed over in the
scheduler's own prediction type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mmgen.flow.field import Field

# Their prediction types, from (x, z, alpha, sigma): what their own formulas turn back into x, also where
# alpha^2 + sigma^2 is not 1.
PREDICTIONS: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "epsilon": lambda x, z, alpha, sigma: (z - alpha * x) / sigma,
    "sample": lambda x, z, alpha, sigma: x,
    "v_prediction": lambda x, z, alpha, sigma: (alpha * z - x) / sigma,
    "flow_prediction": lambda x, z, alpha, sigma: (z - x) / sigma,
}


def level(scheduler: Any, index: int) -> tuple[float, float]:
    """(alpha, sigma) of the scheduler's marginal at its `index`-th timestep; `set_timesteps` was called."""
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
"""Schedulers whose state is alpha x + sigma eps as `level` says; others scale it in ways of their own."""


def prediction_type(scheduler: Any) -> str:
    """What the scheduler expects of a network."""
    if type(scheduler).__name__ not in SCHEDULERS:
        raise ValueError(f"{type(scheduler).__name__} is not among the known schedulers: {', '.join(SCHEDULERS)}")
    if "FlowMatch" in type(scheduler).__name__:
        return "flow_prediction"
    kind = str(scheduler.config.prediction_type)
    if kind not in PREDICTIONS:
        raise ValueError(f"{type(scheduler).__name__} expects '{kind}' (known: {', '.join(PREDICTIONS)})")
    if kind == "flow_prediction" and not scheduler.config.get("use_flow_sigmas", False):
        raise ValueError(f"{type(scheduler).__name__} needs use_flow_sigmas=True for flow_prediction")
    if str(scheduler.config.get("variance_type", "")).startswith("learned"):
        raise ValueError(f"a field gives no variances: set variance_type='fixed_small' in {type(scheduler).__name__}")
    return kind


def drive(
    scheduler: Any,
    field: Field,
    noise: Tensor,
    steps: int,
    schedule: Mapping[str, Any] | None = None,
    **step_options: Any,
) -> Tensor:
    """Sample with a diffusers scheduler from standard normal `noise`; options go to its `step`.

    `schedule` goes to its `set_timesteps`, as `{"mu": 1.15}` for shifts that depend on the resolution.

    Raises:
        ValueError: steps that are no whole number above 0, an unknown scheduler, or settings of it that do not run from
            noise to data or cannot say what the network means.
    """
    if steps < 1 or steps != int(steps):
        raise ValueError(f"a sampler needs a whole number of steps, at least one step, got {steps}")
    kind, name = prediction_type(scheduler), type(scheduler).__name__
    predict = PREDICTIONS[kind]
    scheduler.set_timesteps(int(steps), device=noise.device, **(schedule or {}))
    levels = [level(scheduler, index) for index in range(len(scheduler.timesteps))]
    pairs = torch.tensor(levels, dtype=torch.float64)
    ratios = 2 * (pairs[:, 0].log() - pairs[:, 1].log())
    if bool((ratios.diff() < 0).any()) or bool((pairs[:, 1] == 0).any()):
        raise ValueError(f"{name} asks about clean data or goes from data to noise: leave invert_sigmas out")
    if kind == "epsilon" and bool((pairs[:, 0] == 0).any()):
        raise ValueError(f"{name} divides by a signal of zero to use eps: set its prediction_type to v_prediction")
    times = field.path.time_of(ratios).clamp(0, 1)
    # Theirs to ours at the same signal-to-noise ratio. Where they go beyond the ends of our path, the larger part of z
    # is matched: at the data it is the signal.
    by_signal, by_noise = field.path.alpha(times) / pairs[:, 0], field.path.sigma(times) / pairs[:, 1]
    factors = torch.where(ratios > 0, by_signal, by_noise).to(noise.device, noise.dtype)
    times = times.to(noise.device, torch.promote_types(noise.dtype, torch.float32))
    clean, z = field("x"), noise * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for (alpha, sigma), t, factor, timestep in zip(levels, times, factors, scheduler.timesteps, strict=True):
        x = clean(z * factor, t)
        answer = predict(x, z, alpha, sigma)
        z = scheduler.step(answer, timestep, z, **step_options).prev_sample
    return z
