"""Fields: what a network of any prediction says of velocity and clean data, and exact ones without a network."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmgen.flow.path import KINDS, Path, check_times, looked_at
from mmgen.flow.schedule import LinearPath

Function = Callable[[Tensor, Tensor], Tensor]
"""(z, t) to a tensor like z; t is a scalar or has as many axes as z."""


@dataclass(frozen=True)
class Conversion:
    """The conversion of estimates on `path`, by way of clean data inside `clean_range` where one is given."""

    path: Path
    clip: float
    """Smallest denominator."""
    clean_range: tuple[float, float] | None = None

    def __call__(self, source: str, target: str, value: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """An estimate of `source` at (z, t) as one of `target`."""
        if self.clean_range is None:
            return self.path.convert(source, target, value, z, t, self.clip)
        x = self.path.convert(source, "x", value, z, t, self.clip).clamp(*self.clean_range)
        return self.path.convert("x", target, x, z, t, self.clip)


@dataclass(frozen=True)
class Field:
    """A network that outputs `prediction` on `path`, and what it implies."""

    path: Path
    network: Function
    prediction: str = "v"
    clip: float = 1e-3
    """Smallest denominator of a conversion, which keeps a network's error at pure noise in bounds.

    Above a step of the sampler it leaves noise in the result; above alpha at the first time it weakens the first
    estimate. `path.smallest_level(times)` is below every level that a sampler on `times` meets: exact fields need that.
    """
    clean_range: tuple[float, float] | None = None
    """Range to which the denoised estimate is clipped before anything is made of it."""

    def __post_init__(self) -> None:
        if self.prediction not in KINDS:
            raise ValueError(f"unknown prediction '{self.prediction}' (one of: {', '.join(KINDS)})")
        if self.clean_range is not None and not self.clean_range[0] < self.clean_range[1]:
            raise ValueError(f"clean_range must rise, as in (-1, 1), got {self.clean_range}")

    def __call__(self, kind: str) -> Function:
        """The function (z, t) -> `kind`, one of `mmgen.flow.path.KINDS`."""
        convert = Conversion(self.path, self.clip, self.clean_range)
        return lambda z, t: convert(self.prediction, kind, self.network(z, t), z, t)


class GaussianMixture:
    """The exact field of a mixture of isotropic Gaussians: sum_k w_k N(mean_k, std_k^2).

    `means` [K, D]; `std` is a number or [K], and zero makes a finite set; `weights` [K], uniform where absent.
    z is [R, D].
    """

    def __init__(
        self, means: Tensor, std: float | Tensor, weights: Tensor | None = None, path: Path | None = None
    ) -> None:
        self.means, self.path = means, path or LinearPath()
        self.std = torch.as_tensor(std, dtype=means.dtype, device=means.device).expand(len(means))
        weights = torch.ones(len(means), dtype=means.dtype, device=means.device) if weights is None else weights
        fit = weights.shape == (len(means),) and bool((weights >= 0).all()) and bool((self.std >= 0).all())
        if means.ndim != 2 or not fit or not 0 < float(weights.sum()) < math.inf:
            raise ValueError(
                f"a mixture of means {tuple(means.shape)} needs means [K, D] and K weights and stds, none negative and "
                "one weight or more above zero"
            )
        self.log_weights = (weights / weights.sum()).log()

    def _scaled(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(alpha, sigma^2, variance of z in each component), each [R or 1, K or 1]."""
        check_times(t)
        t = t.reshape(-1, 1)
        alpha, variance = self.path.alpha(t), self.path.sigma(t).square()
        total = (alpha * self.std).square() + variance
        if looked_at(total) and bool((total == 0).any()):
            raise ValueError(
                "a component without extent has no density where sigma is zero: end a sampler on its clean estimate "
                "(end='clean'), stay below t = 1, or give the components a std above 0"
            )
        return alpha, variance, total

    def log_joint(self, z: Tensor, t: Tensor) -> Tensor:
        """log(w_k N(z; alpha mean_k, .)) of each component, [R, K]."""
        alpha, _, total = self._scaled(t)
        # |z - alpha m|^2 by products, so that nothing of size R K D is made; in double, for near data it is a small
        # difference of large numbers.
        exact = torch.float64 if z.device.type != "mps" else torch.float32
        wide, means, alpha = z.to(exact), self.means.to(exact), alpha.to(exact)
        square = wide.square().sum(1, keepdim=True) - 2 * alpha * (wide @ means.T)
        square = (square + alpha.square() * means.square().sum(1)).clamp(min=0)
        joint = self.log_weights - square / (2 * total) - z.shape[1] / 2 * (2 * math.pi * total).log()
        return joint.to(z.dtype)

    def log_prob(self, z: Tensor, t: Tensor) -> Tensor:
        """log p_t(z), nats, [R]."""
        return torch.logsumexp(self.log_joint(z, t), 1)

    def responsibilities(self, z: Tensor, t: Tensor) -> Tensor:
        """Posterior of the component, [R, K]."""
        return torch.softmax(self.log_joint(z, t), 1)

    def denoised(self, z: Tensor, t: Tensor) -> Tensor:
        """E[x | z], the estimate that a perfect network gives."""
        alpha, variance, total = self._scaled(t)
        r = self.responsibilities(z, t)
        toward_z = (r * alpha * self.std.square() / total).sum(1, keepdim=True)
        return (r * variance / total) @ self.means + toward_z * z

    def velocity(self, z: Tensor, t: Tensor) -> Tensor:
        """E[v | z], with no division by 1 - t or t on the linear path."""
        alpha, _, total = self._scaled(t)
        t_R1 = t.reshape(-1, 1)
        up, down = self.path.alpha_slope(t_R1), self.path.half_variance_slope(t_R1)
        r = self.responsibilities(z, t)
        # In each component v = alpha' mean + ((alpha alpha' s^2 + sigma sigma') / var z) (z - alpha mean).
        pull = (alpha * up * self.std.square() + down) / total
        return (r * (up - pull * alpha)) @ self.means + (r * pull).sum(1, keepdim=True) * z

    def score(self, z: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(z)."""
        alpha, _, total = self._scaled(t)
        r = self.responsibilities(z, t) / total
        return alpha * (r @ self.means) - r.sum(1, keepdim=True) * z

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """`count` draws of x, [count, D]."""
        which = torch.multinomial(self.log_weights.exp(), count, replacement=True, generator=generator)
        shape, like = (count, self.means.shape[1]), self.means
        n = torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
        return self.means[which] + self.std[which].unsqueeze(1) * n


class FiniteSet(GaussianMixture):
    """The exact field of a training set x_KD: the field that memorises, v = (softmax-weighted mean - z) / (1 - t)."""

    def __init__(self, x_KD: Tensor, path: Path | None = None) -> None:
        super().__init__(x_KD, 0.0, path=path)
