"""Paths from noise to data, and the one conversion among x, eps and v."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

KINDS = ("x", "eps", "v")


class Path(ABC):
    """z = alpha(t) x + sigma(t) eps, with t = 0 noise and t = 1 data. All methods are elementwise in t."""

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

    def mix(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The noisy mixture z; `t` broadcasts against `x`."""
        return self.alpha(t) * x + self.sigma(t) * eps

    def velocity(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """v = dz/dt = alpha' x + sigma' eps."""
        return self.alpha_slope(t) * x + self.sigma_slope(t) * eps

    def _weights(self, kind: str, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) such that the quantity `kind` equals a x + b eps."""
        one, zero = t * 0 + 1, t * 0
        if kind == "x":
            return one, zero
        if kind == "eps":
            return zero, one
        if kind == "v":
            return self.alpha_slope(t), self.sigma_slope(t)
        raise ValueError(f"unknown quantity '{kind}' (one of: {', '.join(KINDS)})")

    def _solve(self, source: str, target: str, t: Tensor, clip: float) -> tuple[Tensor, Tensor]:
        """(p, q) such that target = p source + q z.

        Cramer's rule on z = alpha x + sigma eps, source = a x + b eps. The determinant alpha b - sigma a
        (-sigma for x, alpha for eps) vanishes at one end of the path, where its magnitude is kept at `clip`;
        for v it is alpha sigma' - alpha' sigma, which vanishes nowhere.
        """
        alpha, sigma = self.alpha(t), self.sigma(t)
        a, b = self._weights(source, t)
        c, d = self._weights(target, t)
        if source == target:
            return t * 0 + 1, t * 0
        determinant = alpha * b - sigma * a
        if source == "x":
            determinant = determinant.clamp(max=-clip)
        elif source == "eps":
            determinant = determinant.clamp(min=clip)
        return (alpha * d - sigma * c) / determinant, (c * b - d * a) / determinant

    def convert(self, source: str, target: str, value: Tensor, z: Tensor, t: Tensor, clip: float) -> Tensor:
        """Turn an estimate of `source` at (z, t) into the estimate of `target` it implies.

        `source` and `target` are "x", "eps" or "v"; `value` and `z` have one shape, `t` broadcasts against
        it. Denominators smaller than `clip` are replaced by it.
        """
        by_value, by_z = self._solve(source, target, t, clip)
        return by_value * value + by_z * z

    def gain(self, source: str, target: str, t: Tensor, clip: float) -> Tensor:
        """d target / d source at fixed z: an error of e in `source` is an error of gain * e in `target`."""
        return self._solve(source, target, t, clip)[0]


class LinearPath(Path):
    """Rectified flow: alpha = t, sigma = 1 - t, v = x - eps (Liu et al. 2022, Lipman et al. 2022)."""

    def alpha(self, t: Tensor) -> Tensor:
        return t

    def sigma(self, t: Tensor) -> Tensor:
        return 1 - t

    def alpha_slope(self, t: Tensor) -> Tensor:
        return t * 0 + 1

    def sigma_slope(self, t: Tensor) -> Tensor:
        return t * 0 - 1
