"""How images are learned and generated: the seam between a language model and diffusion.

An objective says how an image stands in a row, what enters the backbone there, what is learned from the
hidden states, and how an image is generated from them. Everything else is shared by all objectives.

Suffixes: I patches of a batch, J patches that are learned, R rows being generated, N patches of one image,
G guidance lanes (conditional, then unconditional), P patch length, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from mmgen.config import ObjectiveConfig, PatcherConfig, SampleConfig
from mmgen.flow.steps import Noise, normal
from mmgen.image.patch import Grid
from mmgen.sequence.batch import Batch
from mmgen.sequence.document import Block


@dataclass(frozen=True)
class ImageSite:
    """What a layout may depend on."""

    grid: Grid
    patch_length: int
    text_before: bool
    text_after: bool
    quantile: float
    """Uniform number in [0, 1) from which t is made; stratified over the global step where asked."""


@dataclass
class Embedded:
    """What an objective puts into a batch."""

    at: Tensor
    """Flat positions to add to (patches; perhaps size tokens)."""
    values: Tensor
    """[len(at), D], added to the token embedding, which is zero at patches."""
    read_at_J: Tensor
    """For each learned patch, the flat position whose hidden state predicts it."""
    state: Any
    """What `loss` needs later."""


@dataclass(frozen=True)
class Given:
    """Patches that generation keeps, for in-painting; every row keeps equally many."""

    mask_RN: Tensor
    """True where the patch is known."""
    x_RNP: Tensor
    """Clean patch rows; anything where unknown."""


@dataclass(frozen=True)
class ImageSpec:
    """A request to generate one image in each of R rows."""

    grid: Grid
    noise_RNP: Tensor
    """Standard normal; the only randomness of a deterministic solver."""
    sample: SampleConfig
    opening_GRD: Tensor
    """Hidden states at the size token."""
    order_RN: Tensor
    """Raster index of the patch at each place of the row, as `ImageObjective.order` gave it."""
    noise: Noise = field(default_factory=normal)
    """More standard normal numbers, like its argument [R, ...], for samplers that need them."""
    given: Given | None = None
    """Patches that are known."""
    previews: bool = False
    """Whether calls carry the clean estimate of the image so far."""


@dataclass(frozen=True)
class BackboneCall:
    """A request of a generating objective: run the backbone on these inputs and send back [G, R, n, D]."""

    inputs_RND: Tensor
    bidirectional: bool
    keep: bool
    """Keep the positions in the cache; else they are forgotten after the call."""
    preview_RNP: Tensor | None = None
    """The clean estimate so far, where the spec asked for previews."""


Drawing = Generator[BackboneCall, Tensor, Tensor]


class ImageObjective(nn.Module, ABC):
    """The seam. `layout` and `context` are pure functions of settings, so that loader workers need no model."""

    def __init__(self, settings: ObjectiveConfig, patcher: PatcherConfig, width: int) -> None:
        super().__init__()
        self.settings = settings

    @classmethod
    @abstractmethod
    def layout(cls, settings: ObjectiveConfig, site: ImageSite, rng: np.random.Generator) -> list[Block]:
        """The blocks of a training image, drawn from `rng` alone; the last one is the clean or only copy."""

    @classmethod
    @abstractmethod
    def context(cls, settings: ObjectiveConfig, grid: Grid, patch_length: int) -> Block:
        """The block of a finished image, as later positions see it."""

    @classmethod
    def order(cls, settings: ObjectiveConfig, grid: Grid, rng: np.random.Generator) -> NDArray[np.int64]:
        """Raster index of the patch at each place of a row while an image is generated."""
        return np.arange(grid[0] * grid[1])

    @classmethod
    def copies(cls, settings: ObjectiveConfig) -> int:
        """How many blocks `layout` returns."""
        return 1

    @abstractmethod
    def embed(self, batch: Batch) -> Embedded:
        """What stands at image positions."""

    @abstractmethod
    def loss(self, hidden_JD: Tensor, state: Any) -> Tensor:
        """Loss of each learned patch [J], averaged over its entries, already in the chosen loss space."""

    @abstractmethod
    def generate(self, spec: ImageSpec) -> Drawing:
        """Yield requests to the backbone, be sent hidden states, return clean patch rows [R, N, P] in raster order."""
