"""Guidance: of two velocities, and by a classifier."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmgen.flow.path import Path, check_shapes, check_times

GuidanceScale = float | Tensor | Callable[[Tensor], Tensor]
"""A weight, one that depends on t, or a weight per row with as many axes as z."""


@dataclass(frozen=True)
class Guidance:
    """How far and where a conditional velocity is extrapolated from an unconditional one.

    Raises:
        ValueError: an interval that does not rise inside [0, 1], or a rescale outside [0, 1].
    """

    scale: GuidanceScale
    interval: tuple[float, float] = (0.0, 1.0)
    """Times at which the scale applies; elsewhere it is 1 (Kynkäänniemi et al. 2024)."""
    rescale: float = 0.0
    """Share in which the result takes the standard deviation of the conditional velocity (Lin et al. 2023, 3.4)."""
    renorm: bool = False
    """Shorten the result to the norm of the conditional one where it is longer (Deng et al. 2025, BAGEL)."""

    def __post_init__(self) -> None:
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"the interval of guidance must rise inside [0, 1], got {self.interval}")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale is a share between 0 and 1, got {self.rescale}")


def _weight(scale: GuidanceScale, t: Tensor, like: Tensor) -> Tensor:
    """The weight at t, in the type of `like`, against which it broadcasts as times do."""
    found = scale(t) if callable(scale) else scale
    if isinstance(found, Tensor):
        weight = found.to(like.device, like.dtype)
    else:  # filled where it is used: a number copied to an accelerator would be waited for
        weight = torch.full((), found, dtype=like.dtype, device=like.device)
    try:
        check_shapes(weight, like)
    except ValueError as error:
        raise ValueError(f"guidance weights are given as times are: {error}") from None
    return weight


def classifier_free(conditional: Tensor, unconditional: Tensor, t: Tensor, guidance: Guidance) -> Tensor:
    """v_u + w (v_c - v_u) with w = `guidance.scale` for t inside its interval and w = 1 outside.

    w = 0 is unconditional, w = 1 conditional (Ho and Salimans 2022, with w one larger than theirs). `t` broadcasts
    against the velocities, whose first axis is the batch.

    Raises:
        ValueError: shapes that do not fit, or times outside [0, 1].
    """
    check_shapes(t, conditional, unconditional)
    check_times(t)
    (low, high), rescale = guidance.interval, guidance.rescale
    weight = torch.where((t >= low) & (t <= high), _weight(guidance.scale, t, conditional), 1.0)
    guided = unconditional + weight * (conditional - unconditional)
    axes = tuple(range(1, conditional.ndim))
    if rescale:
        ratio = conditional.std(dim=axes, keepdim=True, correction=0) / guided.std(
            dim=axes, keepdim=True, correction=0
        ).clamp(min=1e-12)
        guided = guided * (1 + rescale * (ratio - 1))
    if guidance.renorm:
        norms = [torch.linalg.vector_norm(v, dim=axes, keepdim=True) for v in (conditional, guided)]
        guided = guided * (norms[0] / norms[1].clamp(min=1e-12)).clamp(max=1.0)
    return guided


def classifier(
    path: Path,
    velocity: Callable[[Tensor, Tensor], Tensor],
    log_likelihood: Callable[[Tensor, Tensor], Tensor],
    scale: GuidanceScale,
    clip: float = 1e-3,
) -> Callable[[Tensor, Tensor], Tensor]:
    """The velocity whose score has scale * grad log p(y | z) added (Dhariwal and Nichol 2021, section 4).

    `log_likelihood(z, t)` returns log p(y | z_t) of each row, [B]; gradients are taken through it. On paths that begin
    with pure noise the velocity is infinitely sensitive to the score at t = 0, where z says nothing of y; `clip` is
    the smallest alpha of that division.
    """

    def guided(z: Tensor, t: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            leaf = z.detach().clone().requires_grad_()
            (gradient,) = torch.autograd.grad(log_likelihood(leaf, t.clone()).sum(), leaf)
        # v is affine in the score at fixed z, so an addition to one is a multiple of it added to the other.
        return velocity(z, t) + path.gain("score", "v", t, clip) * _weight(scale, t, z) * gradient

    return guided
