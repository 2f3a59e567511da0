"""`mmgen bench generation`: drawing with the key-value cache against computing everything anew at every call."""

from __future__ import annotations

import statistics
import time
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from mmgen.backbone import additive
from mmgen.config import Config
from mmgen.config_io import override
from mmgen.generate import decoder as generate
from mmgen.generate.decoder import Decoder, Request
from mmgen.generate.scheduler import Schedule
from mmgen.image.patch import Floats, Grid
from mmgen.model import build_model
from mmgen.sequence.attention import Sites, dense_visible
from mmgen.sequence.tokenizer import Tokenizer

OBJECTIVES: dict[str, dict[str, Any]] = {
    "transfusion": {"kind": "transfusion"},
    "masked": {"kind": "mar", "mar": {"order": "masked"}},
    "raster": {"kind": "mar", "mar": {"order": "raster"}},
}
SIDES = (8, 16)
"""Patches per side of the image."""
PROMPT = "a prompt of some length, as captions have it"


class Recomputing(Schedule):
    """A schedule without a cache: every call runs the backbone on all positions of its lanes from the first on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        lanes, capacity = self.sites.slot.shape
        width = self.model.get_input_embeddings().embedding_dim
        self.inputs = torch.zeros(lanes, capacity, width, device=self.device, dtype=self.dtype)
        self.position = torch.zeros(lanes, capacity, device=self.device, dtype=torch.long)

    def _run(
        self, here: tuple[Tensor, Tensor], inputs_LWD: Tensor, position_LW: Tensor, query: Sites, keys: Sites
    ) -> Tensor:
        lanes, slots = here
        self.inputs[here], self.position[here] = inputs_LWD, position_LW
        reach = keys.slot.shape[1]
        inputs, position = (kept[lanes.squeeze(1), :reach] for kept in (self.inputs, self.position))
        hidden = self.model.hidden(inputs, position, additive(dense_visible(keys)), (keys.block >= 0).long())
        return hidden.gather(1, slots.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


def bench_generation(config: Config, rounds: int) -> dict[str, Any]:
    """Median seconds per image of each objective and size, with and without the cache, and the largest difference.

    Weights are random, so only times and equality mean anything. Each round draws every kind of image once.

    Raises:
        ValueError, FileNotFoundError: the configuration names no tokenizer, or settings do not fit.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    cells = {
        f"{name}_{side * side}": _decoder(config, changes, side)
        for name, changes in OBJECTIVES.items()
        for side in SIDES
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in cells}
    apart: dict[str, float] = {}
    for i in range(rounds + 1):  # the first round warms up
        for name, decoder in cells.items():
            cached, with_cache = _draw(decoder, Schedule)
            anew, without = _draw(decoder, Recomputing)
            apart[name] = float(np.abs(cached - anew).max())
            if i:
                seconds[name].append((with_cache, without))
    result: dict[str, Any] = {}
    for name, pairs in seconds.items():
        one, other = (statistics.median(column) for column in zip(*pairs, strict=True))
        result[name] = {
            "seconds": one,
            "seconds_recomputed": other,
            "recomputed_over_cached": other / one,
            "largest_difference": apart[name],
        }
    return result


def _decoder(config: Config, objective: dict[str, Any], side: int) -> Decoder:
    pixels = side * config.model.patcher.side
    patcher = {"image_sizes": [[pixels, pixels]]}
    config = override(config, {"objective": objective, "model": {"patcher": patcher}})
    tokenizer = Tokenizer.load(config.data.tokenizer, config.model.patcher.grids)
    torch.manual_seed(0)
    model = build_model(config, len(tokenizer))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.no_grad():
        for p in model.parameters():  # nothing hides behind the zeros that output layers start with
            p.add_(0.02 * torch.randn_like(p))
    return Decoder(model.to(device), tokenizer, config.sample)


def _draw(decoder: Decoder, schedule: type[Schedule]) -> tuple[Floats, float]:
    """Patch rows of one image, and the seconds it took."""
    drawn: list[Floats] = []
    pictures = decoder.patcher.pictures

    def noted(x_RNP: Floats, grid: Grid) -> Any:
        drawn.extend(x_RNP)
        return pictures(x_RNP, grid)

    with mock.patch.object(generate, "Schedule", schedule), mock.patch.object(decoder.patcher, "pictures", noted):
        began = time.perf_counter()
        decoder.generate([Request([PROMPT], "image", seed=1)])
        return drawn[0], time.perf_counter() - began
