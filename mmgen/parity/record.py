"""Records every backbone call of the decoder, one record per position."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmgen.generate.parts import CanvasCall, LaneCall, Observer
from mmgen.image.patch import Grid
from mmgen.objective import Drawing, ImageObjective, ImageSpec
from mmgen.sequence.document import Strip


class Identity(NamedTuple):
    """Identifies a position of a document."""

    kind: str
    """`token`, `patch`, `copy N` (a patch of another copy of an image), `lead of patch`, `lead of copy N` (a
    position in front of the patches), or `stale` (a slot that should be empty)."""
    number: int
    """Index of the token, image or slot, counted from the start of the document."""
    patch: int | None = None
    """Raster index of a patch in its image."""

    def __str__(self) -> str:
        return " ".join(str(part) for part in self if part is not None)


@dataclass(frozen=True)
class Fed:
    """One position of one lane in one backbone call."""

    identity: Identity
    position: int
    """Position that rotary embedding sees."""
    sees: frozenset[Identity]
    """The positions that it attends to."""
    inputs_D: Tensor
    hidden_D: Tensor


@dataclass
class DrawnImage:
    """One image of one request, with the backbone calls that drew it."""

    number: int
    """Index of the image in its document."""
    grid: Grid
    order_N: NDArray[np.int64]
    noise_NP: Tensor
    lanes: int
    """Number of guidance lanes."""
    draws: list[Tensor] = field(default_factory=list)
    """All further noise, in the order in which it was drawn."""
    calls: list[list[list[Fed]]] = field(default_factory=list)
    """[call][guidance lane][position] of the patches that were fed."""
    x_NP: Tensor = field(default_factory=lambda: torch.zeros(0))


@dataclass
class _Lane:
    """The positions that a lane has received since it was cleared."""

    slots: dict[int, Identity] = field(default_factory=dict)
    tokens: int = 0
    images: int = 0


class Recorder(Observer):
    """Records what every lane was fed and what it attended to, and the noise of stochastic solvers.

    The noise is recorded only if `generate` is a part of the decoder; it draws with `inner`.
    """

    def __init__(self, inner: Callable[[ImageObjective, ImageSpec], Drawing]) -> None:
        self._inner = inner
        self.fed: dict[int, list[Fed]] = {}
        """Positions of text and finished images, by lane."""
        self.drawn: dict[int, list[DrawnImage]] = {}
        """Images by request, whose index is also that of its conditional lane."""
        self._lanes: dict[int, _Lane] = {}
        self._opened: list[DrawnImage] = []

    def opened(self, requests: Sequence[int], spec: ImageSpec) -> None:
        for i, request in enumerate(requests):
            order_N = spec.order_RN[i].cpu().numpy()
            lanes = len(spec.opening_GRD)
            image = DrawnImage(self._lanes[request].images, spec.grid, order_N, spec.noise_RNP[i].clone(), lanes)
            self.drawn.setdefault(request, []).append(image)
        self._opened = [self.drawn[request][-1] for request in requests]

    def generate(self, objective: ImageObjective, spec: ImageSpec) -> Drawing:
        """Draw the images that were opened last, and record the noise that this takes."""
        images = self._opened

        def noise(like: Tensor) -> Tensor:
            drawn = spec.noise(like)
            for image, one in zip(images, drawn, strict=True):
                image.draws.append(one.clone())
            return drawn

        return self._inner(objective, replace(spec, noise=noise))

    def drew(self, requests: Sequence[int], x_RNP: Tensor) -> None:
        for request, x_NP in zip(requests, x_RNP, strict=True):
            self.drawn[request][-1].x_NP = x_NP.clone()

    def called(self, call: LaneCall, hidden_LWD: Tensor) -> None:
        for lane, slots in zip(call.lanes, call.slots_LW.tolist(), strict=True):
            if slots[0] == 0:  # a new lane, or one that was cleared for another image
                self._lanes[lane] = _Lane()
        names = {lane: self._written(lane, strip) for lane, strip in call.strips.items()}
        names |= {lane: name for canvas in call.canvases for lane, name in self._drawing(canvas).items()}
        fed = {lane: self._fed(call, i, names[lane], hidden_LWD[i]) for i, lane in enumerate(call.lanes)}
        for lane in call.strips:
            self.fed.setdefault(lane, []).extend(fed[lane])
        for canvas in call.canvases:
            for i, request in enumerate(canvas.lanes[0]):
                self.drawn[request][-1].calls.append([fed[lanes[i]] for lanes in canvas.lanes])

    def _fed(self, call: LaneCall, i: int, names: list[Identity], hidden_WD: Tensor) -> list[Fed]:
        """Record the new positions of the i-th lane of a call."""
        slots = self._lanes[call.lanes[i]].slots
        slots.update(zip(call.slots_LW[i].tolist(), names, strict=False))  # positions without a name are padding
        fed = []
        for w, name in enumerate(names):
            seen = torch.nonzero(call.mask[i, 0, w] == 0).flatten().tolist()
            sees = frozenset(slots.get(slot, Identity("stale", slot)) for slot in seen)
            position = int(call.position_LW[i, w])
            fed.append(Fed(name, position, sees, call.inputs_LWD[i, w].clone(), hidden_WD[w].clone()))
        return fed

    def _drawing(self, canvas: CanvasCall) -> dict[int, list[Identity]]:
        """Return the identities of the patches in a canvas call, by lane."""
        names: dict[int, list[Identity]] = {}
        for lanes in canvas.lanes:
            for request, lane in zip(canvas.lanes[0], lanes, strict=True):
                image = self.drawn[request][-1]
                kept = len(image.calls) if canvas.call.keep else 0
                lead = max(0, canvas.call.inputs_RND.shape[1] - len(image.order_N))
                now = image.order_N[kept : kept + canvas.call.inputs_RND.shape[1]]
                number = self._lanes[lane].images
                names[lane] = [Identity("lead of patch", number, n) for n in range(lead)]
                names[lane] += [Identity("patch", number, int(n)) for n in now]
        return names

    def _written(self, lane: int, strip: Strip) -> list[Identity]:
        """Return the identities of the positions of a strip, numbered after those that the lane already holds."""
        state = self._lanes[lane]
        names = names_of(strip, lambda block: "patch", state.tokens, state.images)
        state.tokens += sum(name.kind == "token" for name in names)
        state.images += len(strip.images)
        return names


def names_of(strip: Strip, role: Callable[[int], str], tokens: int = 0, images: int = 0) -> list[Identity]:
    """Return the identity of each position of a strip that follows `tokens` tokens and `images` images.

    `role` returns the kind of the patches of the b-th block.
    """
    patches = {}
    for b, placed in enumerate(strip.blocks):
        start, number = placed.offset - placed.block.lead, images + placed.image
        for k in range(placed.block.lead):
            patches[start + k] = Identity(f"lead of {role(b)}", number, k)
        for k, patch in enumerate(placed.block.order_N.tolist()):
            patches[placed.offset + k] = Identity(role(b), number, patch)
    names = []
    for i in range(len(strip)):
        names.append(patches[i] if i in patches else Identity("token", tokens))
        tokens += i not in patches
    return names
