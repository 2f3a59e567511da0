"""Measures the pace of a run: a few real steps of `mmgen train` with its settings."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from mmgen.config import Config
from mmgen.config_io import override
from mmgen.data.progress import Progress
from mmgen.train.state import TrainerState

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


def measure(config: Config) -> Pace:
    """Train `STEPS` steps in a folder that is then removed, and validate.

    Raises:
        ChildProcessError: the training failed; the message ends with what it printed.
    """
    with tempfile.TemporaryDirectory(prefix="mmgen-init-") as folder:
        run = Path(folder) / "run"
        settings = {
            "run": {"dir": run},
            "train": {"steps": STEPS, "log_every": STEPS, "save_every": WARM, "keep_last": STEPS // WARM}
            | {"first_sample": 2 * WARM, "sample_every": 0, "tensorboard": False, "warmup_steps": STEPS},
        }
        short = override(config, settings)
        file = Path(folder) / "settings.yaml"
        file.write_text(yaml.safe_dump(short.model_dump(mode="json")))
        began = time.monotonic()
        with Progress(f"training {STEPS} steps to measure the pace", "processes", 1):
            done = subprocess.run(
                [sys.executable, "-m", "mmgen.cli", "train", "--config", str(file)], capture_output=True, text=True
            )
        wall = time.monotonic() - began
        if done.returncode:
            raise ChildProcessError(f"a trial of {STEPS} steps failed:\n{done.stderr[-2000:].strip()}")
        states = [
            TrainerState.from_json((run / "checkpoints" / f"step-{step}" / "trainer.json").read_text())
            for step in (WARM, STEPS)
        ]
    seconds = (states[1].productive_seconds - states[0].productive_seconds) / (STEPS - WARM)
    return Pace(seconds, wall - STEPS * seconds)
