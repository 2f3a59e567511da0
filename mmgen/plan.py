"""What a run would cost, computed without running it."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from mmgen.config import Config
from mmgen.model import MMGenConfig, MMGenModel
from mmgen.objective import build_layout
from mmgen.sequence.tokenizer import SPECIAL, Tokenizer
from mmgen.train.engine import uses_bf16
from mmgen.train.memory import Shape, theory
from mmgen.train.optimizer import ema_decays

BYTES = 4


@dataclass(frozen=True)
class Plan:
    """What a run would cost; sizes of memory are in bytes, per process."""

    parameters: int
    vocabulary: int
    tokens_per_step: int
    tokens_total: int
    positions_per_image: list[int]
    """Of each image size, with its BOI, size token and EOI."""
    positions_added_by_copies: list[int]
    numbers_per_patch: int
    processes: int
    memory_state_bytes: int
    """Sum of the next five."""
    memory_weights_bytes: int
    memory_gradients_bytes: int
    memory_master_bytes: int
    memory_moments_bytes: int
    memory_averages_bytes: int
    memory_activation_bytes: int
    """Of one micro-step in eager fp32."""
    config: Config

    def as_json(self) -> dict[str, object]:
        """The same as JSON has it."""
        return {**asdict(self), "config": self.config.model_dump(mode="json")}


def plan(config: Config) -> Plan:
    """Resolved settings, parameter count, tokens per step and memory per process, from shapes alone.

    Nothing is allocated: the model is built on the meta device. State is weights, gradients, masters, two moments and
    the averages, for as many processes as WORLD_SIZE says.

    Raises:
        ValueError: this number of processes cannot share the run.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    config.check_processes(world)
    tokens = _vocabulary(config)
    with torch.device("meta"):
        model = MMGenModel(MMGenConfig.of(config, tokens))
    parameters = sum(p.numel() for p in model.parameters())
    rows, length = config.train.batch_rows, config.data.row_length
    micro = min(config.train.micro_rows or rows, -(-rows // world))
    shape = Shape(parameters, config.train.zero_stage, world, uses_bf16(config))
    state = theory(shape, len(ema_decays(config.train)))
    fields = model.backbone.config
    per_position = fields.num_hidden_layers * (16 * fields.hidden_size + 5 * fields.intermediate_size)
    copies = build_layout(config.objective, config.model.patcher).copies
    patches = [high * wide for high, wide in config.model.patcher.grids]
    return Plan(
        parameters=parameters,
        vocabulary=tokens,
        tokens_per_step=rows * length,
        tokens_total=rows * length * config.train.steps,
        positions_per_image=[copies * n + 3 for n in patches],
        positions_added_by_copies=[(copies - 1) * n for n in patches],
        numbers_per_patch=config.model.patcher.patch_length,
        processes=world,
        memory_state_bytes=round(sum(state.values())),
        memory_weights_bytes=round(state["weights"]),
        memory_gradients_bytes=round(state["gradients"]),
        memory_master_bytes=round(state["master"]),
        memory_moments_bytes=round(state["moments"]),
        memory_averages_bytes=round(state["averages"]),
        memory_activation_bytes=BYTES * micro * length * per_position,
        config=config,
    )


def _vocabulary(config: Config) -> int:
    """Size of the vocabulary; without a tokenizer file yet, the bytes and special tokens."""
    grids = config.model.patcher.grids
    if Path(config.data.tokenizer).is_file():
        return len(Tokenizer.of(config))
    return 256 + len(SPECIAL) + len(grids)
