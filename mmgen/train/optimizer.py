"""AdamW whose per-parameter state also holds the averaged weights, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmgen.config import TrainConfig

EMA = "ema"


class EMAAdamW(torch.optim.AdamW):
    """AdamW that keeps an exponential moving average of each parameter in fp32 beside its moments.

    Being optimiser state, the average is stored, restored and (once sharded) distributed like the moments.
    Early on the decay is (1 + n) / (10 + n), so that the random start is forgotten.
    """

    def __init__(self, params: Any, ema_decay: float, **kwargs: Any) -> None:
        super().__init__(params, **kwargs)
        self.ema_decay = ema_decay

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One AdamW step, then one step of the average."""
        loss = super().step(closure)
        parameters = [p for group in self.param_groups for p in group["params"] if p in self.state]
        for p in parameters:
            if EMA not in self.state[p]:
                self.state[p][EMA] = p.detach().float().clone()
        taken = int(self.state[parameters[0]]["step"])
        decay = min(self.ema_decay, (1 + taken) / (10 + taken))
        averages: list[Tensor] = [self.state[p][EMA] for p in parameters]
        torch._foreach_lerp_(averages, [p.detach().float() for p in parameters], 1 - decay)
        return loss


def build_optimizer(model: nn.Module, settings: TrainConfig) -> EMAAdamW:
    """Weight decay acts on matrices only; CUDA uses the fused kernel."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    return EMAAdamW(groups, settings.ema_decay, lr=settings.lr, betas=settings.betas, fused=True)


def learning_rate(settings: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine from `lr` to `lr * min_lr_ratio`; `step` counts from 1."""
    if step <= settings.warmup_steps:
        return settings.lr * step / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return settings.lr * (settings.min_lr_ratio + (1 - settings.min_lr_ratio) * cosine)


@contextmanager
def averaged_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside the block every parameter holds its average; afterwards its own value again."""
    pairs = [(p, state[EMA]) for p, state in optimizer.state.items() if EMA in state]
    kept = [p.detach().clone() for p, _ in pairs]
    try:
        for p, average in pairs:
            p.data.copy_(average)
        yield
    finally:
        for (p, _), own in zip(pairs, kept, strict=True):
            p.data.copy_(own)
