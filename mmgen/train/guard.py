"""Guards of a long run: signals that save and stop it, a watchdog for hangs, disk space, loss spikes."""

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
from mmgen.train.heartbeat import Heartbeat

INTERRUPTED = 75
"""Exit code after SIGINT, SIGTERM or SIGUSR1: a checkpoint is written; the same command continues (EX_TEMPFAIL)."""
HUNG = 70
"""Exit code of a process in which a phase lasted longer than `train.timeout` (EX_SOFTWARE)."""
PHASES = {
    "data": "loading the data",
    "forward": "forward pass",
    "backward": "backward pass",
    "step": "optimiser step",
    "save": "writing the checkpoint",
    "sample": "samples and validation",
}
"""Phases of a step, as progress lines name them."""
SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Inside the block, signals that ask for a save are appended to the list; a second SIGINT stops at once."""
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
    """Ends this process when one phase of a step lasts too long, after printing rank, phase, step and all stacks.

    The other ranks then exit too, because their next message fails or times out. `end` ends the process with an exit
    code. Its default skips all cleanup, because a normal exit would wait for the thread that hangs.
    """

    def __init__(
        self,
        timeout: float,
        rank: int,
        end: Callable[[int], object] = os._exit,
        heartbeat: Heartbeat | None = None,
    ) -> None:
        self.timeout, self.rank, self.end, self.heartbeat = timeout, rank, end, heartbeat
        self._now: tuple[str, int, float] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def phase(self, name: str, step: int) -> None:
        """A phase of a step begins: data, forward, backward, step, save or sample."""
        self._now = (name, step, time.monotonic())
        if self.heartbeat is not None:
            self.heartbeat.begin(f"{PHASES.get(name, name)} of step {step}")

    def restart(self) -> None:
        """The present phase makes progress: its time counts from now."""
        if self._now is not None:
            self._now = (*self._now[:2], time.monotonic())

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.timeout / 4)):
            now = self._now
            if now is not None and time.monotonic() - now[2] > self.timeout:
                self.report(now)

    def report(self, now: tuple[str, int, float]) -> None:
        """Print which phase hangs, and end the process."""
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
    """Detects losses that jump above their recent median."""

    def __init__(self, factor: float, memory: int = 64) -> None:
        self.factor = factor
        self._recent: deque[float] = deque(maxlen=memory)
        self._least = memory // 4
        """Losses that are needed for a median."""

    def seen(self, loss: float) -> float | None:
        """The median of recent losses if `loss` is a spike above it, else None; the first steps are never spikes."""
        median = statistics.median(self._recent) if len(self._recent) >= self._least else None
        if median is not None and loss > self.factor * median:
            return median
        self._recent.append(loss)
        return None


def check_space(config: Config, state_bytes: int, step_bytes: int) -> None:
    """Check that the disk has room for checkpoints, and shared memory for the batches of loader workers.

    `state_bytes` is the size of one checkpoint, `step_bytes` the size of this process's batches of one step.

    Raises:
        ValueError: there is too little room; the message names the folder and the bytes that are needed.
    """
    folder = config.run.dir
    while not folder.exists():
        folder = folder.parent
    needed = 2 * state_bytes  # the newest checkpoint is kept until the next one is complete
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{folder} has {free / 1e9:.2f} GB free, but two checkpoints need {needed / 1e9:.2f} GB: "
            "free some space, or choose another run.dir"
        )
    shared = Path("/dev/shm")
    ahead = 4 * config.data.workers * step_bytes
    if shared.exists() and config.data.workers and shutil.disk_usage(shared).free < ahead:
        raise ValueError(
            f"{shared} has {shutil.disk_usage(shared).free / 1e6:.0f} MB free, but {config.data.workers} loader "
            f"workers need about {ahead / 1e6:.0f} MB: enlarge it (docker run --shm-size), or lower data.workers"
        )
