"""A schedule that writes down every backbone call of the decoder, position by position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmgen.generate.scheduler import Canvas, Draw, Schedule
from mmgen.image.patch import Grid
from mmgen.objective import ImageSpec
from mmgen.sequence.document import Strip

Identity = tuple[Any, ...]
"""What stands in a slot: ("token", how manieth) or ("patch", image, raster index)."""


@dataclass
class Fed:
    """One position of one lane in one backbone call."""

    identity: Identity
    position: int
    sees: frozenset[Identity]
    inputs_D: Tensor
    hidden_D: Tensor


@dataclass
class Drawn:
    """One image of one row, and the calls that it took."""

    number: int
    """Of the image in its document."""
    grid: Grid
    order_N: NDArray[np.int64]
    noise_NP: Tensor
    calls: list[list[list[Fed]]] = field(default_factory=list)
    """[call][guidance lane][position]."""
    x_NP: Tensor = field(default_factory=lambda: torch.zeros(0))


class Recorder(Schedule):
    """A schedule that writes down what every lane was fed and what it saw."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.ledger: dict[int, dict[int, Identity]] = {}
        self.written: dict[int, tuple[int, int]] = {}
        """(tokens, images) that each lane was fed."""
        self.fed: dict[int, list[Fed]] = {}
        self.drawn: dict[int, list[Drawn]] = {}
        super().__init__(*args, **kwargs)

    def _open(self, grid: Grid, draws: dict[int, Draw]) -> None:
        for lane in self._lanes(list(draws))[-1] if self.guided else []:
            self.ledger[lane], self.written[lane] = {}, (0, 0)
        original = self.model.objective.generate

        def spied(spec: ImageSpec) -> Any:
            images = []
            for i, row in enumerate(draws):
                order_N = spec.order_RN[i].cpu().numpy()
                images.append(Drawn(self.written[row][1], grid, order_N, spec.noise_RNP[i].clone()))
                self.drawn.setdefault(row, []).append(images[-1])
            x_RNP = yield from original(spec)
            for image, x_NP in zip(images, x_RNP, strict=True):
                image.x_NP = x_NP.clone()
            return x_RNP

        with mock.patch.object(self.model.objective, "generate", spied):
            super()._open(grid, draws)

    def _forward(self, strips: dict[int, Strip], canvases: list[Canvas]) -> dict[int, Tensor]:
        caught: list[Tensor] = []
        original = self.model.hidden

        def spied(inputs: Tensor, position: Tensor, mask: Tensor, modality: Tensor, cache: Any = None) -> Tensor:
            caught.extend((inputs, position, mask))
            return original(inputs, position, mask, modality, cache)

        with mock.patch.object(self.model, "hidden", spied):
            hidden = super()._forward(strips, canvases)
        names = {lane: self._name(lane, strip) for lane, strip in strips.items()}
        names |= {lane: name for canvas in canvases for lane, name in self._drawing(canvas).items()}
        inputs, position, mask = caught
        fed: dict[int, list[Fed]] = {}
        for i, lane in enumerate(hidden):
            ledger = self.ledger.setdefault(lane, {})
            ledger.update(zip(self.cache._slots[i].tolist(), names[lane], strict=False))
            fed[lane] = []
            for w, name in enumerate(names[lane]):
                seen = torch.nonzero(mask[i, 0, w] == 0).flatten().tolist()
                sees = frozenset(ledger.get(slot, ("stale", slot)) for slot in seen)
                fed[lane].append(Fed(name, int(position[i, w]), sees, inputs[i, w].clone(), hidden[lane][w].clone()))
        for lane in strips:
            self.fed.setdefault(lane, []).extend(fed[lane])
        for canvas in canvases:
            for i, row in enumerate(canvas.lanes[0]):
                self.drawn[row][-1].calls.append([fed[lanes[i]] for lanes in canvas.lanes])
        return hidden

    def _drawing(self, canvas: Canvas) -> dict[int, list[Identity]]:
        """Identities of the patches that each lane of a canvas is fed now."""
        names: dict[int, list[Identity]] = {}
        for lanes in canvas.lanes:
            for row, lane in zip(canvas.lanes[0], lanes, strict=True):
                image = self.drawn[row][-1]
                kept = len(image.calls) if canvas.call.keep else 0
                now = image.order_N[kept : kept + canvas.call.inputs_RND.shape[1]]
                names[lane] = [("patch", self.written[lane][1], int(n)) for n in now]
        return names

    def _name(self, lane: int, strip: Strip) -> list[Identity]:
        """Identities of a strip's positions, counting on from what the lane has been fed."""
        tokens, images = self.written.get(lane, (0, 0))
        names = names_of(strip, tokens, images, lambda block: "patch")
        self.written[lane] = (tokens + sum(name[0] == "token" for name in names), images + len(strip.images))
        return names


def names_of(strip: Strip, tokens: int, images: int, role: Callable[[int], str]) -> list[Identity]:
    """What stands at each position of a strip; `role` says what the patches of its b-th block are called."""
    names: list[Identity] = [()] * len(strip)
    for b, placed in enumerate(strip.blocks):
        for k, number in enumerate(placed.block.order_N.tolist()):
            names[placed.offset + k] = (role(b), images + placed.image, number)
    for i, name in enumerate(names):
        if not name:
            names[i] = ("token", tokens)
            tokens += 1
    return names
