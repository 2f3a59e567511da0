"""The trained run that a command works on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmgen.cli.show import log
from mmgen.config import Config

if TYPE_CHECKING:
    from mmgen.model import MMGenModel
    from mmgen.sequence.tokenizer import Tokenizer
    from mmgen.train.checkpoint.read import Checkpoint
    from mmgen.train.state import TrainerState


@dataclass(frozen=True)
class Trained:
    """A trained model, ready to generate."""

    model: MMGenModel
    tokenizer: Tokenizer
    trainer: TrainerState
    """The checkpoint's record of its run."""


def load_run(config: Config) -> Trained:
    """The newest checkpoint of the run, on the best device."""
    import torch

    from mmgen.train.checkpoint import read as checkpoint

    found = newest(config)
    model, tokenizer = checkpoint.load_model(found.folder, config.sample.weights)
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    model.to(torch.device(device))
    return Trained(model, tokenizer, found.state)


def newest(config: Config) -> Checkpoint:
    """The newest whole checkpoint of a run; its model must be the one of the settings."""
    from mmgen.train.checkpoint import read as checkpoint

    found = checkpoint.newest_good(config.run.dir, log)
    if found is None:
        raise FileNotFoundError(f"{config.run.dir} holds no checkpoint: train it first with `mmgen train --config ...`")
    checkpoint.check_same_model(found, config)
    return found
