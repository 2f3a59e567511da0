"""Guidance: classifier-free, from two velocities, and by the gradient of a classifier."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmgen.flow.path import Path, check_shapes, check_times

GuidanceScale = float | Tensor | Callable[[Tensor], Tensor]
"""A guidance weight w: a number, a tensor with as many axes as z (a weight per sample), or a function of t."""


@dataclass(frozen=True)
class Guidance:
    """Settings of classifier-free guidance: its scale, the interval of t in which it acts, and two corrections.

    Raises:
        ValueError: an interval that does not rise inside [0, 1], or a rescale outside [0, 1].
    """

    scale: GuidanceScale
    """The weight w of `classifier_free`: 0 is unconditional, 1 conditional, more extrapolates."""
    interval: tuple[float, float] = (0.0, 1.0)
    """First and last time at which the scale applies; at other times it is 1 (Kynkäänniemi et al. 2024)."""
    rescale: float = 0.0
    """How far the standard deviation of the result is moved to that of the conditional velocity.

    0 leaves it, 1 makes it equal (Lin et al. 2023, section 3.4).
    """
    renorm: bool = False
    """Shorten the result to the norm of the conditional velocity where it is longer (Deng et al. 2025, BAGEL)."""

    def __post_init__(self) -> None:
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"the interval of guidance must rise inside [0, 1], got {self.interval}")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale is a share between 0 and 1, got {self.rescale}")


def _weight(scale: GuidanceScale, t: Tensor, like: Tensor) -> Tensor:
    """Return the weight at t in the type of `like`; it broadcasts against `like` as times do."""
    value = scale(t) if callable(scale) else scale
    if isinstance(value, Tensor):
        weight = value.to(like.device, like.dtype)
    else:  # created on the device, because copying a number to an accelerator synchronises
        weight = torch.full((), value, dtype=like.dtype, device=like.device)
    try:
        check_shapes(weight, like)
    except ValueError as error:
        raise ValueError(f"a guidance weight must have the shape of a time: {error}") from None
    return weight


def classifier_free(conditional: Tensor, unconditional: Tensor, t: Tensor, guidance: Guidance) -> Tensor:
    """Combine two velocities by classifier-free guidance: v_u + w (v_c - v_u).

    w is `guidance.scale` for t inside its interval and 1 outside. w = 0 is unconditional and w = 1 conditional; it is
    larger by one than the w of Ho and Salimans 2022.

    Args:
        conditional: v_c, [R, ...].
        unconditional: v_u, of the same shape.
        t: a scalar, or a tensor with as many axes as the velocities.
        guidance: scale, interval and corrections.

    Returns:
        The guided velocity, [R, ...].

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


def gradient_of(
    log_likelihood: Callable[[Tensor, Tensor], Tensor], scale: GuidanceScale = 1.0
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function (z, t) to scale * grad log p(y | z), of the shape of z; see `classifier`."""

    def gradient(z: Tensor, t: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            leaf = z.detach().clone().requires_grad_()
            (slope,) = torch.autograd.grad(log_likelihood(leaf, t.clone()).sum(), leaf)
        return _weight(scale, t, z) * slope

    return gradient


def classifier(
    path: Path,
    velocity: Callable[[Tensor, Tensor], Tensor],
    log_likelihood: Callable[[Tensor, Tensor], Tensor],
    scale: GuidanceScale,
    clip: float = 1e-3,
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the velocity field whose score is increased by scale * grad log p(y | z).

    Source: Dhariwal and Nichol 2021, section 4.

    Args:
        path: the path of the field.
        velocity: (z, t) to v, of the shape of z.
        log_likelihood: (z, t) to log p(y | z_t) of each sample, [R]; it must be differentiable in z.
        scale: the weight of the gradient.
        clip: the smallest alpha of the conversion, which divides by alpha. On paths that begin with pure noise alpha is
            zero at t = 0, where z is independent of y and the exact gradient vanishes.

    Returns:
        A function (z, t) to the guided velocity, of the shape of z.

    Raises:
        ValueError: in the returned function, shapes that do not fit, or times at which the path diverges.
    """

    gradient = gradient_of(log_likelihood, scale)

    def guided(z: Tensor, t: Tensor) -> Tensor:
        # At fixed z, v is affine in the score: adding to the score adds a multiple of it to v.
        return velocity(z, t) + path.gain("score", "v", t, clip) * gradient(z, t)

    return guided
