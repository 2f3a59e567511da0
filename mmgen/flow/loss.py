"""The regression losses of diffusion and flow matching: any prediction, any loss space, any weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmgen.flow.path import Path, check_shapes

Weight = Callable[[Path, Tensor], Tensor]
"""Factor of the squared error at time t of a path."""


@dataclass(frozen=True)
class FlowLoss:
    """Squared error of a network that outputs `prediction`, measured in `loss_space`.

    Prediction and target pass through the same conversion with the same clipped denominator (Li and He 2025,
    JiT, eq. 6), so clipping changes the weight of an entry and never its minimiser.
    """

    path: Path
    prediction: str
    loss_space: str
    clip: float
    """Smallest denominator of the conversion."""
    weight: Weight | None = None
    """Multiplies the error in `loss_space`."""

    def __call__(self, output: Tensor, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The error averaged over the last axis, [...], of `output`, `x` and `eps` [..., P] at times `t` [...].

        Raises:
            ValueError: an unknown kind, shapes that do not fit, t outside [0, 1] or where the path is singular.
        """
        if t.shape != output.shape[:-1]:
            raise ValueError(f"times {tuple(t.shape)} do not belong to an output {tuple(output.shape)}: one t per row")
        t = t.unsqueeze(-1)
        check_shapes(t, output, x, eps)
        gain = self.path.gain(self.prediction, self.loss_space, t, self.clip)
        error = (gain * (output - self.path.target(self.prediction, x, eps, t, self.clip))).square().mean(-1)
        if self.weight is None:
            return error
        factor = self.weight(self.path, t.squeeze(-1))
        if factor.shape not in (error.shape, ()):
            raise ValueError(
                f"the weight answered {tuple(factor.shape)} for times {tuple(error.shape)}: one factor per t"
            )
        return factor * error


def snr(path: Path, t: Tensor) -> Tensor:
    """SNR: with it the loss in x-space is the loss in eps-space (Salimans and Ho 2022, section 4)."""
    path.require("score", t)
    return path.snr(t)


def min_snr(gamma: float = 5.0) -> Weight:
    """min(SNR, gamma) on the error in x-space (Hang et al. 2023)."""
    if not gamma > 0:
        raise ValueError(f"gamma, the largest weight, must be positive, got {gamma}")
    return lambda path, t: path.snr(t).clamp(max=gamma)


def sigmoid(bias: float = 0.0) -> Weight:
    """sigmoid(bias - log-SNR) on the error in eps-space (Kingma and Gao 2023; Hoogeboom et al. 2024)."""
    return lambda path, t: torch.sigmoid(bias - path.log_snr(t))


def logit_normal(mu: float = 0.0, sigma: float = 1.0) -> Weight:
    """The density of logit-normal t: with uniform t, the same expected loss as drawing t from it."""
    if not sigma > 0:
        raise ValueError(f"sigma of the logit-normal must be positive, got {sigma}")

    def density(path: Path, t: Tensor) -> Tensor:
        t = t.clamp(1e-6, 1 - 1e-6)
        n = (torch.logit(t) - mu) / sigma
        value: Tensor = (-n.square() / 2).exp() / (sigma * (2 * torch.pi) ** 0.5 * t * (1 - t))
        return value

    return density


def sigma_squared(path: Path, t: Tensor) -> Tensor:
    """sigma^2: with it score matching is the loss in eps-space (Song and Ermon 2019, eq. 6)."""
    return path.sigma(t).square()


WEIGHTS: dict[str, Weight] = {
    "snr": snr,
    "min_snr": min_snr(),
    "sigmoid": sigmoid(),
    "logit_normal": logit_normal(),
    "sigma_squared": sigma_squared,
}
"""Weights with their usual constants, by name."""
WEIGHT_SPACES = {"snr": "x", "min_snr": "x", "sigmoid": "eps", "sigma_squared": "score"}
"""The space in which each weight's source measures the error; the others may be used in any."""
