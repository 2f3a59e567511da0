"""The trained model that a command uses: a run folder, a checkpoint or an exported folder."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mmgen.cli.show import log
from mmgen.config import Config

if TYPE_CHECKING:
    from mmgen.train.checkpoint.read import Checkpoint
    from mmgen.train.checkpoint.trained import Trained

Item = TypeVar("Item")


def holds_model(folder: Path) -> bool:
    """Whether a path is a run folder, a checkpoint or an exported folder."""
    return folder.is_dir() and any((folder / name).is_file() for name in ("config.yaml", "config.json"))


def load_run(config: Config) -> Trained:
    """Load the model of `run.dir` to the GPU if there is one, else to the CPU.

    `run.dir` is a run folder, whose newest checkpoint is loaded, or a checkpoint, or an exported folder.

    Raises:
        FileNotFoundError, ValueError: as `newest` does, or as `read_export` does.
    """
    from mmgen.train.checkpoint import export, read
    from mmgen.train.checkpoint.trained import Trained

    if export.is_export(config.run.dir):
        trained = Trained(*export.read_export(config.run.dir, config.sample.weights))
    else:
        found = newest(config)
        trained = Trained(*read.load_model(found.folder, config.sample.weights), found.state)
    return trained.on_best_device()


def newest(config: Config) -> Checkpoint:
    """The newest undamaged checkpoint of a run, or the checkpoint that `run.dir` is.

    Raises:
        FileNotFoundError: the run has no checkpoint.
        ValueError: all checkpoints are damaged, or their model differs from the settings.
    """
    from mmgen.train.checkpoint.read import check_same_model
    from mmgen.train.checkpoint.trained import find_checkpoint

    folder = config.run.dir
    found = find_checkpoint(folder, log)
    if found is None:
        what = "is a file, not a run folder" if folder.is_file() else "has no checkpoint"
        raise FileNotFoundError(
            f"{folder} {what}: name a trained run as the first argument or with --config FILE, or train it with "
            "`mmgen train --config FILE`"
        )
    check_same_model(found, config)
    return found


def batches(items: Sequence[Item], what: str) -> Iterator[Sequence[Item]]:
    """Yield the items in batches for the decoder, and log how many are done per second after each.

    `what` names them in the log, such as "images drawn".
    """
    from mmgen.generate.request import BATCH

    began = time.perf_counter()
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]
        done = min(start + BATCH, len(items))
        log(f"{done} of {len(items)} {what}, {done / (time.perf_counter() - began):.2g} per second")
