"""The lanes of the key-value cache, and the backbone call that feeds many lanes at once.

A lane is one sequence in the cache, with its own length.

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
"""Block number of an image that is being drawn; finished images have the numbers 0, 1, 2, ..."""


@dataclass(frozen=True)
class LaneShape:
    """The size of a cache."""

    requests: int
    guidance: int
    """Number of lanes of each request in addition to its own, for guidance."""
    capacity: int
    """Positions per lane."""


@dataclass
class _New:
    """New positions [L, W] for the cache; padding has document -1."""

    inputs_LWD: Tensor
    position: Tensor
    document: Tensor
    block: Tensor
    bidirectional: Tensor
    noised: Tensor


class Lanes:
    """One lane for each request and, with guidance, further ones for its prompt without some parts.

    Request r has lane r, and its g-th further lane is `g * requests + r`.
    """

    def __init__(self, setup: Setup, shape: LaneShape) -> None:
        self.setup, self.shape = setup, shape
        self.device, self.dtype = setup.device, setup.dtype
        lanes, layers = shape.requests * (1 + shape.guidance), setup.model.backbone.config.num_hidden_layers
        self.cache = setup.parts.cache(layers, lanes, shape.capacity, self.device)
        self.backbone = setup.parts.backbone(setup.model, self.cache)
        blank = torch.zeros(lanes, shape.capacity, dtype=torch.long, device=self.device)
        slot = torch.arange(shape.capacity, device=self.device).expand(lanes, -1)
        self.sites = Sites(slot, blank - 1, blank - 1, blank > 0, blank > 0)
        """Sites [lanes, capacity] of every slot."""

    def of(self, requests: Sequence[int]) -> list[list[int]]:
        """Return the lanes [G][R] of these requests: those of the whole prompts first, then those of guidance."""
        return [[g * self.shape.requests + r for r in requests] for g in range(1 + self.shape.guidance)]

    def clear(self, lanes: list[int]) -> None:
        """Remove all positions from these lanes."""
        self.cache.length[lanes] = 0

    def lengths(self, lanes: list[list[int]]) -> Tensor:
        """Return the committed length of each of these lanes, [G * R]."""
        return self.cache.length[[*chain(*lanes)]].clone()

    def rewind(self, lanes: list[list[int]], lengths: Tensor) -> None:
        """Set these lanes back to earlier lengths; the positions behind are removed."""
        self.cache.length[[*chain(*lanes)]] = lengths

    def forward(self, strips: dict[int, Strip], canvases: Sequence[CanvasCall] = ()) -> dict[int, Tensor]:
        """Call the backbone once on strips (by lane) and images being drawn.

        Returns the hidden states [W, D] of each lane; states of padding are meaningless.
        """
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
        dropped = torch.arange(width, device=self.device) >= counts.unsqueeze(1)
        self.sites.document[here] = torch.where(dropped, -1, new.document)
        return dict(zip(order, hidden_LWD, strict=True))

    def _written(self, strips: dict[int, Strip], order: list[int], width: int) -> _New:
        """Embed strips; lanes without a strip are padding."""
        model, patcher = self.setup.model, self.setup.patcher
        by_lane = [[strips[lane]] if lane in strips else [] for lane in order]
        nothing = model.objective.layout.context((0, 0))
        raw = collate(by_lane, RowFormat(width, self.setup.tokenizer, nothing, patcher.ready))
        batch = prepare(raw, patcher, self.device, self.dtype)
        inputs_LWD, _ = model.embed(batch)
        return _New(inputs_LWD, batch.position_BS, *batch.sites[1:])

    def _blank(self, canvas: CanvasCall, order: list[int], width: int) -> _New:
        """Return padding only; it saves the embedding in the many calls in which no lane has a strip."""
        position = torch.zeros((len(order), width), dtype=torch.long, device=self.device)
        inputs_RND = canvas.call.inputs_RND
        inputs_LWD = inputs_RND.new_zeros(len(order), width, inputs_RND.shape[-1])
        return _New(inputs_LWD, position, position - 1, position - 1, position > 0, position > 0)

    def _put(self, canvas: CanvasCall, order: list[int], new: _New, counts: Tensor) -> None:
        """Write the patches of images being drawn over the padding of their lanes."""
        n = canvas.call.inputs_RND.shape[1]
        index = {lane: i for i, lane in enumerate(order)}
        order_Rn = canvas.call.order_Rn
        if order_Rn is None and n != len(canvas.offset_N):
            raise ValueError(f"a call with {n} of {len(canvas.offset_N)} patches must name them: set order_Rn")
        offset = canvas.offset_N if order_Rn is None else canvas.offset_N[order_Rn]
        for lanes, positions in zip(canvas.lanes, canvas.positions, strict=True):
            at = torch.tensor([index[lane] for lane in lanes], device=self.device)
            new.inputs_LWD[at, :n] = canvas.call.inputs_RND
            start_R1 = torch.tensor(positions, device=self.device).unsqueeze(1)
            new.position[at, :n] = start_R1 + offset
            new.document[at, :n] = 0
            new.block[at, :n] = DRAWN
            new.bidirectional[at, :n] = canvas.call.bidirectional
            counts[at] = n if canvas.call.keep else 0
