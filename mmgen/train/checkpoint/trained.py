"""A trained model by its folder: a run folder, a checkpoint, or a folder that `export` wrote."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from mmgen.config import Config
from mmgen.model import MMGenModel
from mmgen.sequence.tokenizer import Tokenizer
from mmgen.train.checkpoint import export, read
from mmgen.train.checkpoint.read import Checkpoint
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


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint."""
    return (folder / "trainer.json").is_file()


def find_checkpoint(folder: Path, report: Callable[[str], None] | None = None) -> Checkpoint | None:
    """The checkpoint that a folder is, or the newest undamaged one of a run folder; None if there is none.

    `report` gets a line for each damaged checkpoint.

    Raises:
        ValueError: the checkpoint, or every checkpoint of the run, is damaged.
    """
    if is_checkpoint(folder):
        return Checkpoint(folder, read.read_trainer(folder))
    return read.newest_good(folder, report)


def stored_settings(folder: Path) -> Config:
    """The settings with which the model of a folder was trained; for an exported folder, with its kind of weights.

    Raises:
        ValueError: the folder holds no model of mmgen, or a file is damaged.
    """
    if export.is_export(folder):
        return export.read_settings(folder)
    problems = []
    for checkpoint in [folder] if is_checkpoint(folder) else read.candidates(folder):
        try:
            return read.settings_of(checkpoint)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError(problems[0])
    what = "does not exist" if not folder.exists() else "holds no trained model"
    raise ValueError(
        f"{folder} {what}: give a run folder, a checkpoint (FOLDER/checkpoints/latest) or a folder that "
        "`mmgen export` wrote"
    )


def load_folder(folder: Path, weights: str) -> Trained:
    """Load the model of a folder; of a run folder, that of the newest checkpoint.

    `weights` is the kind of weights, such as `ema`.

    Raises:
        ValueError: the folder holds no model or none with such weights, or a file is damaged.
    """
    if export.is_export(folder):
        return Trained(*export.read_export(folder, weights))
    found = find_checkpoint(folder)
    if found is None:
        raise ValueError(f"{folder} has no checkpoint: train it, or give another folder")
    return Trained(*read.load_model(found.folder, weights), found.state)
