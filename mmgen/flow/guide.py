"""Guidance: classifier-free, from the velocities of several contexts, and by the gradient of a classifier or reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol, Self

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
    return combine([conditional, unconditional], [guidance], t)


def combine(velocities: Sequence[Tensor], guidance: Sequence[Guidance], t: Tensor) -> Tensor:
    """Combine velocities of nested contexts by classifier-free guidance with a scale for each part of the context.

    For v_0 with all of the context, v_1 with a part of it, and so on to v_n: v_n + sum_k w_k (v_(k-1) - v_k). With an
    image and a text, v = v(none) + w_image (v(image) - v(none)) + w_text (v(image, text) - v(image)), which is eq. 3 of
    Brooks et al. 2022 (InstructPix2Pix). The sum begins with v_n. After each term, the corrections of its guidance
    compare the sum so far with v_(k-1).

    Args:
        velocities: v_0 to v_n, the fullest context first; each [R, ...].
        guidance: w_1 to w_n with their intervals and corrections; `guidance[k - 1]` belongs to v_(k-1) - v_k.
        t: a scalar, or a tensor with as many axes as the velocities.

    Returns:
        The guided velocity, [R, ...]; with a single velocity, that velocity.

    Raises:
        ValueError: shapes that do not fit, times outside [0, 1], or another number of guidances than one less than the
            velocities.
    """
    check_shapes(t, *velocities)
    check_times(t)
    if len(guidance) != len(velocities) - 1:
        raise ValueError(f"{len(velocities)} velocities need {len(velocities) - 1} guidances, got {len(guidance)}")
    guided = velocities[-1]
    for (fuller, poorer), one in zip([*pairwise(velocities)][::-1], guidance[::-1], strict=True):
        (low, high), scale = one.interval, _weight(one.scale, t, fuller)
        weight = torch.where((t >= low) & (t <= high), scale, 1.0)
        guided = _corrected(guided + weight * (fuller - poorer), fuller, one)
    return guided


def _corrected(guided: Tensor, conditional: Tensor, guidance: Guidance) -> Tensor:
    """Apply `rescale` and `renorm` of a guidance, which compare the result with the conditional velocity."""
    axes, rescale = tuple(range(1, conditional.ndim)), guidance.rescale
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
    return lambda z, t: _weight(scale, t, z) * _gradient(lambda leaf: log_likelihood(leaf, t.clone()), z)


class Guide(Protocol):
    """The hook for a gradient on the clean estimate: it moves the estimate x at every evaluation of any solver.

    `Field(guide=...)`, the decoder's `Request.guide` and `Conversion(guide=...)` apply it.
    """

    def shift(self, path: Path, x: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """Return what is added to the clean estimate x at (z, t), in the shape of x, [R, ...]."""

    def through(self, view: Callable[[Tensor], Tensor]) -> Self:
        """Return this guide for states that the differentiable function `view` turns into the input of this guide."""


@dataclass(frozen=True)
class ClassifierGuide:
    """Guidance by a classifier of noisy data: the score is increased by scale * grad log p(y | z).

    By Tweedie's formula x = (z + sigma^2 score) / alpha, the clean estimate moves by sigma^2 / alpha times as much.
    With the exact p(y | z) and scale 1, the field is exactly the conditional one (Dhariwal and Nichol 2021, section 4).
    To differentiate a reward of the clean estimate through the network too, use it as `log_likelihood`:
    `lambda z, t: reward(field("x")(z, t))` (Chung et al. 2022, DPS).
    """

    log_likelihood: Callable[[Tensor, Tensor], Tensor]
    """(z, t) to log p(y | z_t) of each sample, [R]; it must be differentiable in z."""
    scale: GuidanceScale = 1.0
    """The weight of the gradient."""
    clip: float = 1e-3
    """The smallest alpha, by which the shift is divided. Where alpha is zero, the exact gradient vanishes."""

    def shift(self, path: Path, x: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """Return scale * sigma^2 / alpha * grad log p(y | z), of the shape of z."""
        by_score = path.gain("score", "x", t, self.clip)
        return by_score.to(z.dtype) * gradient_of(self.log_likelihood, self.scale)(z, t)

    def through(self, view: Callable[[Tensor], Tensor]) -> ClassifierGuide:
        """Return the guide whose classifier sees `view(z)`."""
        return replace(self, log_likelihood=lambda z, t: self.log_likelihood(view(z), t))


@dataclass(frozen=True)
class RewardGuide:
    """Guidance by a reward r(x) of clean data: samples follow p(x) exp(scale * r(x)), approximately.

    The clean estimate moves by scale * C grad r(x), where C is the variance of x given z for Gaussian data:
    s^2 sigma^2 / (alpha^2 s^2 + sigma^2), the variance r_t^2 of Song et al. 2023 (pseudoinverse-guided diffusion). This
    is exact for a linear reward and Gaussian data of standard deviation s. The network is not differentiated. A
    classifier of clean data is the reward log p(y | x).
    """

    reward: Callable[[Tensor], Tensor]
    """x to the reward of each sample, [R]; it must be differentiable in x."""
    scale: GuidanceScale = 1.0
    """The weight of the reward."""
    data_std: float = 1.0
    """The standard deviation s of the data."""

    def shift(self, path: Path, x: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """Return scale * C grad r at the clean estimate x, of its shape."""
        alpha, noise = path.alpha(t) * self.data_std, path.sigma(t).square()
        variance = self.data_std**2 * noise / (alpha.square() + noise)
        return (variance * _weight(self.scale, t, x)).to(x.dtype) * _gradient(self.reward, x)

    def through(self, view: Callable[[Tensor], Tensor]) -> RewardGuide:
        """Return the guide whose reward sees `view(x)`."""
        return replace(self, reward=lambda x: self.reward(view(x)))


def _gradient(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Return the gradient of a function [R, ...] -> [R] of independent samples, also in inference mode."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = at.detach().clone().requires_grad_()
        value = function(leaf)
        if value.shape != leaf.shape[:1] or not value.requires_grad:
            raise ValueError(
                f"a guide needs one differentiable number per sample, [{len(leaf)}], but its function returned "
                f"{list(value.shape)}{'' if value.requires_grad else ' without a gradient'}: sum over all other axes, "
                "and remove torch.no_grad or detach"
            )
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return gradient


def classifier(
    path: Path,
    velocity: Callable[[Tensor, Tensor], Tensor],
    log_likelihood: Callable[[Tensor, Tensor], Tensor],
    scale: GuidanceScale,
    clip: float = 1e-3,
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the velocity field whose score is increased by scale * grad log p(y | z); see `ClassifierGuide`.

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
