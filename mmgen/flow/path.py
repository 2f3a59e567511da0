"""What a path from noise to data is, and the one conversion among x, eps, v, the score and v_sh."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

KINDS = ("x", "eps", "v", "score", "v_sh")
"""What a network may output and where an error may be measured.

`score` is the gradient of log p_t, whose regression target is -eps / sigma; `v_sh` is alpha eps - sigma x
(Salimans and Ho 2022, there called v); `v` is the velocity dz/dt.
"""


class Path(ABC):
    """z = alpha(t) x + sigma(t) eps, with t = 0 noise and t = 1 data. All methods are elementwise in t.

    The levels and their slopes are plain formulas and check nothing; what is made of them does. Noise time is
    s = 1 - t. The noising process of the same marginals is dz = f z ds + g dW.
    """

    singular: Mapping[str, tuple[float, ...]] = MappingProxyType({})
    """Times at which a quantity diverges, by name: v, score, log_snr, drift, diffusion."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Weight of the data."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Weight of the noise."""

    @abstractmethod
    def alpha_slope(self, t: Tensor) -> Tensor:
        """d alpha / dt."""

    @abstractmethod
    def sigma_slope(self, t: Tensor) -> Tensor:
        """d sigma / dt."""

    @abstractmethod
    def time_of(self, log_snr: Tensor) -> Tensor:
        """The inverse of `log_snr`; values that the path does not reach give times outside [0, 1]."""

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2), nats; infinite where alpha or sigma is zero."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def snr(self, t: Tensor) -> Tensor:
        """alpha^2 / sigma^2."""
        return (self.alpha(t) / self.sigma(t)).square()

    def drift(self, t: Tensor) -> Tensor:
        """f of the noising SDE, per unit of noise time: d log alpha / ds."""
        check_times(t)
        self.require("drift", t)
        return -self.alpha_slope(t) / self.alpha(t)

    def diffusion(self, t: Tensor) -> Tensor:
        """g of the noising SDE: g^2 = d sigma^2 / ds - 2 f sigma^2 (Kingma et al. 2021, eq. 9)."""
        check_times(t)
        self.require("diffusion", t)
        sigma = self.sigma(t)
        return (2 * sigma * (self.alpha_slope(t) / self.alpha(t) * sigma - self.sigma_slope(t))).clamp(min=0).sqrt()

    def half_variance_slope(self, t: Tensor) -> Tensor:
        """sigma sigma', which may be finite where sigma' is not."""
        return self.sigma(t) * self.sigma_slope(t)

    def mix(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The noisy mixture z, of the type of `x`; `t` is a scalar or has as many dimensions as `x`."""
        check_shapes(t, x, eps)
        check_times(t)
        return (self.alpha(t) * x + self.sigma(t) * eps).to(x.dtype)

    def target(self, kind: str, x: Tensor, eps: Tensor, t: Tensor, clip: float = 0.0) -> Tensor:
        """The value of `kind` that a network is taught; the score's sigma is kept at `clip` or more."""
        check_shapes(t, x, eps)
        check_times(t)
        if kind == "score":
            return -eps / self._floored(self.sigma(t), clip, t)
        if kind == "v":
            self.require("v", t)
        by_x, by_eps = self._weights(kind, t)
        return by_x * x + by_eps * eps

    def convert(self, source: str, target: str, value: Tensor, z: Tensor, t: Tensor, clip: float) -> Tensor:
        """Turn an estimate of `source` at (z, t) into the estimate of `target` it implies.

        `source` and `target` are of `KINDS`; `value` and `z` have one shape, `t` is a scalar or has as many
        dimensions. Denominators (alpha or sigma) smaller than `clip` are replaced by it. The result has the type of
        `z`, whatever the precision of `t`.

        Raises:
            ValueError: an unknown kind, shapes that do not fit, t outside [0, 1] or where the path is singular.
        """
        check_shapes(t, z, value)
        by_value, by_z = self.coefficients(source, target, t, clip)
        return (by_value * value + by_z * z).to(z.dtype)

    def gain(self, source: str, target: str, t: Tensor, clip: float) -> Tensor:
        """d target / d source at fixed z: an error of e in `source` is an error of gain * e in `target`."""
        return self.coefficients(source, target, t, clip)[0]

    def coefficients(self, source: str, target: str, t: Tensor, clip: float) -> tuple[Tensor, Tensor]:
        """(p, q) such that target = p source + q z.

        Cramer's rule on z = alpha x + sigma eps, source = a x + b eps. The determinant alpha b - sigma a
        (-sigma for x, alpha for eps) vanishes at one end of many paths, where its magnitude is kept at `clip`;
        for v it is alpha sigma' - alpha' sigma = -alpha sigma (d log-SNR / dt) / 2 and for v_sh alpha^2 + sigma^2,
        which vanish nowhere. The score is eps in another unit, -1 / sigma with the same floor under sigma.

        Raises:
            ValueError: as `convert` does; with `clip` zero also where a denominator vanishes.
        """
        for kind in (source, target):
            if kind not in KINDS:
                raise ValueError(f"unknown quantity '{kind}' (one of: {', '.join(KINDS)})")
        if not clip >= 0:
            raise ValueError(f"clip is the smallest denominator of a conversion, a number of 0 or more, got {clip}")
        check_times(t)
        if source == target:
            return t * 0 + 1, t * 0
        if "v" in (source, target):
            self.require("v", t)
        alpha, sigma = self.alpha(t), self.sigma(t)
        if source == "score":
            p, q = self.coefficients("eps", target, t, clip)
            return -sigma.clamp(min=clip) * p, q
        if target == "score":
            p, q = self.coefficients(source, "eps", t, clip)
            scale = -1 / self._floored(sigma, clip, t)
            return p * scale, q * scale
        a, b = self._weights(source, t)
        c, d = self._weights(target, t)
        determinant = alpha * b - sigma * a
        if source == "x":
            determinant = -self._floored(-determinant, clip, t)
        elif source == "eps":
            determinant = self._floored(determinant, clip, t)
        return (alpha * d - sigma * c) / determinant, (c * b - d * a) / determinant

    def smallest_level(self, times: Tensor) -> float:
        """Half the smallest alpha or sigma above zero at which a sampler on `times` (to t = 1) may ask: a safe clip.

        Only where one of them is zero (alpha at pure noise) does a conversion with this clip differ from an exact one.
        """
        levels = torch.cat([self.alpha(times[:-1]), self.sigma(times[:-1])])
        return float(levels[levels > 0].min()) / 2

    def _floored(self, value: Tensor, clip: float, t: Tensor) -> Tensor:
        """A denominator, at least `clip`."""
        if clip <= 0 and looked_at(value) and bool((value == 0).any()):
            at = float(t.broadcast_to(value.shape)[value == 0][0])
            raise ValueError(
                f"alpha or sigma of {type(self).__name__} is zero at t = {at:g} and this conversion divides by it: "
                "give a clip above 0, or stay inside (0, 1)"
            )
        return value.clamp(min=clip)

    def _weights(self, kind: str, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) such that the quantity `kind` equals a x + b eps."""
        if kind == "x":
            return t * 0 + 1, t * 0
        if kind == "eps":
            return t * 0, t * 0 + 1
        if kind == "v":
            return self.alpha_slope(t), self.sigma_slope(t)
        if kind == "v_sh":
            return -self.sigma(t), self.alpha(t)
        raise ValueError(f"unknown quantity '{kind}' (one of: {', '.join(KINDS)})")

    def require(self, quantity: str, t: Tensor) -> None:
        """Raise a ValueError where `quantity` diverges at one of the times `t` (looked at on a CPU only)."""
        if looked_at(t):
            for time in self.singular.get(quantity, ()):
                if bool((t == time).any()):
                    fix = "begin a little later, as at t = 1e-3" if time == 0 else "end a sampler on its clean estimate"
                    raise ValueError(
                        f"{quantity} of {type(self).__name__} diverges at t = {time:g}: stay inside (0, 1), or {fix}"
                        + ("" if time == 0 else " (end='clean')")
                    )


def looked_at(t: Tensor) -> bool:
    """Whether values are checked: not on an accelerator, which would have to be waited for, nor while compiling."""
    return t.device.type == "cpu" and not torch.compiler.is_compiling()


def check_times(t: Tensor) -> None:
    """Raise a ValueError for times outside [0, 1], where they are looked at (`looked_at`)."""
    t = t.detach()
    if looked_at(t) and t.numel() and not (float(t.min()) >= 0 and float(t.max()) <= 1):
        raise ValueError(
            f"flow time must lie in [0, 1] (0 is noise, 1 is data), got {float(t.min()):g} to {float(t.max()):g}; "
            "diffusion steps k of K are t = 1 - k / K"
        )


def check_shapes(t: Tensor, *values: Tensor) -> None:
    """Raise a ValueError unless all `values` have one shape and `t` is a scalar or has as many dimensions.

    Times of shape [B] against values of shape [B, B] would broadcast along the wrong axis without a word.
    """
    shape = values[0].shape
    if any(value.shape != shape for value in values):
        raise ValueError(f"shapes differ: {', '.join(str(tuple(value.shape)) for value in values)}")
    if t.ndim and (t.ndim != len(shape) or any(a not in (1, b) for a, b in zip(t.shape, shape, strict=True))):
        raise ValueError(
            f"times of shape {tuple(t.shape)} do not belong to values of shape {tuple(shape)}: give a scalar, or one "
            "axis per axis of the values, as in t.view(-1, 1)"
        )
