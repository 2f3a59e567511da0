"""Measures the pace of a run: a few real steps of `mmgen train` with its settings."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from mmgen.config import Config
from mmgen.config_io import override
from mmgen.data.progress import Progress
from mmgen.train.checkpoint.read import read_trainer
from mmgen.train.command import keep_settings, run_command

WARM, STEPS = 8, 32
"""Steps before the clock starts, and all steps that are run."""


@dataclass(frozen=True)
class Pace:
    """How long a run takes."""

    seconds_per_step: float
    fixed: float
    """Seconds of everything but steps: start, compilation, a sample grid, validation and checkpoints."""

    def minutes(self, steps: int) -> float:
        """The minutes of a run."""
        return (self.fixed + steps * self.seconds_per_step) / 60

    def seconds_for_steps(self, minutes: float) -> float:
        """The seconds that are left for steps in a run of `minutes`."""
        return max(0.0, 60 * minutes - self.fixed)


def measure(config: Config, folder: Path) -> Pace:
    """Train `STEPS` steps in `folder`, which is then removed, and validate.

    Raises:
        ChildProcessError: the training failed; the message names its log, and the folder is kept.
    """
    shutil.rmtree(folder, ignore_errors=True)
    changes = {
        "run": {"dir": folder},
        "train": {
            "steps": STEPS,
            "log_every": STEPS,
            "save_every": WARM,
            "keep_last": STEPS // WARM,
            "first_sample": 2 * WARM,
            "sample_every": 0,
            "warmup_steps": STEPS,
        },
    }
    settings = keep_settings(override(config, changes), "trial.yaml", "remove its folder")
    began = time.monotonic()
    with Progress(f"training {STEPS} steps to measure the pace", "processes", 1):
        run_command("train", settings)
    wall = time.monotonic() - began
    first, last = (read_trainer(folder / "checkpoints" / f"step-{step}").productive_seconds for step in (WARM, STEPS))
    shutil.rmtree(folder)
    seconds = (last - first) / (STEPS - WARM)
    return Pace(seconds, wall - STEPS * seconds)
