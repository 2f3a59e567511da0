"""Lanes of the key-value cache: what each one holds, and the backbone call that feeds many of them at once.

Suffixes: R requests, L lanes, W positions fed to a lane in one call, G guidance lanes, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from mmgen.generate.parts import CanvasCall, LaneCall, Setup
from mmgen.sequence.attention import Sites
from mmgen.sequence.batch import RowFormat, collate, prepare
from mmgen.sequence.document import Strip

DRAWN = 1 << 30
"""Block number of an image that is being drawn; the writer numbers finished images from 0."""


@dataclass(frozen=True)
class LaneShape:
    """How many requests share a cache, whether each has a second lane for guidance, and the positions of a lane."""

    requests: int
    guided: bool
    capacity: int


@dataclass
class _New:
    """Positions on their way into the cache, [L, W]; padding belongs to no document."""

    inputs_LWD: Tensor
    position: Tensor
    document: Tensor
    block: Tensor
    bidirectional: Tensor
    noised: Tensor


class Lanes:
    """One lane for each request and, where guidance is on, one more for its unconditional branch.

    Request r has lane r; its unconditional lane is `requests + r`.
    """

    def __init__(self, setup: Setup, shape: LaneShape) -> None:
        self.setup, self.shape = setup, shape
        self.device, self.dtype = setup.device, setup.dtype
        lanes, layers = shape.requests * (2 if shape.guided else 1), setup.model.backbone.config.num_hidden_layers
        self.cache = setup.parts.cache(layers, lanes, shape.capacity, self.device)
        self.backbone = setup.parts.backbone(setup.model, self.cache)
        blank = torch.zeros(lanes, shape.capacity, dtype=torch.long, device=self.device)
        slot = torch.arange(shape.capacity, device=self.device).expand(lanes, -1)
        self.sites = Sites(slot, blank - 1, blank - 1, blank > 0, blank > 0)
        """Of every slot of every lane."""

    def of(self, requests: Sequence[int]) -> list[list[int]]:
        """[G][R] lanes of these requests: conditional ones, then unconditional ones where guidance is on."""
        unconditional = [[self.shape.requests + r for r in requests]] if self.shape.guided else []
        return [list(requests), *unconditional]

    def clear(self, lanes: list[int]) -> None:
        """Forget everything that these lanes hold."""
        self.cache.length[lanes] = 0

    def lengths(self, lanes: list[list[int]]) -> Tensor:
        """Committed length of each of these lanes, [G * R]."""
        return self.cache.length[[*chain(*lanes)]].clone()

    def rewind(self, lanes: list[list[int]], lengths: Tensor) -> None:
        """Forget what these lanes took in since they had these lengths."""
        self.cache.length[[*chain(*lanes)]] = lengths

    def forward(self, strips: dict[int, Strip], canvases: Sequence[CanvasCall] = ()) -> dict[int, Tensor]:
        """Run the backbone on strips (by lane) and on the calls of canvases; returns hidden states [W, D] by lane."""
        order = sorted([*strips, *(lane for canvas in canvases for lanes in canvas.lanes for lane in lanes)])
        widths = [len(strip) for strip in strips.values()] + [c.call.inputs_RND.shape[1] for c in canvases]
        width = max(widths)
        new = self._written(strips, order, width) if strips else self._blank(canvases[0], order, width)
        counts = torch.tensor([len(strips[lane]) if lane in strips else 0 for lane in order], device=self.device)
        for canvas in canvases:
            self._put(canvas, order, new, counts)

        lanes_L = torch.tensor(order, device=self.device)
        slots_LW = self.cache.begin(lanes_L, width)
        here = (lanes_L.unsqueeze(1), slots_LW)
        query = Sites(slots_LW, new.document, new.block, new.bidirectional, new.noised)
        for stored, values in zip(self.sites[1:], query[1:], strict=True):
            stored[here] = values
        keys = Sites(*(stored[lanes_L, : self.cache.reach] for stored in self.sites))
        visible = self.setup.parts.visible
        call = LaneCall(order, strips, canvases, slots_LW, new.inputs_LWD, new.position, query, keys, visible)
        hidden_LWD = self.backbone(call)
        if self.setup.parts.observer is not None:
            self.setup.parts.observer.called(call, hidden_LWD)
        self.cache.commit(counts)
        forgotten = torch.arange(width, device=self.device) >= counts.unsqueeze(1)
        self.sites.document[here] = torch.where(forgotten, -1, new.document)
        return dict(zip(order, hidden_LWD, strict=True))

    def _written(self, strips: dict[int, Strip], order: list[int], width: int) -> _New:
        """The positions of strips; other lanes are padding."""
        model, patcher = self.setup.model, self.setup.patcher
        rows = [[strips[lane]] if lane in strips else [] for lane in order]
        nothing = model.objective.layout.context((0, 0))
        raw = collate(rows, RowFormat(width, self.setup.tokenizer, nothing, patcher.ready))
        batch = prepare(raw, patcher, self.device, self.dtype)
        inputs_LWD, _ = model.embed(batch)
        return _New(inputs_LWD, batch.position_BS, *batch.sites[1:])

    def _blank(self, canvas: CanvasCall, order: list[int], width: int) -> _New:
        """Padding alone, where no lane has a strip: most calls of a long drawing."""
        position = torch.zeros((len(order), width), dtype=torch.long, device=self.device)
        inputs_RND = canvas.call.inputs_RND
        inputs_LWD = inputs_RND.new_zeros(len(order), width, inputs_RND.shape[-1])
        return _New(inputs_LWD, position, position - 1, position - 1, position > 0, position > 0)

    def _put(self, canvas: CanvasCall, order: list[int], new: _New, counts: Tensor) -> None:
        """Write the patches of a canvas over the padding of its lanes."""
        n = canvas.call.inputs_RND.shape[1]
        index = {lane: i for i, lane in enumerate(order)}
        for lanes, positions in zip(canvas.lanes, canvas.positions, strict=True):
            at = torch.tensor([index[lane] for lane in lanes], device=self.device)
            new.inputs_LWD[at, :n] = canvas.call.inputs_RND
            new.position[at, :n] = torch.tensor(positions, device=self.device).unsqueeze(1)
            new.document[at, :n] = 0
            new.block[at, :n] = DRAWN
            new.bidirectional[at, :n] = canvas.call.bidirectional
            counts[at] = n if canvas.call.keep else 0
