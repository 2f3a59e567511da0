"""What a run writes: metrics.jsonl, TensorBoard, trackers, quarantine.jsonl, and progress lines for people."""

from __future__ import annotations

import importlib
import json
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mmgen.config import Config
from mmgen.data.shards.samples import BadRecord
from mmgen.train.heartbeat import Clock, Heartbeat, duration

PACE_STEPS = 100
"""Steps over which the time per step is averaged."""
FIRST_PACE = 2.0
"""Seconds of measured steps after which the first line with the time to go is printed."""


class Sink(Protocol):
    """A destination of the metrics of logged steps."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write the metrics of a step."""

    def finish(self) -> None:
        """Flush and stop."""


class Log:
    """Writes a run's records and prints its lines.

    `first` is the step of the checkpoint that the run continues from: records of later steps are removed, so that no
    step has two. Only the `main` process writes and prints.
    """

    def __init__(self, config: Config, first: int, main: bool = True, heartbeat: Heartbeat | None = None) -> None:
        self.run, self.first, self.main = config.run.dir, first, main
        self.heartbeat = heartbeat or Heartbeat()
        self._sinks = _sinks(config, first) if main else []
        self._display = Display(first, config.train.steps, quiet=not main)
        self.heartbeat.write = self._display.print
        self._quarantined = {(bad["shard"], bad["key"]) for bad in _lines(self.run / "quarantine.jsonl")}

    def print(self, message: str) -> None:
        """Print one line for people, from the main process only."""
        self.heartbeat.touch()
        self._display.print(message)

    def advance(self, step: int) -> None:
        """Count a step, and move the progress bar."""
        self._display.advance(step)

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        """Print the losses and the time to go of a step that is not logged, if a line is due."""
        # Earlier than the heartbeat, so that steps of up to three seconds print losses and not their phase.
        if self.heartbeat.quiet >= 0.7 * self.heartbeat.every or self._display.first_pace_due:
            self.heartbeat.touch()
            self._display.show(step, values)

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Write the metrics of one logged step everywhere, and print its losses."""
        for sink in self._sinks:
            sink.log(values, step=step)
        self.heartbeat.touch()
        self._display.show(step, values)

    def quarantine(self, bad: Sequence[BadRecord]) -> int:
        """Append new bad samples to quarantine.jsonl; returns how many the file holds (0 in other processes)."""
        if not self.main:
            return 0
        fresh = [item for item in bad if (item.shard, item.key) not in self._quarantined]
        if fresh:
            with (self.run / "quarantine.jsonl").open("a") as file:
                file.writelines(json.dumps(item.as_dict()) + "\n" for item in fresh)
            self._quarantined |= {(item.shard, item.key) for item in fresh}
            first = fresh[0]
            self.print(f"skipped {len(fresh)} bad sample(s), such as {first.shard}/{first.key}: {first.reason}")
        return len(self._quarantined)

    def event(self, file: str, record: Mapping[str, object]) -> None:
        """Append a rare record, such as a skipped step, to a file of its own."""
        if self.main:
            with (self.run / file).open("a") as opened:
                opened.write(json.dumps(record) + "\n")

    def rewind(self, step: int) -> None:
        """Remove the records after `step`, because the run goes back to it."""
        for sink in self._sinks:
            if isinstance(sink, MetricsFile):
                sink.rewind(step)

    def close(self) -> None:
        """Flush all records and stop."""
        for sink in self._sinks:
            sink.finish()
        self._display.close()


class Display:
    """Lines for people on standard error, and a progress bar if that is a terminal."""

    def __init__(self, first: int, total: int, quiet: bool, clock: Clock = time.monotonic) -> None:
        self.first, self.total = first, total
        # No markup: a sample's name may contain brackets.
        self._console = Console(stderr=True, markup=False, quiet=quiet)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self._console)
        self._task = self._bar.add_task("training", total=total, completed=first)
        self._clock, self._began = clock, clock()
        self._ends: deque[float] = deque(maxlen=PACE_STEPS + 1)
        """When the last steps ended."""
        self._paced = False
        if self._console.is_terminal and not quiet:
            self._bar.start()

    def print(self, message: str) -> None:
        """Print one line."""
        self._console.print(message, highlight=False, soft_wrap=True)

    def advance(self, step: int) -> None:
        """Count a step, and move the progress bar."""
        self._ends.append(self._clock())
        self._bar.update(self._task, completed=step)

    @property
    def pace(self) -> float | None:
        """Seconds per step, from the end of the first step on (which may compile); None before a second one ended."""
        if len(self._ends) < 2:
            return None
        return (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)

    @property
    def first_pace_due(self) -> bool:
        """Whether the first line with the time to go can be printed: enough time was measured."""
        return not self._paced and bool(self._ends) and self._ends[-1] - self._ends[0] >= FIRST_PACE

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Print the losses of a step, if it has any: next to the bar, or in a line with the time to go."""
        names = [name for name in ("loss", "loss/text", "loss/image") if name in values]
        losses = "  ".join(f"{name} {values[name]:.4g}" for name in names)
        if self._bar.live.is_started:
            self._bar.update(self._task, description=losses)
        elif losses:
            self.print(f"step {step}/{self.total}  {losses}  {self._timing(step)}")

    def _timing(self, step: int) -> str:
        if self.pace is None:
            return f"first step took {duration(self._clock() - self._began)}"
        self._paced = True
        return f"{1000 * self.pace:.0f} ms/step  {duration(self.pace * (self.total - step))} to go"

    def close(self) -> None:
        """Stop the bar."""
        if self._bar.live.is_started:
            self._bar.stop()


class MetricsFile:
    """metrics.jsonl: one JSON object per logged step or validation."""

    def __init__(self, path: Path, first: int) -> None:
        self.path = path
        _keep(path, first)
        self._file = path.open("a")

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Append a line."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def rewind(self, step: int) -> None:
        """Remove lines after `step`."""
        self._file.close()
        _keep(self.path, step)
        self._file = self.path.open("a")

    def finish(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """The run's folder of TensorBoard events; events of steps after `first` are hidden."""

    def __init__(self, folder: Path, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first + 1)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write one scalar per metric."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        """Flush and close."""
        self._writer.close()


def _sinks(config: Config, first: int) -> list[Sink]:
    run, settings = config.run.dir, config.train
    sinks: list[Sink] = [MetricsFile(run / "metrics.jsonl", first)]
    if settings.tensorboard:
        sinks.append(TensorBoard(run / "tensorboard", first))
    return sinks + [_tracker(name, config) for name in settings.trackers]


def _tracker(name: str, config: Config) -> Sink:
    """A run of W&B or trackio, which have the same calls; a run with this folder's name is continued."""
    try:
        package = importlib.import_module(name)
    except ImportError:
        raise ValueError(f"train.trackers names {name}, which is not installed: pip install {name}") from None
    settings = config.model_dump(mode="json")
    return cast(Sink, package.init(project="mmgen", name=config.run.dir.name, config=settings, resume="allow"))


def _lines(path: Path) -> Iterator[Any]:
    """The records of a file of JSON lines, without a line that a crash cut short."""
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def _keep(path: Path, last: int) -> None:
    """Remove records of steps after `last`, and a line that a crash cut short."""
    if not path.exists():
        return
    kept = [json.dumps(record) + "\n" for record in _lines(path) if record["step"] <= last]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)
