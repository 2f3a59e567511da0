"""Ways to break the decoder that the parity check must see."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from mmgen.backbone import RowCache
from mmgen.config import SampleConfig
from mmgen.generate import decoder as generate
from mmgen.generate import scheduler
from mmgen.image.patch import Floats, Grid
from mmgen.objective.image_flow import ImageFlow
from mmgen.sequence.attention import Sites, dense_visible
from mmgen.sequence.document import Block, Writer


@contextmanager
def _noisy_context() -> Iterator[None]:
    """A finished image stands in the cache with noise on it."""

    class Noisy(Writer):
        def patches(self, x_NP: Floats, grid: Grid, blocks: Sequence[Block]) -> None:
            noise = np.random.default_rng(0).standard_normal(x_NP.shape, dtype=np.float32)
            super().patches(x_NP + 0.1 * noise, grid, blocks)

    with mock.patch.object(generate, "Writer", Noisy):
        yield


@contextmanager
def _shifted_t() -> Iterator[None]:
    """The network is told the time of the next solver step."""
    original = ImageFlow.draw

    def shifted(self: ImageFlow, sample: SampleConfig, *args: Any, **kwargs: Any) -> Any:
        flow = original(self, sample, *args, **kwargs)
        try:
            z, t, preview = next(flow)
            while True:
                z, t, preview = flow.send((yield z, t + 1 / sample.steps, preview))
        except StopIteration as stop:
            return stop.value

    with mock.patch.object(ImageFlow, "draw", shifted):
        yield


@contextmanager
def _causal_mask() -> Iterator[None]:
    """Patches do not see later patches of their image."""

    def causal(q: Sites, k: Sites) -> Tensor:
        return dense_visible(q, k) & (k.slot.unsqueeze(1) <= q.slot.unsqueeze(2))

    with mock.patch.object(scheduler, "dense_visible", causal):
        yield


@contextmanager
def _stale_cache() -> Iterator[None]:
    """Slots that were written once keep their keys: the last solver step stands in for the finished image."""
    update = RowCache.update

    def first_wins(self: RowCache, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        stored = self._store[layer]
        if stored is not None:
            at = (self._lanes.unsqueeze(1), slice(None), self._slots)
            old = [part[at].transpose(1, 2) for part in stored]
            key, value = (torch.where(o == 0, n, o) for o, n in zip(old, (key, value), strict=True))
        return update(self, key, value, layer)

    with mock.patch.object(RowCache, "update", first_wins):
        yield


@contextmanager
def _wrong_position() -> Iterator[None]:
    """Text after an image counts its patches."""

    class Counting(Writer):
        def close_image(self) -> None:
            self.position += 3
            super().close_image()

    with mock.patch.object(generate, "Writer", Counting):
        yield


FAULTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "noisy-context": _noisy_context,
    "shifted-t": _shifted_t,
    "causal-mask": _causal_mask,
    "stale-cache": _stale_cache,
    "wrong-position": _wrong_position,
}
