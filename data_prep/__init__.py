"""Scripts that turn raw sources into WebDataset shards and tokenizers; each runs as `mmgen prep NAME`, or as `python -m
data_prep.NAME`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import cyclopts

from mmgen.cli.errors import sentence
from mmgen.cli.pulse import pulse

USAGE = 2
"""Exit code of an error in the command or its input."""


def log(message: str) -> None:
    """Print one line for people on standard error."""
    print(message, file=sys.stderr, flush=True)


def run(main: Callable[..., None], words: Sequence[str] | None = None, name: str | None = None) -> None:
    """Run a script's command; an error in the command or its input is printed as one message and exits with code 2.

    `words` are the arguments, by default those of this process, and `name` is the command in help and messages.
    """
    app = cyclopts.App(name=name or f"python -m data_prep.{Path(sys.argv[0]).stem}")
    app.default(main)
    try:
        with pulse(app.name[0]):
            app(sys.argv[1:] if words is None else words, exit_on_error=False, print_error=False)
    except cyclopts.CycloptsError as error:
        log(f"error: {sentence(error, app.name[0])}")
        sys.exit(USAGE)
    except (ValueError, OSError, ImportError) as error:
        log(f"error: {reason(error)}")
        sys.exit(USAGE)


def reason(error: Exception) -> str:
    """The message of an error; of an error of the operating system, the file and what is wrong with it."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    return str(error)


def writable(out: Path) -> Path:
    """The folder `out`, created if necessary; raises ValueError if it is a file."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: name a folder")
    out.mkdir(parents=True, exist_ok=True)
    return out
