"""What the decoder is built from, so that a check or a benchmark can exchange one part or watch the whole.

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
from mmgen.config import SampleConfig
from mmgen.generate.grammar import Grammar
from mmgen.image.patch import Patcher
from mmgen.model import MMGenModel
from mmgen.objective import BackboneCall, Drawing, ImageObjective, ImageSpec
from mmgen.sequence.attention import Sites, dense_visible
from mmgen.sequence.document import Strip, Writer
from mmgen.sequence.tokenizer import Tokenizer


@dataclass(frozen=True)
class CanvasCall:
    """What a canvas asks of the backbone, and where its images are."""

    lanes: list[list[int]]
    """[G][R] lanes."""
    positions: list[list[int]]
    """[G][R] position of the image in each lane."""
    call: BackboneCall


@dataclass(frozen=True)
class LaneCall:
    """One call of the backbone: new positions of some lanes, beside what the cache holds of these lanes."""

    lanes: list[int]
    strips: dict[int, Strip]
    """By lane."""
    canvases: Sequence[CanvasCall]
    slots_LW: Tensor
    """Where the new positions go in their lanes."""
    inputs_LWD: Tensor
    position_LW: Tensor
    query: Sites
    """[L, W] of the new positions."""
    keys: Sites
    """[L, K] of all that these lanes hold, the new positions included."""
    visible: Callable[[Sites, Sites], Tensor]

    @cached_property
    def mask(self) -> Tensor:
        """The additive attention mask [L, 1, W, K]."""
        return additive(self.visible(self.query, self.keys))

    @property
    def modality(self) -> Tensor:
        """1 at patches, 0 elsewhere."""
        return (self.query.block >= 0).long()


class Cached:
    """Runs the backbone on the new positions over the cache."""

    def __init__(self, model: MMGenModel, cache: RowCache) -> None:
        self.model, self.cache = model, cache

    def __call__(self, call: LaneCall) -> Tensor:
        """Hidden states [L, W, D] of the new positions."""
        return self.model.hidden(call.inputs_LWD, call.position_LW, call.mask, call.modality, self.cache)


class Observer:
    """Is shown what the decoder does; the methods here do nothing. Tensors must be copied to be kept."""

    def called(self, call: LaneCall, hidden_LWD: Tensor) -> None:
        """The backbone was called."""

    def opened(self, requests: Sequence[int], spec: ImageSpec) -> None:
        """These requests are about to have an image drawn each."""

    def drew(self, requests: Sequence[int], x_RNP: Tensor) -> None:
        """The images of these requests are finished."""


def generate(objective: ImageObjective, spec: ImageSpec) -> Drawing:
    """Draw images as the objective does."""
    return objective.generate(spec)


@dataclass(frozen=True)
class Parts:
    """The parts of a decoder that can be exchanged; by default the real ones."""

    writer: Callable[[Tokenizer], Writer] = Writer
    grammar: Callable[[Tokenizer, int], Grammar] = Grammar
    cache: Callable[[int, int, int, torch.device], RowCache] = RowCache
    """From layers, lanes, capacity and device."""
    backbone: Callable[[MMGenModel, RowCache], Callable[[LaneCall], Tensor]] = Cached
    visible: Callable[[Sites, Sites], Tensor] = dense_visible
    generate: Callable[[ImageObjective, ImageSpec], Drawing] = generate
    observer: Observer | None = None


REAL = Parts()


@dataclass(frozen=True)
class Setup:
    """What all requests of a decoder share."""

    model: MMGenModel
    tokenizer: Tokenizer
    patcher: Patcher
    sample: SampleConfig
    parts: Parts = REAL

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.model.get_input_embeddings().weight.dtype
