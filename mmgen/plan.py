"""What a run would cost, computed without running it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mmgen.config import Config
from mmgen.model import MMGenConfig, MMGenModel
from mmgen.objective import objective_class
from mmgen.tokenizer import SPECIAL, Tokenizer

BYTES = 4


def plan(config: Config) -> dict[str, Any]:
    """Resolved settings, parameter count, tokens per step and memory per process, from shapes alone.

    Nothing is allocated: the model is built on the meta device. Memory is weights, gradients, two moments
    and the average, all fp32; activations are estimated for one micro-step in eager fp32.
    """
    tokens = _vocabulary(config)
    with torch.device("meta"):
        model = MMGenModel(MMGenConfig.of(config, tokens))
    parameters = sum(p.numel() for p in model.parameters())
    micro = config.train.micro_rows or config.train.batch_rows
    fields = model.backbone.config
    positions = micro * config.data.row_length
    per_position = fields.num_hidden_layers * (16 * fields.hidden_size + 5 * fields.intermediate_size)
    copies = objective_class(config.objective).copies(config.objective)
    return {
        "parameters": parameters,
        "vocabulary": tokens,
        "tokens_per_step": config.train.batch_rows * config.data.row_length,
        "tokens_total": config.train.batch_rows * config.data.row_length * config.train.steps,
        "positions_per_image": [copies * rows * columns + 3 for rows, columns in config.model.patcher.grids],
        "positions_added_by_copies": [(copies - 1) * rows * columns for rows, columns in config.model.patcher.grids],
        "memory_state_bytes": 5 * BYTES * parameters,
        "memory_activation_bytes": BYTES * positions * per_position,
        "config": config.model_dump(mode="json"),
    }


def _vocabulary(config: Config) -> int:
    """Size of the vocabulary; without a tokenizer file yet, the bytes and special tokens."""
    grids = config.model.patcher.grids
    if Path(config.data.tokenizer).is_file():
        return len(Tokenizer.load(config.data.tokenizer, grids))
    return 256 + len(SPECIAL) + len(grids)
