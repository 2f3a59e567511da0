"""A field of ours driven by a scheduler of diffusers, whatever noise schedule either was made for.

Two points on different paths with the same signal-to-noise ratio are the same point up to a factor. So the scheduler's
(alpha, sigma) name a time of our path, the network is asked there, and its answer is handed over in the
scheduler's own prediction type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmgen.flow.field import Field

# Their prediction types, from (x, eps, alpha, sigma).
PREDICTIONS: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "epsilon": lambda x, eps, alpha, sigma: eps,
    "sample": lambda x, eps, alpha, sigma: x,
    "v_prediction": lambda x, eps, alpha, sigma: alpha * eps - sigma * x,
    "flow_prediction": lambda x, eps, alpha, sigma: eps - x,
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
    return kind


def drive(scheduler: Any, field: Field, noise: Tensor, steps: int, **step_options: Any) -> Tensor:
    """Sample with a diffusers scheduler from standard normal `noise`; options go to its `step`.

    Raises:
        ValueError: steps < 1, an unknown scheduler, or one whose prediction type is unknown.
    """
    if steps < 1:
        raise ValueError(f"a sampler needs at least one step, got {steps}")
    predict = PREDICTIONS[prediction_type(scheduler)]
    scheduler.set_timesteps(steps, device=noise.device)
    levels = [level(scheduler, index) for index in range(len(scheduler.timesteps))]
    pairs = torch.tensor(levels, dtype=torch.float64)
    times = field.path.time_of(2 * (pairs[:, 0].log() - pairs[:, 1].log())).clamp(0, 1)
    factors = field.path.sigma(times) / pairs[:, 1]  # theirs to ours, at the same signal-to-noise ratio
    times, factors = times.to(noise.device, noise.dtype), factors.to(noise.device, noise.dtype)
    clean, z = field("x"), noise * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for (alpha, sigma), t, factor, timestep in zip(levels, times, factors, scheduler.timesteps, strict=True):
        x = clean(z * factor, t)
        answer = predict(x, (z - alpha * x) / sigma, alpha, sigma)
        z = scheduler.step(answer, timestep, z, **step_options).prev_sample
    return z
