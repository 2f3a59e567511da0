"""Regression losses of diffusion and flow matching, for any prediction, loss space and weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmgen.flow.path import Path, check_shapes

Weight = Callable[[Path, Tensor], Tensor]
"""(path, t) to the factor of the squared error at time t; the result has the shape of t, or is a scalar."""


@dataclass(frozen=True)
class FlowLoss:
    """The squared error of a network that outputs `prediction`, measured in `loss_space`.

    Prediction and target pass through the same conversion with the same clipped denominator (Li and He 2025, JiT,
    eq. 6). Clipping therefore changes the weight of an error but not the minimiser of the loss.
    """

    path: Path
    prediction: str
    """What the network outputs, one of `KINDS`."""
    loss_space: str
    """The quantity in which the error is measured, one of `KINDS`."""
    clip: float
    """Smallest denominator of the conversion; smaller ones are replaced by it."""
    weight: Weight | None = None
    """Factor of the error in `loss_space`."""

    def __call__(self, output: Tensor, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return the mean squared error over the last axis.

        Args:
            output: the network's prediction, [..., P].
            x: clean data, [..., P].
            eps: noise, [..., P].
            t: one time per vector of length P, [...].

        Returns:
            The weighted error, [...].

        Raises:
            ValueError: an unknown quantity, shapes that do not fit, or t outside [0, 1] or where the path diverges.
        """
        if t.shape != output.shape[:-1]:
            raise ValueError(
                f"times of shape {tuple(t.shape)} do not fit an output of shape {tuple(output.shape)}: give one t for "
                f"each vector of the last axis, {tuple(output.shape[:-1])}"
            )
        t = t.unsqueeze(-1)
        check_shapes(t, output, x, eps)
        gain = self.path.gain(self.prediction, self.loss_space, t, self.clip)
        error = (gain * (output - self.path.target(self.prediction, x, eps, t, self.clip))).square().mean(-1)
        if self.weight is None:
            return error
        factor = self.weight(self.path, t)  # with the last axis, against which a path of many noise scales broadcasts
        if factor.shape not in (t.shape, ()):
            raise ValueError(
                f"the weight returned shape {tuple(factor.shape)} for times of shape {tuple(t.shape)}: it must "
                "return one factor per t"
            )
        return factor.squeeze(-1) * error


def snr(path: Path, t: Tensor) -> Tensor:
    """The signal-to-noise ratio alpha^2 / sigma^2, which turns the x loss into the eps loss.

    Source: Salimans and Ho 2022, section 4.
    """
    path.require("score", t)
    return path.snr(t)


def min_snr(gamma: float = 5.0) -> Weight:
    """Return the weight min(SNR, gamma) for the error in x (Hang et al. 2023).

    Raises:
        ValueError: gamma that is not positive.
    """
    if not gamma > 0:
        raise ValueError(f"gamma, the largest weight, must be positive, got {gamma}")

    def weight(path: Path, t: Tensor) -> Tensor:
        """The signal-to-noise ratio, at most gamma (5 by default), for the error in x.

        Source: Hang et al. 2023.
        """
        return path.snr(t).clamp(max=gamma)

    return weight


def sigmoid(bias: float = 0.0) -> Weight:
    """Return the weight sigmoid(bias - log-SNR) for the error in eps (Kingma and Gao 2023; Hoogeboom et al. 2024)."""

    def weight(path: Path, t: Tensor) -> Tensor:
        """sigmoid(bias - log-SNR), for the error in eps, with bias 0 by default.

        Sources: Kingma and Gao 2023; Hoogeboom et al. 2024.
        """
        return torch.sigmoid(bias - path.log_snr(t))

    return weight


def logit_normal(mu: float = 0.0, sigma: float = 1.0) -> Weight:
    """Return the density of a logit-normal t as a weight.

    With uniform t, the expected loss equals that of t drawn from the logit-normal distribution without a weight (Esser
    et al. 2024, section 3.1).

    Raises:
        ValueError: sigma that is not positive.
    """
    if not sigma > 0:
        raise ValueError(f"sigma of the logit-normal must be positive, got {sigma}")

    def density(path: Path, t: Tensor) -> Tensor:
        """The density of a logit-normal t, with mu 0 and sigma 1 by default, for uniformly drawn t."""
        t = t.clamp(1e-6, 1 - 1e-6)
        n = (torch.logit(t) - mu) / sigma
        value: Tensor = (-n.square() / 2).exp() / (sigma * (2 * torch.pi) ** 0.5 * t * (1 - t))
        return value

    return density


def sigma_squared(path: Path, t: Tensor) -> Tensor:
    """The noise variance sigma^2, which turns the score-matching loss into the eps loss.

    Source: Song and Ermon 2019, eq. 6.
    """
    return path.sigma(t).square()


WEIGHTS: dict[str, Weight] = {
    "snr": snr,
    "min_snr": min_snr(),
    "sigmoid": sigmoid(),
    "logit_normal": logit_normal(),
    "sigma_squared": sigma_squared,
}
"""Loss weights with their usual constants, by name."""
WEIGHT_SPACES = {"snr": "x", "min_snr": "x", "sigmoid": "eps", "sigma_squared": "score"}
"""The loss space for which each weight is defined in its source; the others may be used in any loss space."""
