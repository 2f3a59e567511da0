"""A command that prints nothing for ten seconds prints how long it has been running."""

from __future__ import annotations

import io
import sys

import pytest

from mmgen.cli.pulse import Noted, pulse
from mmgen.train.heartbeat import Heartbeat


def test_a_line_is_printed_while_a_command_is_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Any output of the command postpones the line (the clock of `Heartbeat` is tested with it)."""
    beats: list[Heartbeat] = []
    monkeypatch.setattr(Heartbeat, "start", lambda beat: beats.append(beat) or beat)
    with pulse("mmgen sample"):
        (beat,) = beats
        beat.every = 0.0
        beat.check()
        beat.every = 60.0
        print("drawn")
        beat.check()
        assert beat.quiet < 5
    out, err = capsys.readouterr()
    assert (out, err) == ("drawn\n", "mmgen sample: 0 s so far\n")


def test_streams_are_noted_and_restored() -> None:
    out, err = sys.stdout, sys.stderr
    with pulse("mmgen eval"):
        assert isinstance(sys.stdout, Noted)
        assert isinstance(sys.stderr, Noted)
    assert (sys.stdout, sys.stderr) == (out, err)
    seen, text = list[str](), io.StringIO()
    stream = Noted(text, lambda: seen.append("written"))
    assert stream.write("abc") == 3
    assert (text.getvalue(), seen, stream.readable()) == ("abc", ["written"], True)
