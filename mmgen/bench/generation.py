"""`mmgen bench generation`: times drawing with the key-value cache against recomputation of all positions."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmgen.backbone import RowCache, additive
from mmgen.config import Config
from mmgen.config_io import override
from mmgen.generate import Decoder, Request
from mmgen.generate.parts import REAL, LaneCall, Observer, Parts
from mmgen.model import MMGenModel, build_model
from mmgen.sequence.attention import dense_visible
from mmgen.sequence.tokenizer import Tokenizer

OBJECTIVES: dict[str, dict[str, Any]] = {
    "transfusion": {"kind": "transfusion"},
    "masked": {"kind": "mar", "mar": {"order": "masked"}},
    "raster": {"kind": "mar", "mar": {"order": "raster"}},
}
SIDES = (8, 16)
"""Patches per side of the image."""
PROMPT = "a prompt of some length, as captions have it"


@dataclass(frozen=True)
class GenerationTimes:
    """Medians over the rounds, for one objective and one image size."""

    seconds: float
    """Seconds per image with the cache."""
    seconds_recomputed: float
    """Seconds per image without the cache."""
    recomputed_over_cached: float
    """Ratio of the two."""
    largest_difference: float
    """Largest absolute difference between the patches of the two images."""


class Recomputing:
    """The backbone without a cache: every call runs it on all positions of its lanes."""

    def __init__(self, model: MMGenModel, cache: RowCache) -> None:
        self.model = model
        weight = model.get_input_embeddings().weight
        shape = (len(cache.length), cache.capacity)
        self.inputs = torch.zeros(*shape, weight.shape[1], device=weight.device, dtype=weight.dtype)
        self.position = torch.zeros(shape, device=weight.device, dtype=torch.long)

    def __call__(self, call: LaneCall) -> Tensor:
        lanes = torch.tensor(call.lanes, device=call.slots_LW.device)
        here = (lanes.unsqueeze(1), call.slots_LW)
        self.inputs[here], self.position[here] = call.inputs_LWD, call.position_LW
        reach = call.keys.slot.shape[1]
        inputs, position = (kept[lanes, :reach] for kept in (self.inputs, self.position))
        mask = additive(dense_visible(call.keys))
        hidden = self.model.hidden(inputs, position, mask, (call.keys.block >= 0).long())
        return hidden.gather(1, call.slots_LW.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


class _LastImage(Observer):
    """Stores the patches of the last image."""

    def drew(self, requests: Sequence[int], x_RNP: Tensor) -> None:
        self.x_NP: NDArray[np.float32] = x_RNP[0].float().cpu().numpy()


def bench_generation(
    config: Config, rounds: int, sides: Sequence[int] = SIDES, parts: Parts = REAL
) -> dict[str, GenerationTimes]:
    """Time each objective and image size with and without the cache; keys of the result are `OBJECTIVE_PATCHES`.

    Each round draws every kind of image once. The weights are random. `sides` are image sides in patches. `parts` are
    the parts of the decoder with the cache.

    Raises:
        ValueError: `rounds` is below 1, or settings do not fit each other.
        FileNotFoundError: the tokenizer does not exist.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    cells = {
        f"{name}_{side * side}": _decoders(config, changes, side, parts)
        for name, changes in OBJECTIVES.items()
        for side in sides
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in cells}
    differences: dict[str, float] = {}
    for i in range(rounds + 1):  # the first round warms up
        for name, (cached, recomputing) in cells.items():
            one, with_cache = _draw(cached)
            other, without = _draw(recomputing)
            differences[name] = float(np.abs(one - other).max())
            if i:
                seconds[name].append((with_cache, without))
    result: dict[str, GenerationTimes] = {}
    for name, pairs in seconds.items():
        fast, slow = (statistics.median(column) for column in zip(*pairs, strict=True))
        result[name] = GenerationTimes(fast, slow, slow / fast, differences[name])
    return result


def as_json(times: dict[str, GenerationTimes]) -> dict[str, dict[str, float]]:
    """Return the times as `mmgen bench generation --json` prints them."""
    return {name: asdict(cell) for name, cell in times.items()}


def _decoders(config: Config, objective: dict[str, Any], side: int, parts: Parts) -> tuple[Decoder, Decoder]:
    """Return a decoder with the cache and one without it, of the same model."""
    pixels = side * config.model.patcher.side
    patcher = {"image_sizes": [[pixels, pixels]]}
    config = override(config, {"objective": objective, "model": {"patcher": patcher}})
    tokenizer = Tokenizer.of(config)
    torch.manual_seed(0)
    model = build_model(config, len(tokenizer))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.no_grad():
        for p in model.parameters():  # zero-initialised output layers would hide differences
            p.add_(0.02 * torch.randn_like(p))
    model.to(device)
    return (
        Decoder(model, tokenizer, config.sample, replace(parts, observer=_LastImage())),
        Decoder(model, tokenizer, config.sample, Parts(backbone=Recomputing, observer=_LastImage())),
    )


def _draw(decoder: Decoder) -> tuple[NDArray[np.float32], float]:
    """Draw one image; returns its patches and the seconds it took."""
    began = time.perf_counter()
    decoder.generate([Request([PROMPT], "image", seed=1)])
    seconds = time.perf_counter() - began
    assert isinstance(decoder.parts.observer, _LastImage)
    return decoder.parts.observer.x_NP, seconds
