"""A line on standard error whenever a command has printed nothing for ten seconds, also while libraries load."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from mmgen.train.heartbeat import Heartbeat


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


@contextmanager
def pulse(label: str) -> Iterator[None]:
    """Inside the block, print `LABEL: N s so far` whenever nothing was written to standard output or error."""
    out, err = sys.stdout, sys.stderr
    beat = Heartbeat(lambda line: print(line, file=err, flush=True)).start()
    beat.begin(label)
    sys.stdout, sys.stderr = Noted(out, beat.touch), Noted(err, beat.touch)  # type: ignore[assignment]
    try:
        yield
    finally:
        beat.close()
        sys.stdout, sys.stderr = out, err
