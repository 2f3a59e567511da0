"""The flow-matching loss in any prediction and loss space."""

from __future__ import annotations

from torch import Tensor

from mmgen.flow.path import Path


def flow_loss(
    path: Path, output: Tensor, x: Tensor, eps: Tensor, t: Tensor, prediction: str, loss_space: str, clip: float
) -> Tensor:
    """Squared error of a network's output, measured in `loss_space`, averaged over the last axis.

    `output`, `x` and `eps` are [..., P]; `t` is [...]; the result is [...]. Prediction and target pass
    through the same conversion with the same clipped denominator (Li and He 2025, JiT, eq. 6), so clipping
    changes the weight of an entry and never its minimiser.
    """
    t = t.unsqueeze(-1)
    target = {"x": x, "eps": eps}.get(prediction)
    if target is None:
        target = path.velocity(x, eps, t)
    gain = path.gain(prediction, loss_space, t, clip)
    return (gain * (output - target)).square().mean(-1)
