"""The interface of an objective: how images are laid out in a row, learned and generated.

An objective has two parts. The layout defines how an image is written into a row. It holds no network, so loader
workers and the decoder can use it alone. The networks define what enters the backbone at image positions, the loss of
the hidden states there, and how an image is generated. All other code is shared by all objectives.

Suffixes: I patches of a batch, J learned patches, R images that are generated together, N patches of one image,
n positions of one call, G guidance lanes (the whole prompt, then `SampleConfig.guidance_lanes`), P patch length,
D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from mmgen.config import ObjectiveConfig, PatcherConfig, SampleConfig, at_size, choose
from mmgen.flow.guide import Guide
from mmgen.flow.steps import Noise, normal
from mmgen.flow.time import TIMES, shifted
from mmgen.image.patch import Grid
from mmgen.objective.image_flow import Given, Start
from mmgen.sequence.batch import Batch
from mmgen.sequence.document import Block

if TYPE_CHECKING:
    from mmgen.objective.replay import Replay


@dataclass(frozen=True)
class ImageSite:
    """The facts about a training image on which its blocks may depend."""

    grid: Grid
    text_before: bool
    """Whether the document has text before the image."""
    text_after: bool
    """Whether the document has text after the image."""
    quantile: float
    """Uniform number in [0, 1) that determines t; with `objective.time.stratified`, stratified over the step."""
    key: int
    """Key of the image's noise, 64 bits as a signed integer; the blocks that are learned carry it."""


@dataclass
class Embedded:
    """The inputs of the backbone at image positions, and what the loss needs later."""

    at: Tensor
    """Flat positions (row * S + position) to which `values` are added: patches, and perhaps size tokens."""
    values: Tensor
    """[len(at), D]; added to the token embeddings, which are zero at patches."""
    read_at_J: Tensor
    """For each learned patch, the flat position whose hidden state predicts it."""
    state: Any
    """Any data that `ImageObjective.loss` needs."""


@dataclass(frozen=True)
class ImageSpec:
    """A request to generate R images of one grid."""

    grid: Grid
    noise_RNP: Tensor
    """Standard normal noise, the only randomness of a deterministic solver."""
    sample: SampleConfig
    opening_GRD: Tensor
    """Hidden states at the size tokens."""
    order_RN: Tensor
    """Raster indices of the patches in the order of generation, as `ImageLayout.order` returned them."""
    noise: Noise = field(default_factory=normal)
    """Source of further standard normal noise, in the shape of its argument [R, ...], for stochastic solvers."""
    given: Given | None = None
    """Known patches, for in-painting."""
    previews: bool = False
    """Whether backbone calls carry the current clean estimate of the image."""
    start: Start | None = None
    """Pictures to start from, instead of noise. Only for an objective with `whole_images`."""
    guide: Guide | None = None
    """Moves the clean estimate [R, N, P]. Only for an objective with `whole_images`."""


@dataclass(frozen=True)
class BackboneCall:
    """A request of `ImageObjective.generate`: run the backbone on these inputs and send hidden states [G, R, n, D]."""

    inputs_RND: Tensor
    """Inputs of the positions in front of the patches (`ImageLayout.lead`), if any, and of n patches."""
    bidirectional: bool
    keep: bool
    """Whether the positions stay in the cache after the call."""
    preview_RNP: Tensor | None = None
    """The current clean estimate, if `ImageSpec.previews` is set."""
    order_Rn: Tensor | None = None
    """Raster index of the patch at each position; None if the call has all patches in raster order."""


Drawing = Generator[BackboneCall, Tensor, Tensor]
"""A generator that yields backbone calls, receives hidden states [G, R, n, D], and returns patches [R, N, P]."""


class ImageLayout(ABC):
    """How an image is written into a row. A layout holds no network and can be pickled."""

    copies: int = 1
    """Number of blocks that `blocks` returns."""
    lead: int = 0
    """Number of positions in front of the patches of each block; the objective gives their inputs."""
    bidirectional: bool = True
    """Whether patches of an image attend to each other in both directions."""
    noise_draws: int = 1
    """Number of draws of noise for each learned patch; 0 for an objective without noise."""

    def __init__(self, settings: ObjectiveConfig) -> None:
        self.settings = settings
        if settings.bidirectional is not None:
            self.bidirectional = settings.bidirectional

    @abstractmethod
    def blocks(self, site: ImageSite, rng: np.random.Generator) -> list[Block]:
        """The blocks of a training image, drawn with `rng`. The last one is the clean copy, or the only copy."""

    @abstractmethod
    def context(self, grid: Grid) -> Block:
        """The block of a finished image, to which later positions attend."""

    def times(self, quantiles: Tensor, grid: Grid) -> Tensor:
        """The times t of an image in training, of the shape of `quantiles` in [0, 1), shifted for its size."""
        time = self.settings.time
        t: Tensor = choose(TIMES, time.distribution, "objective.time.distribution")(quantiles, time.mu, time.sigma)
        shift = at_size(time.shift, grid[0] * grid[1])
        return t if shift == 1 else shifted(t, shift)

    def order(self, grid: Grid, rng: np.random.Generator) -> NDArray[np.int64]:
        """Raster indices [N] of the patches of an image in the order of generation."""
        return np.arange(grid[0] * grid[1])


class ImageObjective(nn.Module, ABC):
    """The networks of an objective, and its layout."""

    Layout: ClassVar[type[ImageLayout]]
    whole_images: ClassVar[bool] = False
    """Whether the solver's state is a whole noisy image, so that it can start from a picture and follow a guide."""

    def __init__(self, settings: ObjectiveConfig, patcher: PatcherConfig, width: int) -> None:
        super().__init__()
        self.settings = settings
        self.layout = self.Layout(settings)

    @abstractmethod
    def embed(self, batch: Batch) -> Embedded:
        """The inputs of the backbone at image positions, and where the hidden states of learned patches are read."""

    @abstractmethod
    def loss(self, hidden_JD: Tensor, state: Any) -> Tensor:
        """Loss [J] of the learned patches, averaged over the P values of a patch and measured in the loss space.

        `state` is `Embedded.state`, as `embed` returned it.
        """

    @abstractmethod
    def generate(self, spec: ImageSpec) -> Drawing:
        """Generate images: yield backbone calls, receive hidden states, return patches [R, N, P] in raster order."""

    def replay(self, replay: Replay) -> None:
        """Draw an image of the decoder again from the hidden states of a training step, for `mmgen check parity`.

        Raises:
            NotImplementedError: the objective does not implement the check.
        """
        raise NotImplementedError(f"{type(self).__name__} has no `replay`, so its sampling cannot be checked")
