"""The paths: linear, cosine, variance preserving (continuous, or DDPM's table) and variance exploding."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from mmgen.flow.path import Path, values_are_checked


class LinearPath(Path):
    """The linear path of flow matching and rectified flow: alpha = t, sigma = 1 - (1 - sigma_min) t.

    Sources: Liu et al. 2022; Lipman et al. 2022, eq. 20.

    Args:
        sigma_min: the noise that remains at t = 1, in [0, 1).

    Raises:
        ValueError: sigma_min outside [0, 1).
    """

    def __init__(self, sigma_min: float = 0.0) -> None:
        if not 0 <= sigma_min < 1:
            raise ValueError(f"sigma_min must lie in [0, 1), got {sigma_min}")
        self.sigma_min = sigma_min
        self.singular = {"log_snr": (0.0,), "drift": (0.0,), "diffusion": (0.0,)}
        if sigma_min == 0:
            self.singular = {**self.singular, "log_snr": (0.0, 1.0), "score": (1.0,)}

    def alpha(self, t: Tensor) -> Tensor:
        return t

    def sigma(self, t: Tensor) -> Tensor:
        return 1 - t if self.sigma_min == 0 else 1 - (1 - self.sigma_min) * t

    def alpha_slope(self, t: Tensor) -> Tensor:
        return t * 0 + 1

    def sigma_slope(self, t: Tensor) -> Tensor:
        return t * 0 - (1 - self.sigma_min)

    def time_of(self, log_snr: Tensor) -> Tensor:
        return 1 / ((-log_snr / 2).exp() + (1 - self.sigma_min))


class CosinePath(Path):
    """The variance-preserving cosine schedule between two bounds of log-SNR, with a shift for the resolution.

    log-SNR = -2 log tan(a + s (b - a)) + shift at noise time s = 1 - t, alpha^2 = sigmoid(log-SNR) and
    sigma^2 = sigmoid(-log-SNR) (Hoogeboom et al. 2023, simple diffusion).

    Args:
        log_snr_min: log-SNR at t = 0, in nats, before the shift.
        log_snr_max: log-SNR at t = 1, in nats, before the shift.
        shift: added to the log-SNR, also at its bounds; 2 log(reference side / image side).

    Raises:
        ValueError: bounds that do not rise, or values that are not finite.
    """

    def __init__(self, log_snr_min: float = -15.0, log_snr_max: float = 15.0, shift: float = 0.0) -> None:
        if not -math.inf < log_snr_min < log_snr_max < math.inf:
            raise ValueError(f"log_snr_min {log_snr_min} must be below log_snr_max {log_snr_max}, both finite")
        if not math.isfinite(shift):
            raise ValueError(f"the shift of the log-SNR must be a number, got {shift}")
        self.first = math.atan(math.exp(-log_snr_max / 2))
        self.span = math.atan(math.exp(-log_snr_min / 2)) - self.first
        self.shift = shift

    def _angle(self, t: Tensor) -> Tensor:
        return self.first + (1 - t) * self.span

    def log_snr(self, t: Tensor) -> Tensor:
        return -2 * self._angle(t).tan().log() + self.shift

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sigmoid(self.log_snr(t)).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sigmoid(-self.log_snr(t)).sqrt()

    def _log_snr_slope(self, t: Tensor) -> Tensor:
        return 4 * self.span / (2 * self._angle(t)).sin()

    def alpha_slope(self, t: Tensor) -> Tensor:
        return self.alpha(t) * self.sigma(t).square() * self._log_snr_slope(t) / 2

    def sigma_slope(self, t: Tensor) -> Tensor:
        return -self.sigma(t) * self.alpha(t).square() * self._log_snr_slope(t) / 2

    def time_of(self, log_snr: Tensor) -> Tensor:
        angle = torch.atan((-(log_snr - self.shift) / 2).exp())
        return 1 - (angle - self.first) / self.span


class VPPath(Path):
    """A variance-preserving path with rate beta(s): alpha = exp(-B / 2), B the integral of beta over noise time.

    Its SDE has f = -beta / 2 and g^2 = beta (Song et al. 2021). The slope of sigma is infinite at the data.
    """

    singular = MappingProxyType({"v": (1.0,), "score": (1.0,), "log_snr": (1.0,)})

    @abstractmethod
    def beta(self, t: Tensor) -> Tensor:
        """Return the rate beta, per unit of noise time."""

    @abstractmethod
    def integral(self, t: Tensor) -> Tensor:
        """Return B, the integral of the rate over noise time from the data to t."""

    @abstractmethod
    def _time_of_integral(self, integral: Tensor) -> Tensor:
        """Return the time at which `integral` has this value."""

    def alpha(self, t: Tensor) -> Tensor:
        return (-self.integral(t) / 2).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(-self.integral(t))).sqrt()

    def alpha_slope(self, t: Tensor) -> Tensor:
        return self.beta(t) * self.alpha(t) / 2

    def sigma_slope(self, t: Tensor) -> Tensor:
        return -self.beta(t) * self.alpha(t).square() / (2 * self.sigma(t))

    def half_variance_slope(self, t: Tensor) -> Tensor:
        return -self.beta(t) * self.alpha(t).square() / 2

    def log_snr(self, t: Tensor) -> Tensor:
        return -torch.expm1(self.integral(t)).log()

    def drift(self, t: Tensor) -> Tensor:
        return -self.beta(t) / 2

    def diffusion(self, t: Tensor) -> Tensor:
        return self.beta(t).sqrt()

    def time_of(self, log_snr: Tensor) -> Tensor:
        return self._time_of_integral(torch.nn.functional.softplus(-log_snr))


class LinearBetaPath(VPPath):
    """The variance-preserving path in continuous time with beta = beta_min + s (beta_max - beta_min).

    Source: Song et al. 2021, appendix C.

    Args:
        beta_min: the rate at the data.
        beta_max: the rate at the noise.

    Raises:
        ValueError: rates that are not positive, finite and rising.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        if not 0 < beta_min < beta_max < math.inf:
            raise ValueError(f"rates must satisfy 0 < beta_min < beta_max, got {beta_min} and {beta_max}")
        self.beta_min, self.growth = beta_min, beta_max - beta_min

    def beta(self, t: Tensor) -> Tensor:
        return self.beta_min + (1 - t) * self.growth

    def integral(self, t: Tensor) -> Tensor:
        s = 1 - t
        return s * (self.beta_min + s * self.growth / 2)

    def _time_of_integral(self, integral: Tensor) -> Tensor:
        integral = integral.clamp(max=1e30)  # pure noise gives a time below 0 instead of infinity over infinity
        root = (self.beta_min**2 + 2 * self.growth * integral).sqrt()
        return 1 - 2 * integral / (self.beta_min + root)


class DDPMPath(VPPath):
    """DDPM's table of K steps as a variance-preserving path: step k is at t = 1 - k / K exactly.

    Source: Ho et al. 2020. The rate is constant from step k - 1 to step k, including k, which makes the table a path in
    continuous time.

    Args:
        betas: beta_1 .. beta_K, each in (0, 1), beginning next to the data; by default DDPM's 1,000 values from 1e-4
            to 0.02.

    Raises:
        ValueError: an empty list, or a beta outside (0, 1).
    """

    def __init__(self, betas: Sequence[float] | None = None) -> None:
        table = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        if betas is not None:
            table = torch.as_tensor(betas, dtype=torch.float64).cpu()
        if table.ndim != 1 or not len(table) or not bool(((table > 0) & (table < 1)).all()):
            raise ValueError(
                "betas must be a list of numbers between 0 and 1, beginning with the step next to the data"
            )
        self.steps = len(table)
        rates = -torch.log1p(-table)
        self._tables = {"rates": rates, "knots": torch.cat([torch.zeros(1, dtype=torch.float64), rates.cumsum(0)])}
        self._moved: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def _step(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the number of whole steps between the data and t, and the remaining fraction of a step."""
        steps = (1 - t) * self.steps
        # Subtracting a thousandth of a step absorbs rounding, so that step k itself always has the rate of step k.
        whole = ((steps - 1e-3).ceil() - 1).long().clamp(0, self.steps - 1)
        return whole, steps - whole

    def _on(self, table: str, like: Tensor) -> Tensor:
        """Return a table on the device and in the precision of `like`; cached, because a copy synchronises."""
        key = (table, like.device, like.dtype)
        if key not in self._moved:
            self._moved[key] = self._tables[table].to(like.device, like.dtype)
        return self._moved[key]

    def _of(self, table: str, index: Tensor, t: Tensor) -> Tensor:
        return torch.take(self._on(table, t), index)

    def beta(self, t: Tensor) -> Tensor:
        whole, _ = self._step(t)
        return self._of("rates", whole, t) * self.steps

    def integral(self, t: Tensor) -> Tensor:
        whole, rest = self._step(t)
        return self._of("knots", whole, t) + rest * self._of("rates", whole, t)

    def _time_of_integral(self, integral: Tensor) -> Tensor:
        knots = self._on("knots", integral)
        whole = (torch.searchsorted(knots, integral.contiguous(), right=True) - 1).clamp(0, self.steps - 1)
        rest = (integral - torch.take(knots, whole)) / self._of("rates", whole, integral)
        return 1 - (whole + rest) / self.steps


class VEPath(Path):
    """The variance-exploding path: alpha = 1, and sigma falls geometrically from sigma_max to sigma_min.

    Source: Song and Ermon 2019. At t = 0 z still contains the data, under much larger noise: start a solver from
    sigma_max times standard normal noise.

    Args:
        sigma_min: noise level at t = 1.
        sigma_max: noise level at t = 0.

    Raises:
        ValueError: noise levels that are not positive, finite and in this order.
    """

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0) -> None:
        if not 0 < sigma_min < sigma_max < math.inf:
            raise ValueError(f"noise levels must satisfy 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
        self.sigma_min, self.log_ratio = sigma_min, math.log(sigma_max / sigma_min)

    def alpha(self, t: Tensor) -> Tensor:
        return t * 0 + 1

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * ((1 - t) * self.log_ratio).exp()

    def alpha_slope(self, t: Tensor) -> Tensor:
        return t * 0

    def sigma_slope(self, t: Tensor) -> Tensor:
        return -self.log_ratio * self.sigma(t)

    def time_of(self, log_snr: Tensor) -> Tensor:
        return 1 - (-log_snr / 2 - math.log(self.sigma_min)) / self.log_ratio


class ScaledNoise(Path):
    """Another path with its noise multiplied by `scale` (Li and He 2025, JiT, use image side / 256).

    eps stays standard normal; sigma is multiplied.

    Args:
        path: the inner path.
        scale: standard deviation of the noise at t = 0 relative to the inner path: a number, or a tensor that
            broadcasts against the times, such as [R, 1] for a scale per sample.

    Raises:
        ValueError: a scale that is not positive and finite (of a tensor, checked on a CPU only).
    """

    def __init__(self, path: Path, scale: float | Tensor) -> None:
        if isinstance(scale, Tensor):
            right = not values_are_checked(scale) or bool(((scale > 0) & scale.isfinite()).all())
        else:
            right = 0 < scale < math.inf
        if not right:
            raise ValueError(f"the noise scale must be positive, got {scale}")
        self.path, self.scale, self.singular = path, scale, dict(path.singular)

    def alpha(self, t: Tensor) -> Tensor:
        return self.path.alpha(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.scale * self.path.sigma(t)

    def alpha_slope(self, t: Tensor) -> Tensor:
        return self.path.alpha_slope(t)

    def sigma_slope(self, t: Tensor) -> Tensor:
        return self.scale * self.path.sigma_slope(t)

    def time_of(self, log_snr: Tensor) -> Tensor:
        scale = self.scale
        return self.path.time_of(log_snr + 2 * (scale.log() if isinstance(scale, Tensor) else math.log(scale)))

    def drift(self, t: Tensor) -> Tensor:
        return self.path.drift(t)

    def diffusion(self, t: Tensor) -> Tensor:
        return self.scale * self.path.diffusion(t)

    def half_variance_slope(self, t: Tensor) -> Tensor:
        return self.scale**2 * self.path.half_variance_slope(t)

    def smallest_level(self, times: Tensor) -> float:
        return self.path.smallest_level(times)

    def coefficients(self, source: str, target: str, t: Tensor, clip: float) -> tuple[Tensor, Tensor]:
        """As `Path.coefficients`, computed on the inner path, so that `clip` has the same meaning at every scale."""
        if "v_sh" in (source, target):
            return super().coefficients(source, target, t, clip)
        p, q = self.path.coefficients(source, target, t, clip)
        return p * self._unit(source) / self._unit(target), q / self._unit(target)

    def target(self, kind: str, x: Tensor, eps: Tensor, t: Tensor, clip: float = 0.0) -> Tensor:
        if kind == "v_sh":
            return super().target(kind, x, eps, t, clip)
        return self.path.target(kind, x, self.scale * eps, t, clip) / self._unit(kind)

    def _unit(self, kind: str) -> float | Tensor:
        """Return the factor by which the quantity of the inner path exceeds that of this path."""
        return {"eps": self.scale, "score": self.scale**2}.get(kind, 1.0)


PATHS: dict[str, Callable[..., Path]] = {
    "linear": LinearPath,
    "cosine": CosinePath,
    "vp": LinearBetaPath,
    "ddpm": DDPMPath,
    "ve": VEPath,
}
"""Constructors of the paths, by name."""
