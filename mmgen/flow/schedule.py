"""The noise schedules: linear, cosine, variance preserving (continuous and DDPM's table), variance exploding."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from mmgen.flow.path import Path


class LinearPath(Path):
    """Rectified flow: alpha = t, sigma = 1 - (1 - sigma_min) t (Liu et al. 2022; Lipman et al. 2022, eq. 20)."""

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
    """The cosine schedule in log-SNR between bounds, with a shift for resolution.

    log-SNR = -2 log tan(a + s (b - a)) + shift at noise time s, alpha^2 = sigmoid(log-SNR) (Hoogeboom et al.
    2023, simple diffusion). `shift` = 2 log(noise side / image side) moves the bounds, too.
    """

    def __init__(self, log_snr_min: float = -15.0, log_snr_max: float = 15.0, shift: float = 0.0) -> None:
        if not -math.inf < log_snr_min < log_snr_max < math.inf:
            raise ValueError(f"log_snr_min {log_snr_min} must be below log_snr_max {log_snr_max}")
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
    """Variance preserving, from a rate beta(s): alpha = exp(-B / 2), B the integral of beta (Song et al. 2021).

    Its SDE is f = -beta / 2, g^2 = beta. The slope of sigma is infinite at the data.
    """

    singular = MappingProxyType({"v": (1.0,), "score": (1.0,), "log_snr": (1.0,)})

    @abstractmethod
    def beta(self, t: Tensor) -> Tensor:
        """The rate, per unit of noise time."""

    @abstractmethod
    def integral(self, t: Tensor) -> Tensor:
        """B: the rate integrated over noise time from the data to t."""

    @abstractmethod
    def _time_of_integral(self, integral: Tensor) -> Tensor:
        """The inverse of `integral`."""

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
    """beta = beta_min + s (beta_max - beta_min) in continuous time (Song et al. 2021, appendix C)."""

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
        integral = integral.clamp(max=1e30)  # pure noise: a time below 0, not infinity over infinity
        root = (self.beta_min**2 + 2 * self.growth * integral).sqrt()
        return 1 - 2 * integral / (self.beta_min + root)


class DDPMPath(VPPath):
    """A table of K steps beta_1 .. beta_K (Ho et al. 2020); step k stands at t = 1 - k / K, exactly.

    From step k - 1 to k the rate is constant, k included, so the table is a variance-preserving path like any other.
    """

    def __init__(self, betas: Sequence[float] | None = None) -> None:
        table = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        if betas is not None:
            table = torch.as_tensor(betas, dtype=torch.float64).cpu()
        if table.ndim != 1 or not len(table) or not bool(((table > 0) & (table < 1)).all()):
            raise ValueError("betas must be a list of numbers between 0 and 1, the first one next to the data")
        self.steps = len(table)
        rates = -torch.log1p(-table)
        self._tables = {"rates": rates, "knots": torch.cat([torch.zeros(1, dtype=torch.float64), rates.cumsum(0)])}
        self._moved: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def _step(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Number of whole steps below t, and the rest of one, in the precision of t."""
        steps = (1 - t) * self.steps
        # A thousandth of a step absorbs rounding, so that step k itself always belongs to the rate of step k.
        whole = ((steps - 1e-3).ceil() - 1).long().clamp(0, self.steps - 1)
        return whole, steps - whole

    def _on(self, table: str, like: Tensor) -> Tensor:
        """A table where `like` is and in its precision; copied once, for a copy would wait in every step."""
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
    """Variance exploding: alpha = 1, sigma falls geometrically from sigma_max to sigma_min (Song and Ermon 2019).

    At t = 0 the data is not gone but drowned: start samplers from sigma_max times a normal.
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
    """Another path whose noise has standard deviation `scale` (Li and He 2025, JiT: image side / 256).

    eps stays standard normal; it is sigma that grows.
    """

    def __init__(self, path: Path, scale: float) -> None:
        if not 0 < scale < math.inf:
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
        return self.path.time_of(log_snr + 2 * math.log(self.scale))

    def drift(self, t: Tensor) -> Tensor:
        return self.path.drift(t)

    def diffusion(self, t: Tensor) -> Tensor:
        return self.scale * self.path.diffusion(t)

    def half_variance_slope(self, t: Tensor) -> Tensor:
        return self.scale**2 * self.path.half_variance_slope(t)

    def smallest_level(self, times: Tensor) -> float:
        return self.path.smallest_level(times)

    def coefficients(self, source: str, target: str, t: Tensor, clip: float) -> tuple[Tensor, Tensor]:
        """Those of the inner path in units of its own noise, so that `clip` means the same at every scale."""
        if "v_sh" in (source, target):
            return super().coefficients(source, target, t, clip)
        units = {"eps": self.scale, "score": self.scale**2}  # inner quantity = unit * ours
        p, q = self.path.coefficients(source, target, t, clip)
        return p * units.get(source, 1.0) / units.get(target, 1.0), q / units.get(target, 1.0)

    def target(self, kind: str, x: Tensor, eps: Tensor, t: Tensor, clip: float = 0.0) -> Tensor:
        if kind == "v_sh":
            return super().target(kind, x, eps, t, clip)
        unit = {"eps": self.scale, "score": self.scale**2}.get(kind, 1.0)
        return self.path.target(kind, x, self.scale * eps, t, clip) / unit


PATHS: dict[str, Callable[..., Path]] = {
    "linear": LinearPath,
    "cosine": CosinePath,
    "vp": LinearBetaPath,
    "ddpm": DDPMPath,
    "ve": VEPath,
}
