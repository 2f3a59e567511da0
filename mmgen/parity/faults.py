"""Faults of the decoder that the parity check must detect; each one replaces a part of the decoder."""

from __future__ import annotations

import copy
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmgen.backbone import RowCache
from mmgen.generate.parts import Parts
from mmgen.image.patch import Grid
from mmgen.objective import Drawing, ImageObjective, ImageSpec
from mmgen.objective.image_flow import FlowSpec, ImageFlow, Question
from mmgen.sequence.attention import Sites, dense_visible
from mmgen.sequence.document import Block, Writer


class NoisyWriter(Writer):
    """Adds noise to finished images, so that later positions see a noisy context."""

    def patches(self, x_NP: NDArray[Any], grid: Grid, blocks: Sequence[Block]) -> None:
        noise = np.random.default_rng(0).standard_normal(x_NP.shape, dtype=np.float32)
        super().patches(x_NP + 0.1 * noise, grid, blocks)


class CountingWriter(Writer):
    """Adds 3 to the positions of everything after an image."""

    def close_image(self) -> None:
        self.position += 3
        super().close_image()


class LateFlow(ImageFlow):
    """Passes the network the t of the next solver step."""

    def __init__(self, flow: ImageFlow) -> None:
        vars(self).update(vars(flow))

    def draw(self, spec: FlowSpec) -> Generator[Question, Sequence[Tensor], Tensor]:
        flow = super().draw(spec)
        try:
            z, t, preview = next(flow)
            while True:
                z, t, preview = flow.send((yield z, t + 1 / spec.sample.steps, preview))
        except StopIteration as stop:
            clean: Tensor = stop.value
            return clean


def late(objective: ImageObjective, spec: ImageSpec) -> Drawing:
    """Draw with a `LateFlow` instead of the flow of the objective."""
    shifted: Any = copy.copy(objective)
    shifted.flow = LateFlow(shifted.flow)
    drawing: Drawing = shifted.generate(spec)
    return drawing


def another_step(objective: ImageObjective, spec: ImageSpec) -> Drawing:
    """Draw with one solver step more than the settings have."""
    sample = spec.sample.model_copy(update={"steps": spec.sample.steps + 1})
    return objective.generate(replace(spec, sample=sample))


def causal(q: Sites, k: Sites) -> Tensor:
    """The attention rule without bidirectional attention: patches do not see later patches of their image."""
    return dense_visible(q, k) & (k.slot.unsqueeze(1) <= q.slot.unsqueeze(2))


class FirstWins(RowCache):
    """Never overwrites a slot, so that the cache keeps the last solver step instead of the finished image."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        stored, new = self._store[layer_idx], (key_states, value_states)
        if stored is not None:
            at = (self._lanes.unsqueeze(1), slice(None), self._slots)
            old = [part[at].transpose(1, 2) for part in stored]
            key_states, value_states = (torch.where(o == 0, n, o) for o, n in zip(old, new, strict=True))
        return super().update(key_states, value_states, layer_idx)


FAULTS: dict[str, Parts] = {
    "noisy-context": Parts(writer=NoisyWriter),
    "shifted-t": Parts(generate=late),
    "causal-mask": Parts(visible=causal),
    "stale-cache": Parts(cache=FirstWins),
    "wrong-position": Parts(writer=CountingWriter),
    "wrong-settings": Parts(generate=another_step),
}
"""The faults of `mmgen check parity --inject`."""
