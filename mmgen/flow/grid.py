"""The time grid of a solver, and the coefficients of its steps.

All coefficients are computed once, in double precision on the CPU, so that no step synchronises with the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmgen.flow.path import Path, check_times

Coefficient = float | Tensor


@dataclass(frozen=True)
class NoiseLevels:
    """Alpha and sigma at both ends of every step, from the noisier time k to the cleaner time j.

    Each is [N, ...] in double precision.
    """

    alpha_k: Tensor
    sigma_k: Tensor
    alpha_j: Tensor
    sigma_j: Tensor

    @property
    def kept(self) -> Tensor:
        """exp(log-SNR_k - log-SNR_j), in [0, 1]: zero where k is pure noise or j is clean."""
        return (self.alpha_k * self.sigma_j / (self.alpha_j * self.sigma_k)).square()

    @property
    def std(self) -> Tensor:
        """Standard deviation of the noise of an ancestral step, sigma_j sqrt(1 - kept)."""
        return (1 - self.kept).clamp(min=0).sqrt() * self.sigma_j


@dataclass(frozen=True)
class AffineSteps:
    """Coefficients [N, ...] of steps z_j = by_estimate estimate + by_z z + std n, with n standard normal.

    The estimate is the velocity or the denoised estimate that the solver requests.
    """

    by_estimate: Tensor
    by_z: Tensor
    std: Tensor


class Grid:
    """The times of a solver in double precision on the CPU, and the coefficients computed from them.

    Args:
        z: the initial state, [R, ...]; its shape, type and device are used, not its values.
        times: [N + 1], or [N + 1, R] for a grid per sample, in [0, 1].
        path: the path of the field.
        rising: whether falling times are refused.

    Raises:
        ValueError: times of another shape, fewer than two, outside [0, 1], or not monotonic.
    """

    def __init__(self, z: Tensor, times: Tensor, path: Path, rising: bool = True) -> None:
        times = torch.as_tensor(times).detach().to("cpu", torch.float64)
        if times.ndim not in (1, 2) or (times.ndim == 2 and times.shape[1] != len(z)):
            raise ValueError(
                f"times must be [N + 1], or [N + 1, {len(z)}] with a grid per sample, got {list(times.shape)}"
            )
        if len(times) < 2:
            raise ValueError("a solver needs at least one step: give two times or more")
        check_times(times)
        self.t = times.view(len(times), *([1] * z.ndim if times.ndim == 1 else [-1] + [1] * (z.ndim - 1)))
        self.gaps = self.t.diff(dim=0)
        least, most = (float(end) for end in self.gaps.aminmax())
        if least < 0 and (rising or most > 0):
            raise ValueError("times must rise from noise (0) to data (1)" + ("" if rising else ", or fall all the way"))
        self.steps, self.path, self.like, self._flat = len(times) - 1, path, z, times.ndim == 1
        self.still = self.gaps == 0
        """Steps [N, ...] during which a sample rests: it has not begun, or is already at its last time."""
        self.resting = least <= 0 <= most and bool(self.still.any())
        """Whether any sample rests. Most grids have no resting samples and skip the extra work for them."""
        self.arriving = self.t[1:] == 1
        """Steps [N, ...] that bring a sample to the data."""
        if self.resting:
            self.arriving &= ~self.still

    def send(self, coefficient: Tensor) -> Sequence[Coefficient]:
        """Return one coefficient per step: a number if all samples share a grid, else [R, 1, ...] on z's device."""
        if self._flat:
            numbers: list[float] = coefficient.flatten().tolist()
            return numbers
        return coefficient.to(self.like.device, self.like.dtype).unbind()

    def yielded(self, t: Tensor, idle: Tensor) -> Tensor:
        """Return the times that a solver yields, [N] or [N, R, 1, ...], in single precision or better.

        Where a sample is at the data and `idle`, the time is its last one before the data, where every field is finite.
        """
        if self.resting or not self._flat:
            before = torch.where(self.t < 1, self.t, -1.0).amax(0, keepdim=True).clamp(min=0)
            t = torch.where((t == 1) & idle, before, t)
        t = t.to(self.like.device, torch.promote_types(self.like.dtype, torch.float32))
        return t.flatten() if self._flat else t

    def starts(self) -> Tensor:
        """Return the times at which the steps begin, as a solver yields them."""
        return self.yielded(self.t[:-1], self.still)

    def to_clean(self) -> tuple[Tensor, Tensor]:
        """Return (p, q), each [N, ...]: p v + q z is the clean estimate for arriving samples and z for the others.

        Raises:
            ValueError: the times do not end at 1.
        """
        if float(self.t[-1].min()) < 1:
            raise ValueError(
                "end='clean' returns the clean estimate, so times must end at 1: extend them or use end='full'"
            )
        p, q = self.path.coefficients("v", "x", torch.where(self.arriving, self.t[:-1], 0.5), clip=0.0)
        return torch.where(self.arriving, p, 0.0), torch.where(self.arriving, q, 1.0)

    def noise_levels(self) -> NoiseLevels:
        """Return alpha and sigma at both ends of every step.

        A step that arrives at the data has alpha 1 and sigma 0 there, so that it ends on the clean estimate. This also
        holds on paths that keep some noise at t = 1.
        """
        alpha, sigma = self.path.alpha(self.t), self.path.sigma(self.t)
        alpha_k, sigma_k = alpha[:-1], sigma[:-1]
        alpha_j, sigma_j = torch.where(self.arriving, 1.0, alpha[1:]), torch.where(self.arriving, 0.0, sigma[1:])
        if self.resting:  # samples that rest get the values of a step that leaves z unchanged
            alpha_k, sigma_k, alpha_j, sigma_j = (
                torch.where(self.still, 1.0, value) for value in (alpha_k, sigma_k, alpha_j, sigma_j)
            )
        return NoiseLevels(alpha_k, sigma_k, alpha_j, sigma_j)

    def ddim(self, eta: float) -> AffineSteps:
        """Return the steps of DDIM, applied to the denoised estimate (Song et al. 2020, eq. 12).

        Raises:
            ValueError: eta outside [0, 1].
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must lie in [0, 1] (0 deterministic, 1 ancestral), got {eta}")
        noise = self.noise_levels()
        std = eta * noise.std
        by_z = (noise.sigma_j.square() - std.square()).clamp(min=0).sqrt() / noise.sigma_k
        return AffineSteps(noise.alpha_j - by_z * noise.alpha_k, by_z, std)
