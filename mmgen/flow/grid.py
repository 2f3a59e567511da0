"""The times of a solver's steps, and the coefficients that follow from them.

All coefficients are computed once, in double precision on the CPU; a step then never waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmgen.flow.path import Path, check_times

Coefficient = float | Tensor


@dataclass(frozen=True)
class Levels:
    """Noise levels of every step, from the noisier time k to the cleaner time j, [N, ...] in double precision."""

    alpha_k: Tensor
    sigma_k: Tensor
    alpha_j: Tensor
    sigma_j: Tensor

    @property
    def kept(self) -> Tensor:
        """exp(log-SNR_k - log-SNR_j): zero where k is pure noise or j is clean."""
        return (self.alpha_k * self.sigma_j / (self.alpha_j * self.sigma_k)).square()

    @property
    def std(self) -> Tensor:
        """Standard deviation of the ancestral step, sigma_j sqrt(1 - kept)."""
        return (1 - self.kept).clamp(min=0).sqrt() * self.sigma_j


@dataclass(frozen=True)
class AffineSteps:
    """Coefficients [N, ...] of steps z_j = by_answer answer + by_z z + std n, n standard normal."""

    by_answer: Tensor
    by_z: Tensor
    std: Tensor


class Grid:
    """Times in double precision on the CPU, one axis per axis of z, and what is computed from them."""

    def __init__(self, z: Tensor, times: Tensor, path: Path, rising: bool = True) -> None:
        times = torch.as_tensor(times).detach().to("cpu", torch.float64)
        if times.ndim not in (1, 2) or (times.ndim == 2 and times.shape[1] != len(z)):
            raise ValueError(
                f"times must be [N + 1], or [N + 1, {len(z)}] with a grid per row, got {list(times.shape)}"
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
        """Rows that rest during a step: not yet begun, or already at their end."""
        self.resting = least <= 0 <= most and bool(self.still.any())
        """Whether there are any: most grids have none, and need none of what keeps them where they are."""
        self.arriving = self.t[1:] == 1
        """Steps [N, ...] that bring a row to the data."""
        if self.resting:
            self.arriving &= ~self.still

    def send(self, coefficient: Tensor) -> Sequence[Coefficient]:
        """A coefficient per step: a number where all rows share it, else [R, 1, ...] on the device of z."""
        if self._flat:
            numbers: list[float] = coefficient.flatten().tolist()
            return numbers
        return coefficient.to(self.like.device, self.like.dtype).unbind()

    def ask(self, t: Tensor, idle: Tensor) -> Tensor:
        """Times as they are yielded, [N] or [N, R, 1, ...], in single precision or better.

        A row that is at the data and `idle` is asked about its last time before, where every field is finite.
        """
        if self.resting or not self._flat:
            before = torch.where(self.t < 1, self.t, -1.0).amax(0, keepdim=True).clamp(min=0)
            t = torch.where((t == 1) & idle, before, t)
        t = t.to(self.like.device, torch.promote_types(self.like.dtype, torch.float32))
        return t.flatten() if self._flat else t

    def starts(self) -> Tensor:
        """The times at which the steps begin, as they are yielded."""
        return self.ask(self.t[:-1], self.still)

    def to_clean(self) -> tuple[Tensor, Tensor]:
        """(p, q) [N, ...] such that p v + q z is the clean estimate where a row arrives, and z where it does not."""
        if float(self.t[-1].min()) < 1:
            raise ValueError("end='clean' returns the clean estimate, so times must end at 1; else use end='full'")
        p, q = self.path.coefficients("v", "x", torch.where(self.arriving, self.t[:-1], 0.5), clip=0.0)
        return torch.where(self.arriving, p, 0.0), torch.where(self.arriving, q, 1.0)

    def levels(self) -> Levels:
        """The noise levels of every step.

        A step that arrives at the data ends on the clean estimate, also where the path keeps some noise there.
        """
        alpha, sigma = self.path.alpha(self.t), self.path.sigma(self.t)
        alpha_k, sigma_k = alpha[:-1], sigma[:-1]
        alpha_j, sigma_j = torch.where(self.arriving, 1.0, alpha[1:]), torch.where(self.arriving, 0.0, sigma[1:])
        if self.resting:  # rows that rest get the numbers of a step that does nothing
            alpha_k, sigma_k, alpha_j, sigma_j = (
                torch.where(self.still, 1.0, level) for level in (alpha_k, sigma_k, alpha_j, sigma_j)
            )
        return Levels(alpha_k, sigma_k, alpha_j, sigma_j)

    def ddim(self, eta: float) -> AffineSteps:
        """DDIM's steps (Song et al. 2020, eq. 12); the answer is the denoised estimate.

        Raises:
            ValueError: eta outside [0, 1].
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must lie in [0, 1] (0 deterministic, 1 ancestral), got {eta}")
        level = self.levels()
        std = eta * level.std
        by_z = (level.sigma_j.square() - std.square()).clamp(min=0).sqrt() / level.sigma_k
        return AffineSteps(level.alpha_j - by_z * level.alpha_k, by_z, std)
