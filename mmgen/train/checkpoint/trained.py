"""A trained model by its folder: a run folder, a checkpoint, or a folder that `export` wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from mmgen.config import Config
from mmgen.model import MMGenModel
from mmgen.sequence.tokenizer import Tokenizer
from mmgen.train.checkpoint import export, read
from mmgen.train.state import TrainerState


@dataclass(frozen=True)
class Trained:
    """A trained model in evaluation mode, with its tokenizer."""

    model: MMGenModel
    tokenizer: Tokenizer
    trainer: TrainerState
    """State of the run in trainer.json: step, settings, seconds of training."""

    def on_best_device(self) -> Trained:
        """Move the model to the GPU if there is one; returns this object."""
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        self.model.to(torch.device(device))
        return self


def stored_settings(folder: Path) -> Config:
    """The settings with which the model of a folder was trained; for an exported folder, with its kind of weights.

    Raises:
        ValueError: the folder holds no model of mmgen, or a file is damaged.
    """
    if export.is_export(folder):
        return export.read_settings(folder)
    checkpoint = folder if is_checkpoint(folder) else read.latest(folder)
    if checkpoint is None:
        what = "does not exist" if not folder.exists() else "holds no trained model"
        raise ValueError(
            f"{folder} {what}: give a run folder, a checkpoint (FOLDER/checkpoints/latest) or a folder that "
            "`mmgen export` wrote"
        )
    return read.settings_of(checkpoint)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint."""
    return (folder / "trainer.json").is_file()


def load_folder(folder: Path, weights: str) -> Trained:
    """Load the model of a folder; of a run folder, that of the newest checkpoint.

    `weights` is the kind of weights, such as `ema`.

    Raises:
        ValueError: the folder holds no model or none with such weights, or a file is damaged.
    """
    if export.is_export(folder):
        return Trained(*export.read_export(folder, weights))
    stored_settings(folder)
    found = folder if is_checkpoint(folder) else None
    if found is None:
        newest = read.newest_good(folder)
        assert newest is not None, "stored_settings found a checkpoint"
        found = newest.folder
    return Trained(*read.load_model(found, weights), read.read_trainer(found))
