"""Scripts that turn raw sources into WebDataset shards and tokenizers; each runs as `python -m data_prep.NAME`."""

from __future__ import annotations

import sys
from collections.abc import Callable

import cyclopts


def tell(message: str) -> None:
    """One line for people, on standard error."""
    print(message, file=sys.stderr, flush=True)


def run(main: Callable[..., None]) -> None:
    """Run a script's command; errors of the user's making become one message and exit code 2."""
    try:
        cyclopts.run(main)
    except (ValueError, OSError) as error:
        tell(f"error: {error}")
        sys.exit(2)
