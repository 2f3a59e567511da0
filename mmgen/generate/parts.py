"""The exchangeable parts of the decoder: a check or a benchmark replaces one part or observes every backbone call.

Suffixes: R requests, L lanes, W positions fed to a lane in one call, K slots of the cache, G guidance lanes,
N patches of one image, P patch length, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mmgen.backbone import RowCache, additive
from mmgen.config import Positions, SampleConfig
from mmgen.generate.grammar import Grammar
from mmgen.image.patch import Patcher
from mmgen.model import MMGenModel
from mmgen.objective import BackboneCall, Drawing, ImageObjective, ImageSpec
from mmgen.sequence.attention import Sites, dense_visible
from mmgen.sequence.document import Strip, Writer
from mmgen.sequence.tokenizer import Tokenizer


@dataclass(frozen=True)
class CanvasCall:
    """A backbone call for images that are drawn together, with their lanes and positions."""

    lanes: list[list[int]]
    """[G][R] lane of each guidance lane and request."""
    positions: list[list[int]]
    """[G][R] position of the image in its lane."""
    offset_N: Tensor
    """What each patch adds to the position of the image, in raster order, after positions in front of the patches."""
    call: BackboneCall


@dataclass(frozen=True)
class LaneCall:
    """One call of the backbone: the new positions of some lanes, which attend to the cache of these lanes."""

    lanes: list[int]
    strips: dict[int, Strip]
    """Text and finished images to feed, by lane."""
    canvases: Sequence[CanvasCall]
    """Images being drawn, on other lanes than the strips."""
    slots_LW: Tensor
    """Cache slot of each new position in its lane."""
    inputs_LWD: Tensor
    position_LW: Tensor
    query: Sites
    """Sites [L, W] of the new positions."""
    keys: Sites
    """Sites [L, K] of all slots of these lanes, including the new positions."""
    visible: Callable[[Sites, Sites], Tensor]
    """The attention rule: [L, W, K], true where a query sees a key."""

    @cached_property
    def mask(self) -> Tensor:
        """The additive attention mask [L, 1, W, K]."""
        return additive(self.visible(self.query, self.keys))

    @property
    def modality(self) -> Tensor:
        """[L, W], 1 at patches and 0 elsewhere."""
        return (self.query.block >= 0).long()


class Cached:
    """Runs the backbone on the new positions, with a key-value cache."""

    def __init__(self, model: MMGenModel, cache: RowCache) -> None:
        self.model, self.cache = model, cache

    def __call__(self, call: LaneCall) -> Tensor:
        """Return the hidden states [L, W, D] of the new positions."""
        return self.model.hidden(call.inputs_LWD, call.position_LW, call.mask, call.modality, self.cache)


class Observer:
    """Callbacks of the decoder, which do nothing here. An observer that keeps a tensor must copy it."""

    def called(self, call: LaneCall, hidden_LWD: Tensor) -> None:
        """Run after each call of the backbone, with its hidden states [L, W, D]."""

    def opened(self, requests: Sequence[int], spec: ImageSpec) -> None:
        """Run before the drawing of one image for each of these requests."""

    def drew(self, requests: Sequence[int], x_RNP: Tensor) -> None:
        """Run when the images of these requests are finished, with their clean patches [R, N, P]."""


def generate(objective: ImageObjective, spec: ImageSpec) -> Drawing:
    """Draw images with the objective's own method."""
    return objective.generate(spec)


@dataclass(frozen=True)
class Parts:
    """The parts of a decoder that can be replaced; the defaults are those of normal generation."""

    writer: Callable[[Tokenizer, Positions], Writer] = Writer
    grammar: Callable[[Tokenizer, int], Grammar] = Grammar
    cache: Callable[[int, int, int, torch.device], RowCache] = RowCache
    """Builds the cache from the number of layers, the number of lanes, the capacity of a lane and the device."""
    backbone: Callable[[MMGenModel, RowCache], Callable[[LaneCall], Tensor]] = Cached
    visible: Callable[[Sites, Sites], Tensor] = dense_visible
    generate: Callable[[ImageObjective, ImageSpec], Drawing] = generate
    observer: Observer | None = None


REAL = Parts()


@dataclass(frozen=True)
class Setup:
    """The objects that all requests of a decoder share."""

    model: MMGenModel
    tokenizer: Tokenizer
    patcher: Patcher
    sample: SampleConfig
    parts: Parts = REAL

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.model.get_input_embeddings().weight.dtype
