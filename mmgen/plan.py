"""What a run would cost, computed without running it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from mmgen.config import Config
from mmgen.model import MMGenConfig, MMGenModel
from mmgen.objective import build_layout
from mmgen.sequence.tokenizer import SPECIAL, Tokenizer
from mmgen.train.engine import uses_bf16
from mmgen.train.memory import theory
from mmgen.train.optimizer import averages

BYTES = 4


def plan(config: Config) -> dict[str, Any]:
    """Resolved settings, parameter count, tokens per step and memory per process, from shapes alone.

    Nothing is allocated: the model is built on the meta device. State is weights, gradients, masters, two moments and
    the averages, for as many processes as WORLD_SIZE says; activations are those of one micro-step in eager fp32.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    config.check(world)
    tokens = _vocabulary(config)
    with torch.device("meta"):
        model = MMGenModel(MMGenConfig.of(config, tokens))
    parameters = sum(p.numel() for p in model.parameters())
    micro = min(config.train.micro_rows or config.train.batch_rows, -(-config.train.batch_rows // world))
    state = theory(parameters, config.train.zero_stage, world, uses_bf16(config), len(averages(config.train)))
    fields = model.backbone.config
    positions = micro * config.data.row_length
    per_position = fields.num_hidden_layers * (16 * fields.hidden_size + 5 * fields.intermediate_size)
    copies = build_layout(config.objective, config.model.patcher).copies
    return {
        "parameters": parameters,
        "vocabulary": tokens,
        "tokens_per_step": config.train.batch_rows * config.data.row_length,
        "tokens_total": config.train.batch_rows * config.data.row_length * config.train.steps,
        "positions_per_image": [copies * rows * columns + 3 for rows, columns in config.model.patcher.grids],
        "positions_added_by_copies": [(copies - 1) * rows * columns for rows, columns in config.model.patcher.grids],
        "numbers_per_patch": config.model.patcher.patch_length,
        "processes": world,
        "memory_state_bytes": round(sum(state.values())),
        **{f"memory_{name}_bytes": round(size) for name, size in state.items()},
        "memory_activation_bytes": BYTES * positions * per_position,
        "config": config.model_dump(mode="json"),
    }


def _vocabulary(config: Config) -> int:
    """Size of the vocabulary; without a tokenizer file yet, the bytes and special tokens."""
    grids = config.model.patcher.grids
    if Path(config.data.tokenizer).is_file():
        return len(Tokenizer.load(config.data.tokenizer, grids))
    return 256 + len(SPECIAL) + len(grids)
