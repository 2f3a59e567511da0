"""What keeps a long run alive or ends it with a reason: signals, a watchdog, space checks, spikes."""

from __future__ import annotations

import faulthandler
import os
import shutil
import signal
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from mmgen.config import Config

INTERRUPTED = 75
"""Exit code after SIGINT, SIGTERM or SIGUSR1: a checkpoint was written and the same command continues (EX_TEMPFAIL)."""
HUNG = 70
"""Exit code of a process whose watchdog saw a phase last longer than `train.timeout` (EX_SOFTWARE)."""
SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """A list that receives the signals that ask for a save; a second SIGINT acts at once."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Watchdog:
    """Ends this process when one phase of a step lasts too long, naming rank, phase and step, with all stacks.

    The other ranks then end by themselves: their next message fails or times out. `end` ends the process with an exit
    code; the default does so at once, as a normal exit would wait for what hangs.
    """

    def __init__(self, timeout: float, rank: int, end: Callable[[int], object] = os._exit) -> None:
        self.timeout, self.rank, self.end = timeout, rank, end
        self._now: tuple[str, int, float] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def phase(self, name: str, step: int) -> None:
        """A phase of a step begins: data, forward, backward, step, save or sample."""
        self._now = (name, step, time.monotonic())

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.timeout / 4)):
            now = self._now
            if now is not None and time.monotonic() - now[2] > self.timeout:
                self.report(now)

    def report(self, now: tuple[str, int, float]) -> None:
        """Name what hangs, and end the process."""
        name, step, _ = now
        message = (
            f"mmgen: rank {self.rank} hangs in {name} of step {step} for more than {self.timeout:g} s (train.timeout)"
        )
        print(message, file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        self.end(HUNG)

    def close(self) -> None:
        """Stop watching."""
        self._stop.set()


class Spikes:
    """Finds losses that jump above their recent median."""

    def __init__(self, factor: float, memory: int = 64) -> None:
        self.factor = factor
        self._recent: deque[float] = deque(maxlen=memory)

    def seen(self, loss: float) -> float | None:
        """The median of recent losses where `loss` is a spike above it, else None; the first steps never are."""
        median = statistics.median(self._recent) if len(self._recent) >= self._recent.maxlen // 4 else None  # type: ignore[operator]
        if median is not None and loss > self.factor * median:
            return median
        self._recent.append(loss)
        return None


def check_space(config: Config, state_bytes: int, step_bytes: int) -> None:
    """Refuse to start where checkpoints cannot fit on the disk, or loader workers cannot pass on their batches.

    `state_bytes`: one checkpoint; `step_bytes`: one step's batches of this process.

    Raises:
        ValueError: too little room; the message says how much is needed and where.
    """
    place = config.run.dir
    while not place.exists():
        place = place.parent
    needed = 2 * state_bytes  # the newest one stays until the next is whole
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ValueError(
            f"{place} has {free / 1e9:.2f} GB free, two checkpoints need {needed / 1e9:.2f} GB: "
            "free some, or choose another run.dir"
        )
    shared = Path("/dev/shm")
    ahead = 4 * config.data.workers * step_bytes
    if shared.exists() and config.data.workers and shutil.disk_usage(shared).free < ahead:
        raise ValueError(
            f"{shared} has {shutil.disk_usage(shared).free / 1e6:.0f} MB free, {config.data.workers} loader workers "
            f"need about {ahead / 1e6:.0f} MB: enlarge it (docker run --shm-size), or lower data.workers"
        )
