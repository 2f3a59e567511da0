"""AdamW whose per-parameter state also holds averages of the weights, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmgen.config import TrainConfig

EMA = "ema"
Decay = Callable[[int], float]
"""From the number n >= 1 of steps taken to the share of the old average that is kept."""


def exponential(decay: float) -> Decay:
    """A constant decay; early on it is (1 + n) / (10 + n), so that the random start is forgotten."""
    return lambda n: min(decay, (1 + n) / (10 + n))


def power(width: float) -> Decay:
    """Power-function average of relative width sigma_rel: decay (1 - 1/n)^(gamma + 1) (Karras et al. 2024, eq. 127)."""
    gamma = power_exponent(width)
    return lambda n: (1 - 1 / n) ** (gamma + 1)


def power_exponent(width: float) -> float:
    """gamma with sigma_rel = (gamma + 1)^(1/2) (gamma + 2)^-1 (gamma + 3)^(-1/2) (Karras et al. 2024, eq. 126)."""
    low, high = 0.0, 1e7
    for _ in range(200):
        middle = (low + high) / 2
        wide = (middle + 1) ** 0.5 / ((middle + 2) * (middle + 3) ** 0.5) > width
        low, high = (middle, high) if wide else (low, middle)
    return low


def averages(settings: TrainConfig) -> dict[str, Decay]:
    """Every average that the settings ask for, by the name it has in optimiser state and checkpoints."""
    found = {EMA: exponential(settings.ema_decay)}
    found |= {f"{EMA}_{decay:g}": exponential(decay) for decay in settings.ema_more}
    return found | {f"power_{width:g}": power(width) for width in settings.ema_power}


class AveragingAdamW(torch.optim.AdamW):
    """AdamW that keeps averages of each parameter in fp32 beside its moments.

    Being optimiser state, they are sharded, stored and restored like the moments. Under ZeRO the parameters
    that it sees are flat shards, and `step` is called once for each group of them.
    """

    def __init__(self, params: Any, averages: dict[str, Decay], **kwargs: Any) -> None:
        super().__init__(params, **kwargs)
        self.averages = averages
        self.allow: Callable[[list[Tensor]], bool] = lambda stepped: True
        """Asked before each step, with the tensors to be stepped; where it returns false, nothing changes."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One AdamW step, then one step of every average."""
        stepped = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not self.allow(stepped) or not stepped:
            return None
        loss = super().step(closure)
        taken = int(self.state[stepped[0]]["step"])
        weights = [p.detach().float() for p in stepped]
        for name, decay in self.averages.items():
            for p in stepped:
                if name not in self.state[p]:
                    self.state[p][name] = p.detach().float().clone()
            held: list[Tensor] = [self.state[p][name] for p in stepped]
            torch._foreach_lerp_(held, weights, 1 - decay(taken))
        return loss

    def create_state(self, taken: int, tensors: list[Tensor]) -> None:
        """State of `tensors` after `taken` steps, to be filled from a checkpoint."""
        for p in tensors:
            zeros = {kind: torch.zeros_like(p, dtype=torch.float32) for kind in ("exp_avg", "exp_avg_sq")}
            held = {name: p.detach().float().clone() for name in self.averages}
            self.state[p] = {"step": torch.tensor(float(taken), device=p.device), **zeros, **held}

    def swap(self, average: str) -> None:
        """Exchange every stepped tensor with its average, without a copy; a second call exchanges them back."""
        for p, state in self.state.items():
            if average in state:
                p.data, state[average].data = state[average].data, p.data


def build_optimizer(model: nn.Module, settings: TrainConfig) -> AveragingAdamW:
    """Weight decay acts on matrices only; the fused kernel where there is one."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for _, p in named if dimensions(p) >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for _, p in named if dimensions(p) < 2], "weight_decay": 0.0},
    ]
    return AveragingAdamW(groups, averages(settings), lr=settings.lr, betas=settings.betas, fused=True)


def dimensions(p: Tensor) -> int:
    """Number of axes of a parameter, also where ZeRO-3 has left an empty one in its place."""
    return len(getattr(p, "ds_shape", p.shape))


def learning_rate(settings: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine from `lr` to `lr * min_lr_ratio`; `step` counts from 1."""
    if step <= settings.warmup_steps:
        return settings.lr * step / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return settings.lr * (settings.min_lr_ratio + (1 - settings.min_lr_ratio) * cosine)


@contextmanager
def averaged_weights(optimizer: AveragingAdamW, average: str = EMA) -> Iterator[None]:
    """Inside the block every parameter holds its average; afterwards its own value again."""
    optimizer.swap(average)
    try:
        yield
    finally:
        optimizer.swap(average)
