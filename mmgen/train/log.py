"""What a run tells: metrics.jsonl, TensorBoard, quarantine.jsonl and a progress line."""

from __future__ import annotations

import importlib
import json
import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mmgen.config import Config
from mmgen.data.shards.samples import BadRecord


class Log:
    """Writes a run's records. On resume, lines past the checkpoint are dropped, so no step is told twice."""

    def __init__(self, config: Config, first: int, main: bool = True) -> None:
        settings, run = config.train, config.run.dir
        self.run, self.total, self.first, self.main = run, settings.steps, first, main
        if not main:
            return
        self.metrics = run / "metrics.jsonl"
        _keep(self.metrics, first)
        self._file = self.metrics.open("a")
        self._board: Any = None
        if settings.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=first + 1)
        self._trackers = [_tracker(name, config) for name in settings.trackers]
        self._quarantined = {(bad["shard"], bad["key"]) for bad in _lines(run / "quarantine.jsonl")}
        self._console = Console(stderr=True, markup=False)  # names of samples are no markup
        self._progress: Progress | None = None
        self._began = time.monotonic()
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            self._progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self._console)
            self._task = self._progress.add_task("training", total=self.total, completed=first)
            self._progress.start()

    def say(self, message: str) -> None:
        """One line for people, from one process only."""
        if self.main:
            self._console.print(message, highlight=False, soft_wrap=True)

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        if self.main and self._progress:
            self._progress.update(self._task, completed=step)

    def record(self, step: int, values: dict[str, float]) -> None:
        """Write one logged step everywhere."""
        if not self.main:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if self._board:
                self._board.add_scalar(name, value, step)
        for tracker in self._trackers:
            tracker.log(values, step=step)
        told = "  ".join(f"{name} {values[name]:.4g}" for name in ("loss", "loss/text", "loss/image") if name in values)
        if self._progress:
            self._progress.update(self._task, description=told)
        elif told:
            pace = (time.monotonic() - self._began) / max(1, step - self.first)
            left = int(pace * (self.total - step))
            self.say(f"step {step}/{self.total}  {told}  {1000 * pace:.0f} ms/step  left {left // 60}:{left % 60:02d}")

    def quarantine(self, bad: list[BadRecord]) -> int:
        """Write samples not yet known as bad; returns how many are known now."""
        if not self.main:
            return 0
        fresh = [item for item in bad if (item.shard, item.key) not in self._quarantined]
        if fresh:
            with (self.run / "quarantine.jsonl").open("a") as file:
                file.writelines(json.dumps(item.as_dict()) + "\n" for item in fresh)
            self._quarantined |= {(item.shard, item.key) for item in fresh}
            first = fresh[0]
            self.say(f"skipped {len(fresh)} bad sample(s), first {first.shard}/{first.key}: {first.reason}")
        return len(self._quarantined)

    def event(self, file: str, record: dict[str, Any]) -> None:
        """Append a rare record to a file of its own."""
        if self.main:
            with (self.run / file).open("a") as opened:
                opened.write(json.dumps(record) + "\n")

    def rewind(self, step: int) -> None:
        """Forget the records after `step`: the run goes back to it."""
        if self.main:
            self._file.close()
            _keep(self.metrics, step)
            self._file = self.metrics.open("a")

    def close(self) -> None:
        """Flush and stop."""
        if not self.main:
            return
        self._file.close()
        for tracker in self._trackers:
            tracker.finish()
        if self._board:
            self._board.close()
        if self._progress:
            self._progress.stop()


def _tracker(name: str, config: Config) -> Any:
    """A run of W&B or trackio (which have the same calls), continued where one of this folder's name exists."""
    try:
        package = importlib.import_module(name)
    except ImportError:
        raise ValueError(f"train.trackers names {name}, which is not installed: pip install {name}") from None
    settings = config.model_dump(mode="json")
    resume = "allow"
    return package.init(project="mmgen", name=config.run.dir.name, config=settings, resume=resume)


def _lines(path: Path) -> list[dict[str, Any]]:
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:  # cut short by a crash
            continue
    return records


def _keep(path: Path, last: int) -> None:
    """Drop records of steps after `last`, and a line cut short by a crash."""
    if not path.exists():
        return
    kept = [json.dumps(record) + "\n" for record in _lines(path) if record["step"] <= last]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)
