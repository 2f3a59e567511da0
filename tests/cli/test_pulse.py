"""A command that prints nothing for ten seconds prints how long it has been running."""

from __future__ import annotations

import io
import sys

from mmgen.cli.pulse import Noted, Pulse, pulse


def test_a_line_after_ten_silent_seconds() -> None:
    now, lines = [0.0], list[str]()
    beat = Pulse("mmgen sample", lines.append, lambda: now[0])
    for second in range(1, 36):
        now[0] = second
        if second == 14:
            beat.note()
        beat.check()
    assert lines == ["mmgen sample: 10 s so far\n", "mmgen sample: 24 s so far\n", "mmgen sample: 34 s so far\n"]


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
