"""The interface of a path from noise to data, and the conversion between x, eps, v, score and v_sh."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

KINDS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "x": "Clean data",
        "eps": "Noise, standard normal on every path",
        "v": "The velocity dz/dt = alpha' x + sigma' eps",
        "score": "The gradient of log p_t(z), with regression target -eps / sigma",
        "v_sh": "alpha eps - sigma x, the quantity that Salimans and Ho 2022 call v",
    }
)
"""The quantities that a network may output and in which an error may be measured."""


class Path(ABC):
    """A path from noise to data: z = alpha(t) x + sigma(t) eps, with t = 0 noise and t = 1 data.

    All methods are elementwise in t. `alpha`, `sigma` and their slopes are plain formulas without checks; the methods
    built on them check their input. Noise time is s = 1 - t. The noising SDE with the same marginals is
    dz = f z ds + g dW.
    """

    singular: Mapping[str, tuple[float, ...]] = MappingProxyType({})
    """The times at which a quantity diverges, by name: v, score, log_snr, drift, diffusion."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Return the weight of the data in z."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Return the weight of the noise in z."""

    @abstractmethod
    def alpha_slope(self, t: Tensor) -> Tensor:
        """Return d alpha / dt."""

    @abstractmethod
    def sigma_slope(self, t: Tensor) -> Tensor:
        """Return d sigma / dt."""

    @abstractmethod
    def time_of(self, log_snr: Tensor) -> Tensor:
        """Return the time at which the path has this log-SNR: the inverse of `log_snr`.

        A value that the path does not reach gives a time outside [0, 1].
        """

    def log_snr(self, t: Tensor) -> Tensor:
        """Return log(alpha^2 / sigma^2) in nats; it is infinite where alpha or sigma is zero."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def snr(self, t: Tensor) -> Tensor:
        """Return alpha^2 / sigma^2."""
        return (self.alpha(t) / self.sigma(t)).square()

    def drift(self, t: Tensor) -> Tensor:
        """Return f of the noising SDE, per unit of noise time: d log alpha / ds.

        Raises:
            ValueError: t outside [0, 1] or where f diverges.
        """
        check_times(t)
        self.require("drift", t)
        return -self.alpha_slope(t) / self.alpha(t)

    def diffusion(self, t: Tensor) -> Tensor:
        """Return g of the noising SDE: g^2 = d sigma^2 / ds - 2 f sigma^2 (Kingma et al. 2021, eq. 9).

        Raises:
            ValueError: t outside [0, 1] or where g diverges.
        """
        check_times(t)
        self.require("diffusion", t)
        sigma = self.sigma(t)
        return (2 * sigma * (self.alpha_slope(t) / self.alpha(t) * sigma - self.sigma_slope(t))).clamp(min=0).sqrt()

    def half_variance_slope(self, t: Tensor) -> Tensor:
        """Return sigma sigma', half the slope of sigma^2; it may be finite where sigma' is not."""
        return self.sigma(t) * self.sigma_slope(t)

    def mix(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return the noisy mixture z = alpha x + sigma eps.

        Args:
            x: clean data, any shape.
            eps: standard normal noise, of the shape of `x`.
            t: a scalar, or a tensor with as many axes as `x`.

        Returns:
            z, of the shape and type of `x`.

        Raises:
            ValueError: shapes that do not fit, or t outside [0, 1].
        """
        check_shapes(t, x, eps)
        check_times(t)
        return (self.alpha(t) * x + self.sigma(t) * eps).to(x.dtype)

    def target(self, kind: str, x: Tensor, eps: Tensor, t: Tensor, clip: float = 0.0) -> Tensor:
        """Return the regression target of `kind` for data `x` and noise `eps`.

        For the score, -eps / sigma, sigma is replaced by `clip` where it is smaller. Shapes are those of `mix`.

        Raises:
            ValueError: an unknown quantity, shapes that do not fit, or t outside [0, 1] or where the target diverges.
        """
        check_shapes(t, x, eps)
        check_times(t)
        if kind == "score":
            return -eps / self._floored(self.sigma(t), clip, t)
        if kind == "v":
            self.require("v", t)
        by_x, by_eps = self._weights(kind, t)
        return by_x * x + by_eps * eps

    def convert(self, source: str, target: str, value: Tensor, z: Tensor, t: Tensor, clip: float) -> Tensor:
        """Convert an estimate of `source` at (z, t) to the estimate of `target` that it implies.

        Args:
            source: the quantity of `value`, one of `KINDS`.
            target: the quantity of the result, one of `KINDS`.
            value: the estimate, any shape.
            z: the noisy mixture, of the shape of `value`.
            t: a scalar, or a tensor with as many axes as `z`.
            clip: the smallest denominator; an alpha or sigma below it is replaced by it.

        Returns:
            The estimate of `target`, of the shape and type of `z`, whatever the precision of `t`.

        Raises:
            ValueError: an unknown quantity, shapes that do not fit, or t outside [0, 1] or where the path diverges.
        """
        check_shapes(t, z, value)
        by_value, by_z = self.coefficients(source, target, t, clip)
        return (by_value * value + by_z * z).to(z.dtype)

    def gain(self, source: str, target: str, t: Tensor, clip: float) -> Tensor:
        """Return d target / d source at fixed z: an error e in `source` is an error gain * e in `target`.

        The arguments are those of `convert`; the result has the shape of `t`.
        """
        return self.coefficients(source, target, t, clip)[0]

    def coefficients(self, source: str, target: str, t: Tensor, clip: float) -> tuple[Tensor, Tensor]:
        """Return (p, q), each of the shape of `t`, such that target = p source + q z.

        This is Cramer's rule for z = alpha x + sigma eps and source = a x + b eps, with determinant alpha b - sigma a.
        It is -sigma for x and alpha for eps, which vanish at one end of many paths; their magnitude is kept at `clip`
        or more. It is alpha sigma' - alpha' sigma = -alpha sigma (d log-SNR / dt) / 2 for v and alpha^2 + sigma^2 for
        v_sh, which do not vanish. The score is eps times -1 / sigma, with sigma kept at `clip` or more.

        Raises:
            ValueError: an unknown quantity, a negative `clip`, t outside [0, 1] or where the path diverges, or a
                denominator of zero with `clip` 0.
        """
        for kind in (source, target):
            if kind not in KINDS:
                raise ValueError(f"unknown quantity '{kind}' (one of: {', '.join(KINDS)})")
        if not clip >= 0:
            raise ValueError(f"clip is the smallest denominator of a conversion and must be 0 or more, got {clip}")
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
        """Return a safe `clip` for a solver on `times`: half the smallest nonzero alpha or sigma before the last time.

        A conversion with this clip differs from the exact one only where alpha or sigma is zero, such as alpha at pure
        noise.

        Args:
            times: [N + 1, ...], rising to t = 1.
        """
        values = torch.cat([self.alpha(times[:-1]), self.sigma(times[:-1])])
        return float(values[values > 0].min()) / 2

    def _floored(self, value: Tensor, clip: float, t: Tensor) -> Tensor:
        """Return a denominator of at least `clip`; with `clip` 0, refuse a zero."""
        if clip <= 0 and values_are_checked(value) and bool((value == 0).any()):
            at = float(t.broadcast_to(value.shape)[value == 0][0])
            raise ValueError(
                f"alpha or sigma of {type(self).__name__} is zero at t = {at:g} and this conversion divides by it: "
                "give a clip above 0, or stay inside (0, 1)"
            )
        return value.clamp(min=clip)

    def _weights(self, kind: str, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (a, b) such that the quantity `kind` equals a x + b eps."""
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
        """Raise a ValueError if `quantity` diverges at one of the times `t`; checked on a CPU only."""
        if values_are_checked(t):
            for time in self.singular.get(quantity, ()):
                if bool((t == time).any()):
                    fix = "begin a little later, as at t = 1e-3"
                    if time != 0:
                        fix = "end the solver on its clean estimate (end='clean')"
                    raise ValueError(
                        f"{quantity} of {type(self).__name__} diverges at t = {time:g}: stay inside (0, 1), or {fix}"
                    )


def values_are_checked(t: Tensor) -> bool:
    """Return whether values of `t` are checked: on a CPU only, since reading an accelerator's values synchronises.

    While a graph is compiled, values are not checked either.
    """
    return t.device.type == "cpu" and not torch.compiler.is_compiling()


def check_times(t: Tensor) -> None:
    """Raise a ValueError for times outside [0, 1], where `values_are_checked` allows the check."""
    t = t.detach()
    if values_are_checked(t) and t.numel() and not (float(t.min()) >= 0 and float(t.max()) <= 1):
        raise ValueError(
            f"flow time must lie in [0, 1] (0 is noise, 1 is data), got {float(t.min()):g} to {float(t.max()):g}; "
            "diffusion steps k of K are t = 1 - k / K"
        )


def check_shapes(t: Tensor, *values: Tensor) -> None:
    """Raise a ValueError unless all `values` have one shape and `t` is a scalar or has as many axes.

    Times of shape [R] and values of shape [R, R] would otherwise broadcast along the wrong axis without an error.
    """
    shape = values[0].shape
    if any(value.shape != shape for value in values):
        raise ValueError(f"shapes differ: {', '.join(str(tuple(value.shape)) for value in values)}")
    if t.ndim and (t.ndim != len(shape) or any(a not in (1, b) for a, b in zip(t.shape, shape, strict=True))):
        raise ValueError(
            f"times of shape {tuple(t.shape)} do not fit values of shape {tuple(shape)}: give a scalar, or a tensor "
            "with one axis per axis of the values, as in t.view(-1, 1)"
        )
