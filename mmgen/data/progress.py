"""Progress of a long phase: a line at least every ten seconds, with count, total and minutes to go."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
Log = Callable[[str], None]
"""Called with one line for people."""
INTERVAL = 10.0
"""Seconds between two lines."""


def to_stderr(line: str) -> None:
    """Print one line on standard error; with several processes on a machine, from the first one alone."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


class Progress:
    """Reports how far a phase is: `indexing: 3 of 20 shards, 4 minutes to go`.

    Used as a context manager. A thread writes the lines, so that they also come while a single item takes long. The
    last line comes at the end of the phase; with `quiet`, only if the phase took longer than `INTERVAL`.
    """

    def __init__(
        self, label: str, unit: str, total: int | None = None, log: Log = to_stderr, quiet: bool = False, done: int = 0
    ) -> None:
        self.label, self.unit, self.total, self.log, self.quiet = label, unit, total, log, quiet
        self.done = self._first = done
        """Items that are finished; set by the phase."""
        self.detail: Callable[[], str] = lambda: ""
        """Further text for each line."""
        self._reported = False
        self._end = threading.Event()
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._repeat, daemon=True)

    def __enter__(self) -> Progress:
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._end.set()
        self._thread.join()
        if kind is None and (self._reported or not self.quiet):
            self.log(self.line())

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """The items, each counted once the next one is requested."""
        for item in items:
            yield item
            self.done += 1

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """The items, counted, as a phase of their own."""
        with self:
            yield from self.each(items)

    def line(self) -> str:
        """The present state in words."""
        count = f"{self.done}" if self.total is None else f"{self.done} of {self.total}"
        detail = self.detail()
        return f"{self.label}: {count} {self.unit}" + (f" ({detail})" if detail else "") + self._to_go()

    def _to_go(self) -> str:
        if self.total is None or not self._first < self.done < self.total:
            return ""
        pace = (time.monotonic() - self._began) / (self.done - self._first)
        minutes = round(pace * (self.total - self.done) / 60)
        return f", {minutes} minute{'s' if minutes > 1 else ''} to go" if minutes else ", less than a minute to go"

    def _repeat(self) -> None:
        while not self._end.wait(INTERVAL):
            self._reported = True
            self.log(self.line())
