"""A line on standard error whenever a command has printed nothing for ten seconds, also while libraries load."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

EVERY = 10.0
"""Seconds without output after which a line is printed."""


class Noted:
    """A text stream that calls a function at each write."""

    def __init__(self, stream: TextIO, note: Callable[[], None]) -> None:
        self._stream, self._note = stream, note

    def write(self, text: str) -> int:
        """Write text."""
        self._note()
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Pulse:
    """Prints `LABEL: N s so far` when nothing was written for `EVERY` seconds; `check` is called every second."""

    def __init__(self, label: str, write: Callable[[str], object], clock: Callable[[], float] = time.monotonic) -> None:
        self.label, self.write, self.clock = label, write, clock
        self.began = self.last = clock()

    def note(self) -> None:
        """Record that something was written."""
        self.last = self.clock()

    def check(self) -> None:
        """Print a line if it is due."""
        now = self.clock()
        if now - self.last >= EVERY:
            self.last = now
            self.write(f"{self.label}: {now - self.began:.0f} s so far\n")


@contextmanager
def pulse(label: str) -> Iterator[None]:
    """Inside the block, print a line whenever nothing was written to standard output or error for ten seconds."""
    out, err = sys.stdout, sys.stderr
    beat, done = Pulse(label, err.write), threading.Event()

    def watch() -> None:
        while not done.wait(1.0):
            beat.check()

    sys.stdout, sys.stderr = Noted(out, beat.note), Noted(err, beat.note)  # type: ignore[assignment]
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()
        sys.stdout, sys.stderr = out, err
