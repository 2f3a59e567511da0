"""The plan of a run: parameters, tokens and memory, computed without running it."""

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
from mmgen.train.muon import hidden_matrices
from mmgen.train.optimizer import ema_decays

BYTES = 4
"""Size of a number in fp32."""


@dataclass(frozen=True)
class Plan:
    """Sizes of a run; memory is in bytes per process."""

    parameters: int
    vocabulary: int
    tokens_per_step: int
    tokens_total: int
    positions_per_image: list[int]
    """Positions in a row of an image of each declared size, including BOI, size token and EOI."""
    positions_added_by_copies: list[int]
    """Positions of each size that a second copy of the image adds."""
    numbers_per_patch: int
    processes: int
    memory_state_bytes: int
    """Sum of the next five fields."""
    memory_weights_bytes: int
    memory_gradients_bytes: int
    memory_master_bytes: int
    memory_moments_bytes: int
    memory_averages_bytes: int
    memory_activation_bytes: int
    """Activations of one micro-step in eager fp32."""
    config: Config

    def as_json(self) -> dict[str, object]:
        """Return the plan as JSON."""
        return {**asdict(self), "config": self.config.model_dump(mode="json")}


def plan(config: Config) -> Plan:
    """Compute the parameter count, tokens per step and memory per process of a run from shapes only.

    The model is built on the meta device, which allocates nothing. The state is weights, gradients, fp32 master
    weights, moments (two of a parameter, but one where Muon steps) and the EMA weights. The number of processes is that
    of the environment variable WORLD_SIZE.

    Raises:
        ValueError: the rows of a step cannot be divided among this number of processes, or an image does not fit a row.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    config.check_processes(world)
    tokens = _vocabulary(config)
    with torch.device("meta"):
        model = MMGenModel(MMGenConfig.of(config, tokens))
    parameters = sum(p.numel() for p in model.parameters())
    rows, length = config.train.batch_rows, config.data.row_length
    micro = min(config.train.micro_rows or rows, -(-rows // world))
    hidden = hidden_matrices(model) if config.train.optimizer == "muon" else set()
    muon = sum(p.numel() for name, p in model.named_parameters() if name in hidden)
    shape = Shape(parameters, config.train.zero_stage, world, uses_bf16(config), muon)
    state = theory(shape, len(ema_decays(config.train)))
    fields = model.backbone.config
    per_position = fields.num_hidden_layers * (16 * fields.hidden_size + 5 * fields.intermediate_size)
    layout = build_layout(config.objective)
    copies, lengths = layout.copies, [layout.lead + high * wide for high, wide in config.model.patcher.grids]
    for size, n in zip(config.model.patcher.image_sizes, lengths, strict=True):
        if copies * n + 5 > length:
            raise ValueError(
                f"an image of {size[0]}x{size[1]} needs {copies * n + 5} positions with BOS and EOS, but "
                f"data.row_length is {length}: raise it, or declare smaller model.patcher.image_sizes"
            )
    return Plan(
        parameters=parameters,
        vocabulary=tokens,
        tokens_per_step=rows * length,
        tokens_total=rows * length * config.train.steps,
        positions_per_image=[copies * n + 3 for n in lengths],
        positions_added_by_copies=[(copies - 1) * n for n in lengths],
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
    """Return the size of the vocabulary; if the tokenizer file does not exist yet, that of bytes and special tokens."""
    grids = config.model.patcher.grids
    if Path(config.data.tokenizer).is_file():
        return len(Tokenizer.of(config))
    return 256 + len(SPECIAL) + len(grids)
