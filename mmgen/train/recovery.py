"""Continuing from a checkpoint, and handling a step whose loss or gradient is not finite."""

from __future__ import annotations

import math

from mmgen.train.checkpoint import read as checkpoint
from mmgen.train.checkpoint.read import Checkpoint
from mmgen.train.engine import Engine
from mmgen.train.run import Run
from mmgen.train.state import Progress


def resume(stored: Checkpoint, engine: Engine, progress: Progress, data: str) -> None:
    """Restore engine and counters from a checkpoint; `data` is the fingerprint of the training shards.

    Raises:
        ValueError: the training shards have changed, or the checkpoint lacks some of the weights.
    """
    checkpoint.check_same_data(stored, data)
    checkpoint.restore(stored, engine)
    progress.resume(stored.state)


def react(run: Run, step: int, values: dict[str, float]) -> Checkpoint | None:
    """Handle a step that was not taken, as `train.non_finite` sets it.

    Returns the checkpoint that the run goes back to, or None if it continues with the next step.

    Raises:
        FloatingPointError: the run must stop.
    """
    settings, progress = run.config.train, run.progress
    if step in progress.left_out:
        return None
    wrong = ", ".join(f"{name} = {value}" for name, value in values.items() if not math.isfinite(value))
    problem = f"step {step}: {wrong}"
    used = progress.skipped if settings.non_finite == "skip" else len(progress.left_out)
    if settings.non_finite == "stop" or used >= settings.max_skips:
        run.saver.finish()
        limit = "" if settings.non_finite == "stop" else f" (train.max_skips {settings.max_skips} is reached)"
        raise FloatingPointError(
            f"{problem}{limit}. The last checkpoint is unchanged; lower train.lr or train.clip_norm, "
            "or check the data of this step"
        )
    event = {"step": step, "policy": settings.non_finite, "position": progress.position.as_dict()}
    run.log.event("skipped.jsonl", {**event, **{name: str(value) for name, value in values.items()}})
    if settings.non_finite == "skip":
        run.log.print(f"{problem}: step skipped")
        return None
    return _roll_back(run, step, problem)


def _roll_back(run: Run, step: int, problem: str) -> Checkpoint:
    """Go back to the newest checkpoint; `step` is skipped from now on."""
    run.saver.finish()
    stored = checkpoint.newest_good(run.config.run.dir, run.log.print, run.ranks)
    if stored is None:
        raise FloatingPointError(
            f"{problem}, and there is no checkpoint to go back to: lower train.lr, or set train.save_every"
        )
    run.progress.left_out.add(step)
    resume(stored, run.engine, run.progress, run.corpus.dataset.fingerprint)
    run.log.rewind(run.progress.step)
    run.log.print(f"{problem}: back to step {run.progress.step}; step {step} will be skipped")
    return stored
