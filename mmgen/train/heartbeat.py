"""A line at least every ten seconds in any long phase, and a warning when other programs slow the machine."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Self

EVERY = 10.0
"""Seconds without a printed line after which the running phase is printed."""
WINDOW = 20.0
"""Seconds over which the use of the machine is measured."""
PAUSE = 300.0
"""Seconds between two warnings about other programs."""
SATURATED = 0.9
"""Share of the processors in use, above which other programs can slow the run."""
SHARE = 0.2
"""Share of the processors used by other programs, above which a warning is printed."""

Clock = Callable[[], float]


class Heartbeat:
    """Prints the running phase and its duration whenever nothing has been printed for `every` seconds.

    `begin` names the phase that starts; `touch` records that a line was printed. A thread started by `start` calls
    `check` every second. `write` prints a line, by default on standard error.
    """

    def __init__(
        self,
        write: Callable[[str], None] | None = None,
        every: float = EVERY,
        load: MachineLoad | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self.write = write or _print
        self.every, self._load, self._clock = every, load, clock
        self._phase, self._count, self._began = "starting", "", clock()
        self._last = self._began
        self._stop = threading.Event()

    def begin(self, phase: str) -> None:
        """A phase begins, and the previous one ends."""
        self._phase, self._count, self._began = phase, "", self._clock()

    def count(self, done: str) -> None:
        """How much of the phase is done, such as `12 batches`."""
        self._count = f"{done}, "

    def touch(self) -> None:
        """A line was printed."""
        self._last = self._clock()

    @property
    def quiet(self) -> float:
        """Seconds since a line was printed."""
        return self._clock() - self._last

    def check(self) -> None:
        """Print the phase and the warning, if they are due."""
        if self.quiet >= self.every:
            self.touch()
            self.write(f"{self._phase}: {self._count}{duration(self._clock() - self._began)} so far")
        if self._load is not None and (warning := self._load.warning()):
            self.write(warning)

    def start(self) -> Self:
        """Check every second in a thread until `close`."""
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()
        return self

    def _run(self) -> None:
        while not self._stop.wait(1.0):
            self.check()

    def close(self) -> None:
        """Stop checking."""
        self._stop.set()


def duration(seconds: float) -> str:
    """Seconds in words: `45 s`, `10 min 5 s`, `3 h 20 min`."""
    minutes, rest = divmod(int(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


class Usage(NamedTuple):
    """Processor time in seconds since the machine started, over the processors that this process may use."""

    total: float
    idle: float
    own: float
    """Of this run: this process, its children, and the other ranks on this machine."""
    processors: int


class MachineLoad:
    """Measures how much processor time other programs use, and warns when they slow this run.

    A warning needs processors that are almost all in use, because programs on idle processors slow nothing.
    `read` returns the usage so far, or None where the system does not report it.
    """

    def __init__(self, read: Callable[[], Usage | None] | None = None, clock: Clock = time.monotonic) -> None:
        self._read, self._clock = read or usage, clock
        self._before, self._since = self._read(), clock()
        self._warned = -PAUSE

    def warning(self) -> str | None:
        """A line for people if other programs slowed the machine during the last window, else None."""
        now = self._clock()
        seconds = now - self._since
        if seconds < WINDOW:
            return None
        before, after = self._before, self._read()
        self._before, self._since = after, now
        if before is None or after is None or after.total <= before.total:
            return None
        total = after.total - before.total
        used = 1 - (after.idle - before.idle) / total
        others = used - (after.own - before.own) / total
        if used < SATURATED or others < SHARE or now - self._warned < PAUSE:
            return None
        self._warned = now
        return (
            f"this machine is busy: other programs used {others:.0%} of its {after.processors} processors in the last "
            f"{seconds:.0f} s, which slows this run"
        )


def usage(proc: Path = Path("/proc")) -> Usage | None:
    """Processor time so far, from Linux's /proc; None on other systems."""
    try:
        allowed = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        lines = [line.split() for line in (proc / "stat").read_text().splitlines()]
        tick = os.sysconf("SC_CLK_TCK")
        # user, nice, system, idle, iowait, irq, softirq, steal: time that a hypervisor took counts as used by others.
        times = [[int(value) for value in line[1:9]] for line in lines if line and line[0] in allowed]
        root = os.getppid() if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1 else os.getpid()
        own = _tree_ticks(proc, root)
    except (OSError, ValueError, IndexError, AttributeError):
        return None
    return Usage(sum(map(sum, times)) / tick, sum(t[3] + t[4] for t in times) / tick, own / tick, len(times))


def _tree_ticks(proc: Path, root: int) -> int:
    """Clock ticks that a process and all its descendants have used."""
    ticks: dict[int, int] = {}
    children: dict[int, list[int]] = defaultdict(list)
    for folder in proc.iterdir():
        if folder.name.isdecimal():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # the process ended meanwhile
            children[int(fields[1])].append(int(folder.name))
            ticks[int(folder.name)] = sum(int(value) for value in fields[11:15])  # with children that ended
    total, pending = 0, [root]
    while pending:
        process = pending.pop()
        total += ticks.get(process, 0)
        pending += children[process]
    return total


def _print(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
