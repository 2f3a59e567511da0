"""How images are learned and generated: the interface between a language model and diffusion.

An objective has two parts. Its layout, which holds no network, defines how an image is laid out in a row; loader
workers and the decoder need no more. Its networks define what enters the backbone there, what is learned from the
hidden states, and how an image is generated from them. Everything else is shared by all objectives.

Suffixes: I patches of a batch, J patches that are learned, R rows being generated, N patches of one image,
G guidance lanes (conditional, then unconditional), P patch length, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from mmgen.config import ObjectiveConfig, PatcherConfig, SampleConfig
from mmgen.flow.steps import Noise, normal
from mmgen.image.patch import Grid
from mmgen.objective.image_flow import Given
from mmgen.sequence.batch import Batch
from mmgen.sequence.document import Block

if TYPE_CHECKING:
    from mmgen.objective.replay import Replay


@dataclass(frozen=True)
class ImageSite:
    """What the blocks of a training image may depend on."""

    grid: Grid
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
class ImageSpec:
    """A request to generate one image in each of R rows."""

    grid: Grid
    noise_RNP: Tensor
    """Standard normal; the only randomness of a deterministic solver."""
    sample: SampleConfig
    opening_GRD: Tensor
    """Hidden states at the size token."""
    order_RN: Tensor
    """Raster index of each patch in the order of its row, as `ImageLayout.order` gave it."""
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


class ImageLayout(ABC):
    """How an image is laid out in a row. It holds no network and may be pickled."""

    copies: int = 1
    """How many blocks `blocks` returns."""
    bidirectional: bool = True
    """Patches of an image see each other both ways."""

    def __init__(self, settings: ObjectiveConfig, patch_length: int) -> None:
        self.settings, self.patch_length = settings, patch_length
        if settings.bidirectional is not None:
            self.bidirectional = settings.bidirectional

    @abstractmethod
    def blocks(self, site: ImageSite, rng: np.random.Generator) -> list[Block]:
        """The blocks of a training image, drawn from `rng` alone; the last one is the clean or only copy."""

    @abstractmethod
    def context(self, grid: Grid) -> Block:
        """The block of a finished image, as later positions see it."""

    def order(self, grid: Grid, rng: np.random.Generator) -> NDArray[np.int64]:
        """Raster index of each patch in the order in which an image is generated."""
        return np.arange(grid[0] * grid[1])


class ImageObjective(nn.Module, ABC):
    """The networks of an objective, and its layout."""

    Layout: ClassVar[type[ImageLayout]]

    def __init__(self, settings: ObjectiveConfig, patcher: PatcherConfig, width: int) -> None:
        super().__init__()
        self.settings = settings
        self.layout = self.Layout(settings, patcher.patch_length)

    @abstractmethod
    def embed(self, batch: Batch) -> Embedded:
        """What enters the backbone at image positions."""

    @abstractmethod
    def loss(self, hidden_JD: Tensor, state: Any) -> Tensor:
        """Loss of each learned patch [J], averaged over its entries, already in the chosen loss space."""

    @abstractmethod
    def generate(self, spec: ImageSpec) -> Drawing:
        """Yield requests to the backbone, be sent hidden states, return clean patches [R, N, P] in raster order."""

    def replay(self, replay: Replay) -> None:
        """Draw an image of the decoder again from training's hidden states, for `mmgen check parity`.

        Raises:
            NotImplementedError: the objective does not say how; its sampling cannot be checked this way.
        """
        raise NotImplementedError(f"{type(self).__name__} has no `replay`, so its sampling cannot be checked")
