"""The part of the parity check that an objective implements: drawing an image again by training's forward pass.

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
"""Largest accepted difference in float64, relative to the largest magnitude of the compared values."""
Put = Callable[[Batch, Tensor], None]
"""Writes the state of a solver into a batch, over the draws of training: (batch, indices into I of the patches)."""


@dataclass(frozen=True)
class SampledImage:
    """An image that the decoder drew, with its patches in raster order."""

    grid: Grid
    order_N: Tensor
    noise_NP: Tensor
    x_NP: Tensor
    inputs: list[Tensor]
    """Inputs [n, D] of the conditional lane, one tensor for each backbone call."""
    sample: SampleConfig


@dataclass(frozen=True)
class Trained:
    """The result of training's forward pass for the image, with patches in the order of the row."""

    batch: Batch
    state: Any
    """`Embedded.state` of the batch."""
    hidden_JD: Tensor
    at_J: Tensor
    """Index into I of each learned patch."""


class Replay(ABC):
    """A drawn image, with the forward pass of training for its documents, and a report of differences."""

    image: SampledImage

    @abstractmethod
    def train(self, step: str, calls: slice, put: Put) -> list[Trained]:
        """Run the documents of all guidance lanes with the state of a solver, and compare them with backbone calls.

        `calls` selects the backbone calls of the decoder, and `step` names them in the report.
        """

    @abstractmethod
    def compare(self, step: str, sampled: Tensor, drawn: Tensor) -> None:
        """Report the difference between patches of the decoder (`sampled`) and patches that were drawn again."""


def redraw(
    flow: ImageFlow, outputs: Callable[[Tensor, Tensor], list[Tensor]], noise: Tensor, scale: Tensor, steps: int
) -> Tensor:
    """Clean patches from noise by Euler steps of the guided flow, independent of the solvers of `mmgen.flow`.

    `outputs(z, t)` returns the outputs of the network for each guidance lane, the conditional lane first.
    """
    times = torch.arange(steps + 1, dtype=torch.float64) / steps
    z: Tensor = noise * flow.path.sigma(times[0])
    for t, following in pairwise(times):
        prediction = flow.settings.prediction
        v = [flow.path.convert(prediction, "v", output, z, t, 1e-6) for output in outputs(z, t)]
        conditional, unconditional = v
        z = z + (following - t) * (unconditional + scale * (conditional - unconditional))
    return z
