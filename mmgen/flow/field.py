"""Fields: a network of any prediction read as any quantity, and exact fields without a network."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmgen.flow.guide import Guide
from mmgen.flow.path import KINDS, Path, check_times, values_are_checked
from mmgen.flow.schedule import LinearPath

Function = Callable[[Tensor, Tensor], Tensor]
"""A function (z, t) that returns a tensor of the shape of z; t is a scalar or has as many axes as z."""


@dataclass(frozen=True)
class Conversion:
    """Converts estimates between quantities on `path`; with `clean_range`, by way of the clipped clean estimate.

    A `guide` moves the clean estimate before it is clipped.
    """

    path: Path
    clip: float
    """Smallest denominator of a conversion; smaller ones are replaced by it."""
    clean_range: tuple[float, float] | None = None
    """Lowest and highest pixel value (or latent value) of the clean estimate."""
    guide: Guide | None = None
    """Moves the clean estimate."""

    def __call__(self, source: str, target: str, value: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """Convert `value`, an estimate of `source` at (z, t), to an estimate of `target`; see `Path.convert`."""
        if self.clean_range is None and self.guide is None:
            return self.path.convert(source, target, value, z, t, self.clip)
        x = self.path.convert(source, "x", value, z, t, self.clip)
        shift = None if self.guide is None else self.guide.shift(self.path, x, z, t)
        if self.clean_range is None and shift is not None:
            # The shift alone is converted, so that nothing is lost where sigma is below `clip`.
            plain = self.path.convert(source, target, value, z, t, self.clip)
            return plain + self.path.gain("x", target, t, self.clip).to(z.dtype) * shift
        x = (x if shift is None else x + shift).clamp(*self.clean_range or ())
        return self.path.convert("x", target, x, z, t, self.clip)


@dataclass(frozen=True)
class Field:
    """A network that outputs `prediction` on `path`, readable as any quantity of `KINDS`.

    Raises:
        ValueError: an unknown prediction, or a `clean_range` that does not rise.
    """

    path: Path
    network: Function
    """(z, t) to the predicted quantity, of the shape of z."""
    prediction: str = "v"
    """What the network outputs, one of `KINDS`."""
    clip: float = 1e-3
    """Smallest denominator of a conversion. It bounds the error of a network near pure noise.

    A clip larger than the solver's last step leaves noise in the result. A clip larger than alpha at the first time
    weakens the first estimate. `path.smallest_level(times)` is smaller than every alpha and sigma that a solver on
    `times` divides by; exact fields need a clip that small.
    """
    clean_range: tuple[float, float] | None = None
    """Lowest and highest value of the denoised estimate, which is clipped before any conversion."""
    guide: Guide | None = None
    """Moves the denoised estimate before it is clipped: `ClassifierGuide`, `RewardGuide`, or a class of your own."""

    def __post_init__(self) -> None:
        if self.prediction not in KINDS:
            raise ValueError(f"unknown prediction '{self.prediction}' (one of: {', '.join(KINDS)})")
        if self.clean_range is not None and not self.clean_range[0] < self.clean_range[1]:
            raise ValueError(f"clean_range must rise, as in (-1, 1), got {self.clean_range}")

    def __call__(self, kind: str) -> Function:
        """Return the function (z, t) -> estimate of `kind`, one of `mmgen.flow.path.KINDS`."""
        convert = Conversion(self.path, self.clip, self.clean_range, self.guide)
        return lambda z, t: convert(self.prediction, kind, self.network(z, t), z, t)


class GaussianMixture:
    """The exact field of a mixture of isotropic Gaussians, sum_k w_k N(mean_k, std_k^2 I).

    All methods take z [R, D] and t, a scalar or [R, 1].

    Args:
        means: [K, D].
        std: a number or [K]; zero gives a finite set of points.
        weights: [K], not necessarily normalised; uniform by default.
        path: `LinearPath()` by default.

    Raises:
        ValueError: shapes that do not fit, a negative weight or std, or no weight above zero.
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
                "a mixture needs means [K, D] and K weights and stds, none negative and one weight or more above zero; "
                f"the means have shape {tuple(means.shape)}"
            )
        self.log_weights = (weights / weights.sum()).log()

    def _scaled(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (alpha, sigma^2, variance of z in each component), each [R or 1, K or 1]."""
        check_times(t)
        t = t.reshape(-1, 1)
        alpha, variance = self.path.alpha(t), self.path.sigma(t).square()
        total = (alpha * self.std).square() + variance
        if values_are_checked(total) and bool((total == 0).any()):
            raise ValueError(
                "a component with std 0 has no density where sigma is zero: end the solver on its clean estimate "
                "(end='clean'), stay below t = 1, or give the components a std above 0"
            )
        return alpha, variance, total

    def log_joint(self, z: Tensor, t: Tensor) -> Tensor:
        """Return log(w_k N(z; alpha mean_k, alpha^2 std_k^2 + sigma^2)) of each component in nats, [R, K]."""
        alpha, _, total = self._scaled(t)
        # |z - alpha m|^2 is expanded, so that no tensor of size R K D is allocated. In double precision, because near
        # the data it is a small difference of large numbers.
        exact = torch.float64 if z.device.type != "mps" else torch.float32
        wide, means, alpha = z.to(exact), self.means.to(exact), alpha.to(exact)
        square = wide.square().sum(1, keepdim=True) - 2 * alpha * (wide @ means.T)
        square = (square + alpha.square() * means.square().sum(1)).clamp(min=0)
        joint = self.log_weights - square / (2 * total) - z.shape[1] / 2 * (2 * math.pi * total).log()
        return joint.to(z.dtype)

    def log_prob(self, z: Tensor, t: Tensor) -> Tensor:
        """Return log p_t(z) in nats, [R]."""
        return torch.logsumexp(self.log_joint(z, t), 1)

    def responsibilities(self, z: Tensor, t: Tensor) -> Tensor:
        """Return the posterior probability of each component given z, [R, K]."""
        return torch.softmax(self.log_joint(z, t), 1)

    def denoised(self, z: Tensor, t: Tensor) -> Tensor:
        """Return E[x | z], [R, D]: the clean estimate of a perfect network."""
        alpha, variance, total = self._scaled(t)
        r = self.responsibilities(z, t)
        toward_z = (r * alpha * self.std.square() / total).sum(1, keepdim=True)
        return (r * variance / total) @ self.means + toward_z * z

    def velocity(self, z: Tensor, t: Tensor) -> Tensor:
        """Return E[v | z], [R, D], without a division by 1 - t or t on the linear path."""
        alpha, _, total = self._scaled(t)
        t_R1 = t.reshape(-1, 1)
        up, down = self.path.alpha_slope(t_R1), self.path.half_variance_slope(t_R1)
        r = self.responsibilities(z, t)
        # In each component v = alpha' mean + ((alpha alpha' s^2 + sigma sigma') / var z) (z - alpha mean).
        pull = (alpha * up * self.std.square() + down) / total
        return (r * (up - pull * alpha)) @ self.means + (r * pull).sum(1, keepdim=True) * z

    def score(self, z: Tensor, t: Tensor) -> Tensor:
        """Return grad log p_t(z), [R, D]."""
        alpha, _, total = self._scaled(t)
        r = self.responsibilities(z, t) / total
        return alpha * (r @ self.means) - r.sum(1, keepdim=True) * z

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw `count` samples of x, [count, D]."""
        which = torch.multinomial(self.log_weights.exp(), count, replacement=True, generator=generator)
        shape, like = (count, self.means.shape[1]), self.means
        n = torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
        return self.means[which] + self.std[which].unsqueeze(1) * n


class FiniteSet(GaussianMixture):
    """The exact field of a finite training set, which reproduces the training samples.

    On the linear path v = (sum_k w_k x_k - z) / (1 - t) with w = softmax_k(-|z - t x_k|^2 / (2 (1 - t)^2)).

    Args:
        x_KD: the training set, [K, D].
        path: `LinearPath()` by default.
    """

    def __init__(self, x_KD: Tensor, path: Path | None = None) -> None:
        super().__init__(x_KD, 0.0, path=path)
