"""Loading of the trained run that a command uses."""

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
    """A trained model on its device, with its tokenizer."""

    model: MMGenModel
    tokenizer: Tokenizer
    trainer: TrainerState
    """State of the run in trainer.json: step, settings, seconds of training."""


def load_run(config: Config) -> Trained:
    """Load the newest checkpoint of a run to the GPU if there is one, else to the CPU; raises as `newest` does."""
    import torch

    from mmgen.train.checkpoint import read as checkpoint

    found = newest(config)
    model, tokenizer = checkpoint.load_model(found.folder, config.sample.weights)
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    model.to(torch.device(device))
    return Trained(model, tokenizer, found.state)


def newest(config: Config) -> Checkpoint:
    """The newest undamaged checkpoint of a run.

    Raises:
        FileNotFoundError: the run has no checkpoint.
        ValueError: all checkpoints are damaged, or their model differs from the settings.
    """
    from mmgen.train.checkpoint import read as checkpoint

    found = checkpoint.newest_good(config.run.dir, log)
    if found is None:
        what = "is a file, not a run folder" if config.run.dir.is_file() else "has no checkpoint"
        raise FileNotFoundError(
            f"{config.run.dir} {what}: name a trained run with --config FILE or --run.dir FOLDER, or train it "
            "with `mmgen train --config FILE`"
        )
    checkpoint.check_same_model(found, config)
    return found
