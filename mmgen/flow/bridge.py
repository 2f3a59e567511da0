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


def prediction_type(scheduler: Any) -> str:
    """What the scheduler expects of a network."""
    if "FlowMatch" in type(scheduler).__name__:
        return "flow_prediction"
    kind = str(scheduler.config.prediction_type)
    if kind not in PREDICTIONS:
        raise ValueError(f"{type(scheduler).__name__} expects '{kind}' (known: {', '.join(PREDICTIONS)})")
    return kind


def ask(field: Field, z: Tensor, alpha: float, sigma: float, kind: str) -> Tensor:
    """The field's answer at `z` = alpha x + sigma eps, as the prediction type `kind`."""
    path = field.path
    log_snr = 2 * (torch.tensor(alpha, dtype=torch.float64).log() - torch.tensor(sigma, dtype=torch.float64).log())
    t = path.time_of(log_snr).clamp(0, 1).to(z.device, z.dtype)
    ours = z * (path.sigma(t) / sigma)
    x = field("x")(ours, t)
    eps = (z - alpha * x) / sigma
    return PREDICTIONS[kind](x, eps, alpha, sigma)


def drive(scheduler: Any, field: Field, noise: Tensor, steps: int, **step_options: Any) -> Tensor:
    """Sample with a diffusers scheduler from standard normal `noise`; options go to its `step`.

    Raises:
        ValueError: steps < 1, or a scheduler whose prediction type is unknown.
    """
    if steps < 1:
        raise ValueError(f"a sampler needs at least one step, got {steps}")
    kind = prediction_type(scheduler)
    scheduler.set_timesteps(steps, device=noise.device)
    z = noise * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for index, timestep in enumerate(scheduler.timesteps):
        alpha, sigma = level(scheduler, index)
        z = scheduler.step(ask(field, z, alpha, sigma, kind), timestep, z, **step_options).prev_sample
    return z
