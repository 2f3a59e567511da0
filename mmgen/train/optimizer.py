"""AdamW and Muon with averaged weights (EMA) in their state, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmgen.config import TrainConfig
from mmgen.train import muon

EMA = "ema"
Decay = Callable[[int], float]
"""Maps the number n >= 1 of steps taken to the weight of the old average in the new one."""


def exponential(decay: float) -> Decay:
    """A constant decay; at first it is (1 + n) / (10 + n), so that the random initial weights lose their influence.

    The start is that of TensorFlow's `ExponentialMovingAverage` with `num_updates`.
    """
    return lambda n: min(decay, (1 + n) / (10 + n))


def power(width: float) -> Decay:
    """The decay (1 - 1/n)^(gamma + 1) of a power-function EMA of width sigma_rel (Karras et al. 2024, eq. 127)."""
    gamma = power_exponent(width)
    return lambda n: (1 - 1 / n) ** (gamma + 1)


def power_exponent(width: float) -> float:
    """gamma, where sigma_rel = (gamma + 1)^(1/2) (gamma + 2)^-1 (gamma + 3)^(-1/2) (Karras et al. 2024, eq. 126)."""
    low, high = 0.0, 1e7
    for _ in range(200):
        middle = (low + high) / 2
        wide = (middle + 1) ** 0.5 / ((middle + 2) * (middle + 3) ** 0.5) > width
        low, high = (middle, high) if wide else (low, middle)
    return low


def ema_decays(settings: TrainConfig) -> dict[str, Decay]:
    """The decays of all averaged weights of a run, by their names in optimiser state and checkpoints."""
    decays = {EMA: exponential(settings.ema_decay)}
    decays |= {f"{EMA}_{decay:g}": exponential(decay) for decay in settings.ema_more}
    return decays | {f"power_{width:g}": power(width) for width in settings.ema_power}


class AveragingAdamW(torch.optim.AdamW):
    """AdamW that also holds averaged weights of each parameter, in fp32.

    They are optimiser state, so they are sharded, stored and restored like the moments. Under ZeRO the parameters of
    this class are flat shards, and `step` is called once for each group of them.
    """

    def __init__(self, params: Any, decays: dict[str, Decay], **kwargs: Any) -> None:
        super().__init__(params, **kwargs)
        self.decays = decays
        self.allow: Callable[[list[Tensor]], bool] = lambda stepped: True
        """Called before each step with the tensors to be stepped; if it returns False, the step is skipped."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Take one step, then update all averaged weights; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        stepped = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not self.allow(stepped) or not stepped:
            return loss
        self.update()
        taken = int(self.state[stepped[0]]["step"])
        weights = [p.detach().float() for p in stepped]
        for name, decay in self.decays.items():
            for p in stepped:
                if name not in self.state[p]:
                    self.state[p][name] = p.detach().float().clone()
            averaged: list[Tensor] = [self.state[p][name] for p in stepped]
            torch._foreach_lerp_(averaged, weights, 1 - decay(taken))
        return loss

    def update(self) -> None:
        """Step every parameter that has a gradient; averaged weights are not touched."""
        super().step()

    def create_state(self, taken: int, tensors: list[Tensor]) -> None:
        """Create the state of `tensors` after `taken` steps, to be filled from a checkpoint."""
        for p in tensors:
            zeros = {kind: torch.zeros_like(p, dtype=torch.float32) for kind in self.kinds(p)}
            averaged = {name: p.detach().float().clone() for name in self.decays}
            self.state[p] = {"step": torch.tensor(float(taken), device=p.device), **zeros, **averaged}

    def kinds(self, p: Tensor) -> tuple[str, ...]:
        """Names of the moments of a parameter, as checkpoints store them."""
        return ("exp_avg", "exp_avg_sq")

    def swap(self, average: str) -> None:
        """Exchange every stepped tensor with its averaged weights, without a copy; a second call undoes it."""
        for p, state in self.state.items():
            if average in state:
                p.data, state[average].data = state[average].data, p.data


class AveragingMuon(AveragingAdamW):
    """Muon for parameter groups with `muon=True`, AdamW for the others; averaged weights as in `AveragingAdamW`.

    The momentum is stored as `exp_avg`. Each parameter must be a whole matrix, so the parameters may not be sharded.
    """

    def __init__(self, params: Any, decays: dict[str, Decay], **kwargs: Any) -> None:
        super().__init__(params, decays, **kwargs)
        self._matrices = {id(p) for group in self.param_groups if group.get("muon") for p in group["params"]}

    def update(self) -> None:
        """Step the matrices, then leave the other parameters to AdamW."""
        for group in self.param_groups:
            if group.get("muon"):
                self._step_matrices(group, [p for p in group["params"] if p.grad is not None])
        super().update()

    def _step_matrices(self, group: dict[str, Any], matrices: list[Tensor]) -> None:
        equal: dict[torch.Size, list[Tensor]] = defaultdict(list)  # stacked, since one large product is faster
        for p in matrices:
            equal[p.shape].append(p)
        for shape, stepped in equal.items():
            updates = torch.stack([self._momentum(p, p.grad) for p in stepped if p.grad is not None])
            torch._foreach_mul_(stepped, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(stepped, list(muon.orthogonal(updates)), alpha=-group["lr"] * muon.size(shape))
            for p in stepped:
                p.grad = None  # AdamW skips parameters without a gradient

    def _momentum(self, p: Tensor, gradient: Tensor) -> Tensor:
        """Advance the momentum of a parameter; returns the mean of gradient and momentum that Nesterov's form uses."""
        state = self.state[p]
        if "exp_avg" not in state:
            state.update(step=torch.zeros((), device=p.device), exp_avg=torch.zeros_like(p))
        state["step"] += 1
        average: Tensor = state["exp_avg"].lerp_(gradient, 1 - muon.MOMENTUM)
        return gradient.lerp(average, muon.MOMENTUM)

    def kinds(self, p: Tensor) -> tuple[str, ...]:
        """Muon has no second moments."""
        return ("exp_avg",) if id(p) in self._matrices else super().kinds(p)


def build_optimizer(model: nn.Module, settings: TrainConfig) -> AveragingAdamW:
    """The optimiser of a run; weight decay applies to tensors of two or more axes only."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hidden = muon.hidden_matrices(model) if settings.optimizer == "muon" else set()
    rest = [(name, p) for name, p in named if name not in hidden]
    groups: list[dict[str, Any]] = [
        {"params": [p for _, p in rest if dimensions(p) >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for _, p in rest if dimensions(p) < 2], "weight_decay": 0.0},
    ]
    matrices = [p for name, p in named if name in hidden]
    if matrices:
        groups.append({"params": matrices, "weight_decay": settings.weight_decay, "muon": True})
    kind = AveragingMuon if matrices else AveragingAdamW
    return kind(groups, ema_decays(settings), lr=settings.lr, betas=settings.betas, fused=True)


def dimensions(p: Tensor) -> int:
    """Number of axes of a parameter, also if ZeRO-3 has replaced it by an empty tensor."""
    return len(getattr(p, "ds_shape", p.shape))


def learning_rate(settings: TrainConfig, step: int) -> float:
    """Learning rate of a step (counted from 1): linear warm-up, then a cosine from `lr` to `lr * min_lr_ratio`.

    Source of the cosine: Loshchilov and Hutter 2017, eq. 5.
    """
    if step <= settings.warmup_steps:
        return settings.lr * step / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return settings.lr * (settings.min_lr_ratio + (1 - settings.min_lr_ratio) * cosine)


@contextmanager
def averaged_weights(optimizer: AveragingAdamW, average: str = EMA) -> Iterator[None]:
    """Inside the block every parameter has its averaged value; afterwards it has its own value again."""
    optimizer.swap(average)
    try:
        yield
    finally:
        optimizer.swap(average)
