"""What the parity check needs of an objective: to draw an image again from what training's forward pass gives.

Suffixes: I patches of a batch, J patches that are learned, N patches of one image, n patches of one call, P patch
length, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mmgen.config import SampleConfig
from mmgen.image.patch import Grid
from mmgen.objective.image_flow import ImageFlow
from mmgen.sequence.batch import Batch

TOLERANCE = 1e-9
"""Of inputs, hidden states and patches in float64, relative to their largest magnitude."""
Put = Callable[[Batch, Tensor], None]
"""Puts a sampler's state in place of what training drew: (batch, indices into I of the image's patches)."""


@dataclass(frozen=True)
class SampledImage:
    """An image that the decoder drew, in raster order."""

    grid: Grid
    order_N: Tensor
    noise_NP: Tensor
    x_NP: Tensor
    inputs: list[Tensor]
    """[n, D] of the conditional lane in each backbone call."""
    sample: SampleConfig


@dataclass(frozen=True)
class Trained:
    """What training's forward pass gave for the image, in the order of its row."""

    batch: Batch
    state: Any
    """`Embedded.state`."""
    hidden_JD: Tensor
    at_J: Tensor
    """Index into I of each learned patch."""


class Replay(ABC):
    """One drawn image, training's forward pass of the documents that hold it, and where differences are reported."""

    image: SampledImage

    @abstractmethod
    def train(self, step: str, calls: slice, put: Put) -> list[Trained]:
        """Run the documents of all guidance lanes with a sampler's state, and compare these backbone calls with them.

        `step` names the calls in a report.
        """

    @abstractmethod
    def compare(self, step: str, sampled: Tensor, drawn: Tensor) -> None:
        """Report how far patches that the decoder drew are from those drawn again."""


def redraw(
    flow: ImageFlow, outputs: Callable[[Tensor, Tensor], list[Tensor]], noise: Tensor, scale: Tensor, steps: int
) -> Tensor:
    """Clean patches from noise by Euler steps of the guided flow, without the solvers that sampling uses.

    `outputs` are the network's at (z, t), conditional first.
    """
    times = torch.arange(steps + 1, dtype=torch.float64) / steps
    z: Tensor = noise * flow.path.sigma(times[0])
    for t, following in pairwise(times):
        prediction = flow.settings.prediction
        v = [flow.path.convert(prediction, "v", output, z, t, 1e-6) for output in outputs(z, t)]
        conditional, unconditional = v
        z = z + (following - t) * (unconditional + scale * (conditional - unconditional))
    return z
