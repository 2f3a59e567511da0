"""Progress lines: long phases, steps with the time to go, and the warning about other programs."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from mmgen.config import Config
from mmgen.train import heartbeat, log
from mmgen.train.guard import Watchdog
from mmgen.train.heartbeat import Heartbeat, MachineLoad, Usage, duration
from mmgen.train.loop import train


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_long_phase_prints_a_line_every_ten_seconds() -> None:
    clock, lines = Clock(), list[tuple[float, str]]()
    beat = Heartbeat(lambda line: lines.append((clock.now, line)), clock=clock)
    beat.begin("building the model")
    for second in range(1, 36):
        clock.now = float(second)
        if second == 25:
            beat.touch()  # another line was printed
        beat.check()
    assert lines == [
        (10.0, "building the model: 10 s so far"),
        (20.0, "building the model: 20 s so far"),
        (35.0, "building the model: 35 s so far"),
    ]


def test_a_phase_starts_its_own_time_and_count() -> None:
    clock, lines = Clock(), list[str]()
    beat = Heartbeat(lines.append, clock=clock)
    beat.begin("validation of step 5")
    beat.count("12 batches")
    clock.now = 11.0
    beat.check()
    watchdog = Watchdog(1e9, rank=0, heartbeat=beat)
    watchdog.phase("forward", 6)
    watchdog.close()
    clock.now = 25.0
    beat.check()
    assert lines == ["validation of step 5: 12 batches, 11 s so far", "forward pass of step 6: 14 s so far"]


def test_a_thread_checks_until_it_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    beat = Heartbeat(lines.append, every=0.0)
    waits = iter([False, False, True])
    monkeypatch.setattr(beat._stop, "wait", lambda seconds: next(waits))
    beat._run()
    assert len(lines) == 2
    beat.close()
    assert beat._stop.is_set()


def test_durations_in_words() -> None:
    assert [duration(s) for s in (0.4, 59.9, 61, 3599, 3600, 12000)] == [
        "0 s", "59 s", "1 min 1 s", "59 min 59 s", "1 h 0 min", "3 h 20 min",
    ]  # fmt: skip


def display(clock: Clock, total: int = 100) -> tuple[log.Display, list[str]]:
    lines: list[str] = []
    shown = log.Display(0, total, quiet=False, clock=clock)
    shown._console = Console(quiet=True)
    shown.print = lines.append
    return shown, lines


def test_the_time_to_go_is_measured_after_the_first_step() -> None:
    """The first step, which compiles, takes 30 seconds; the others take half a second each."""
    clock = Clock()
    shown, lines = display(clock)
    clock.now = 30.0
    shown.advance(1)
    shown.show(1, {"loss": 2.0})
    for step in range(2, 5):
        clock.now += 0.5
        shown.advance(step)
        assert not shown.first_pace_due
    clock.now += 0.5
    shown.advance(5)
    assert shown.first_pace_due, "two seconds of steps are measured"
    shown.show(5, {"loss": 1.5, "lr": 1e-3})
    assert not shown.first_pace_due
    assert lines == [
        "step 1/100  loss 2  first step took 30 s",
        "step 5/100  loss 1.5  500 ms/step  47 s to go",
    ]


def test_the_pace_is_that_of_the_last_steps() -> None:
    clock = Clock()
    shown, _ = display(clock, total=10_000)
    for step in range(1, 1000):
        clock.now += 1.0 if step < 500 else 0.1
        shown.advance(step)
    assert shown.pace == pytest.approx(0.1)


def test_steps_that_are_not_logged_print_a_line_if_none_was_printed(config: Config) -> None:
    clock, lines = Clock(), list[tuple[float, str]]()
    config.run.dir.mkdir(parents=True)
    opened = log.Log(config, 0, heartbeat=Heartbeat(clock=clock))
    opened._display, shown = display(clock)
    opened._display.print = lambda line: lines.append((clock.now, line))
    for step in range(1, 31):
        clock.now = float(step)
        opened.advance(step)
        opened.progress(step, {"loss": 1.0})
    opened.close()
    assert [when for when, _ in lines] == [3.0, 10.0, 17.0, 24.0], "then every seven seconds"
    assert lines[0][1] == "step 3/100  loss 1  1000 ms/step  1 min 37 s to go"


def machine(*readings: Usage | None) -> tuple[MachineLoad, Clock]:
    clock, left = Clock(), list(readings)
    return MachineLoad(lambda: left.pop(0), clock), clock


def test_other_programs_on_a_saturated_machine_are_reported() -> None:
    """In 20 seconds of 2 processors: 1 second idle, 22 of this run, 17 of other programs."""
    load, clock = machine(Usage(100, 50, 10, 2), Usage(140, 51, 32, 2), Usage(180, 52, 54, 2), Usage(740, 53, 300, 2))
    clock.now = 19.0
    assert load.warning() is None, "the window has not ended"
    clock.now = 20.0
    warning = load.warning()
    assert warning is not None
    assert "other programs used 42% of its 2 processors in the last 20 s" in warning
    clock.now = 40.0
    assert load.warning() is None, "it was reported less than five minutes before"
    clock.now = 330.0
    assert load.warning() is not None


@pytest.mark.parametrize(
    ("after", "why"),
    [
        (Usage(140, 60, 20, 2), "processors are idle: other programs slow nothing"),
        (Usage(140, 50, 48, 2), "this run uses almost all processors itself"),
        (Usage(100, 50, 10, 2), "the counters do not change"),
        (None, "the system does not report its use"),
    ],
)
def test_an_undisturbed_run_gets_no_warning(after: Usage | None, why: str) -> None:
    load, clock = machine(Usage(100, 50, 10, 2), after)
    clock.now = 20.0
    assert load.warning() is None, why


def test_usage_is_read_from_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three processors may be used; process 10 is this one, 11 and 12 descend from it, 13 does not."""
    monkeypatch.setattr(heartbeat.os, "sched_getaffinity", lambda process: {0, 2})
    monkeypatch.setattr(heartbeat.os, "sysconf", lambda name: 100)
    monkeypatch.setattr(heartbeat.os, "getpid", lambda: 10)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    lines = ["cpu  9 9 9 9 9 9 9 9", *(f"cpu{n} 100 0 50 800 20 0 10 20 5 5" for n in range(3)), "intr 1"]
    (tmp_path / "stat").write_text("\n".join(lines))
    for process, parent, ticks in ((10, 1, 300), (11, 10, 40), (12, 11, 5), (13, 1, 7000)):
        (tmp_path / str(process)).mkdir()
        fields = f"{process} (a name) with) S {parent} 0 0 0 0 0 0 0 0 0 {ticks} 1 2 3 20 0"
        (tmp_path / str(process) / "stat").write_text(fields)
    assert heartbeat.usage(tmp_path) == Usage(total=20.0, idle=16.4, own=3.63, processors=2)
    assert heartbeat.usage(tmp_path / "none") is None


def test_training_prints_phases_steps_and_validation(
    config: Config, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases: list[str] = []
    begin = Heartbeat.begin
    monkeypatch.setattr(Heartbeat, "begin", lambda self, phase: (phases.append(phase), begin(self, phase))[1])
    assert train(config) == 0
    assert phases[:5] == [
        "starting the processes", "verifying the newest checkpoint", "reading the autoencoder and its statistics",
        "indexing shards and planning their order", "building the model",
    ]  # fmt: skip
    assert {
        "loading weights",
        "forward pass of step 1",
        "writing the checkpoint of step 3",
        "validation of step 6",
    } <= {*phases}
    printed = capsys.readouterr().err
    assert "step 1/6  loss" in printed
    assert "first step took" in printed
    assert "to go" in printed
    assert "validation of step 6: loss/text" in printed
