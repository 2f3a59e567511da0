"""Progress lines: one at least every interval, also while a single item takes long, with an estimate of the rest."""

from __future__ import annotations

import time

import pytest

from mmgen.config import Config
from mmgen.data import progress
from mmgen.data.progress import Progress
from mmgen.data.tools.check import CheckOptions, check
from mmgen.data.tools.check_streams import check_streams
from mmgen.sequence.tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def _short_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "INTERVAL", 0.05)


def test_one_long_item_is_reported_repeatedly() -> None:
    lines: list[str] = []
    with Progress("indexing", "shards", 20, lines.append) as running:
        running.done = 3
        time.sleep(0.3)
    assert len(lines) >= 3
    assert lines[0] == "indexing: 3 of 20 shards, less than a minute to go"


def test_minutes_to_go_follow_from_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    running = Progress("decoding", "samples", 1000, done=400)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    running._began = 0.0
    assert running.line() == "decoding: 400 of 1000 samples", "no estimate before the first new item"
    running.done, clock[0] = 500, 60.0
    assert running.line() == "decoding: 500 of 1000 samples, 5 minutes to go"
    running.done = 800
    running.detail = lambda: "error 0.1"
    assert running.line() == "decoding: 800 of 1000 samples (error 0.1), less than a minute to go"
    running.done = 1000
    assert running.line() == "decoding: 1000 of 1000 samples (error 0.1)"


def test_an_unknown_total_gives_a_count_alone() -> None:
    lines: list[str] = []
    assert list(Progress("reading", "samples", log=lines.append).over("abc")) == ["a", "b", "c"]
    assert lines == ["reading: 3 samples"]


def test_a_quiet_phase_reports_only_if_it_is_long() -> None:
    lines: list[str] = []
    list(Progress("reading", "samples", log=lines.append, quiet=True).over("abc"))
    assert not lines
    for _ in Progress("reading", "samples", log=lines.append, quiet=True).over("abc"):
        time.sleep(0.06)
    assert lines[-1] == "reading: 3 samples"


def test_only_the_first_process_of_a_machine_reports(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    list(Progress("reading", "samples").over("abc"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    list(Progress("reading", "samples").over("abc"))
    assert capsys.readouterr().err == "reading: 3 samples\n"


def test_each_phase_of_the_check_reports(config: Config, streamed: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "INTERVAL", 0.001)
    lines: list[str] = []
    check(config.data.train, Tokenizer.of(config), config, CheckOptions(lines.append))
    check_streams(Tokenizer.of(streamed), streamed, CheckOptions(lines.append))
    phases = {line.split(":")[0] for line in lines}
    assert phases >= {"indexing", "decoding", "planning an epoch", "comparing orders", "reading streams"}
    assert "reading 7 shards" in phases
    assert "decoding: 40 of 40 samples" in lines


def test_no_last_line_after_an_error() -> None:
    lines: list[str] = []
    with pytest.raises(ValueError, match="broken"), Progress("reading", "samples", log=lines.append):
        raise ValueError("broken")
    assert not lines
