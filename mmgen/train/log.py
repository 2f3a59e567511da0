"""A run's records: metrics.jsonl, TensorBoard, trackers, quarantine.jsonl, and a progress line."""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mmgen.config import Config
from mmgen.data.shards.samples import BadRecord


class Sink(Protocol):
    """Where the metrics of logged steps go."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take the metrics of a step."""

    def finish(self) -> None:
        """Flush and stop."""


class Log:
    """Writes a run's records. On resume, lines past the checkpoint are dropped, so that no step has two.

    A process that is not the `main` one writes nothing.
    """

    def __init__(self, config: Config, first: int, main: bool = True) -> None:
        self.run, self.first, self.main = config.run.dir, first, main
        self._sinks = _sinks(config, first) if main else []
        self._display = Display(first, config.train.steps, quiet=not main)
        self._quarantined = {(bad["shard"], bad["key"]) for bad in _lines(self.run / "quarantine.jsonl")}

    def say(self, message: str) -> None:
        """One line for people, from one process only."""
        self._display.say(message)

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        self._display.advance(step)

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Write one logged step everywhere."""
        for sink in self._sinks:
            sink.log(values, step=step)
        self._display.show(step, values)

    def quarantine(self, bad: Sequence[BadRecord]) -> int:
        """Write samples not yet known as bad; returns how many are known now (0 where this is not the main process)."""
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

    def event(self, file: str, record: Mapping[str, object]) -> None:
        """Append a rare record to a file of its own."""
        if self.main:
            with (self.run / file).open("a") as opened:
                opened.write(json.dumps(record) + "\n")

    def rewind(self, step: int) -> None:
        """Forget the records after `step`: the run goes back to it."""
        for sink in self._sinks:
            if isinstance(sink, MetricsFile):
                sink.rewind(step)

    def close(self) -> None:
        """Flush and stop."""
        for sink in self._sinks:
            sink.finish()
        self._display.close()


class Display:
    """Lines for people on standard error, and a progress bar where that is a terminal."""

    def __init__(self, first: int, total: int, quiet: bool) -> None:
        self.first, self.total = first, total
        self._console = Console(stderr=True, markup=False, quiet=quiet)  # names of samples are no markup
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self._console)
        self._task = self._bar.add_task("training", total=total, completed=first)
        self._began = time.monotonic()
        if self._console.is_terminal and not quiet:
            self._bar.start()

    def say(self, message: str) -> None:
        """One line."""
        self._console.print(message, highlight=False, soft_wrap=True)

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        self._bar.update(self._task, completed=step)

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """The losses of a step, where it has some: beside the bar, or in a line of their own."""
        names = [name for name in ("loss", "loss/text", "loss/image") if name in values]
        losses = "  ".join(f"{name} {values[name]:.4g}" for name in names)
        if self._bar.live.is_started:
            self._bar.update(self._task, description=losses)
        elif losses:
            pace = (time.monotonic() - self._began) / max(1, step - self.first)
            minutes, seconds = divmod(int(pace * (self.total - step)), 60)
            self.say(f"step {step}/{self.total}  {losses}  {1000 * pace:.0f} ms/step  left {minutes}:{seconds:02d}")

    def close(self) -> None:
        """Stop the bar."""
        if self._bar.live.is_started:
            self._bar.stop()


class MetricsFile:
    """metrics.jsonl: one object per logged step."""

    def __init__(self, path: Path, first: int) -> None:
        self.path = path
        _keep(path, first)
        self._file = path.open("a")

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Append a line."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def rewind(self, step: int) -> None:
        """Drop lines after `step`."""
        self._file.close()
        _keep(self.path, step)
        self._file = self.path.open("a")

    def finish(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """The run's folder of TensorBoard events; those of steps after `first` are hidden."""

    def __init__(self, folder: Path, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first + 1)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """One scalar per metric."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        """Flush and close."""
        self._writer.close()


def _sinks(config: Config, first: int) -> list[Sink]:
    run, settings = config.run.dir, config.train
    found: list[Sink] = [MetricsFile(run / "metrics.jsonl", first)]
    if settings.tensorboard:
        found.append(TensorBoard(run / "tensorboard", first))
    return found + [_tracker(name, config) for name in settings.trackers]


def _tracker(name: str, config: Config) -> Sink:
    """A run of W&B or trackio (which have the same calls), continued where one of this folder's name exists."""
    try:
        package = importlib.import_module(name)
    except ImportError:
        raise ValueError(f"train.trackers names {name}, which is not installed: pip install {name}") from None
    settings = config.model_dump(mode="json")
    return cast(Sink, package.init(project="mmgen", name=config.run.dir.name, config=settings, resume="allow"))


def _lines(path: Path) -> Iterator[Any]:
    """The records of a file of JSON lines, without those cut short by a crash."""
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def _keep(path: Path, last: int) -> None:
    """Drop records of steps after `last`, and a line cut short by a crash."""
    if not path.exists():
        return
    kept = [json.dumps(record) + "\n" for record in _lines(path) if record["step"] <= last]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)
