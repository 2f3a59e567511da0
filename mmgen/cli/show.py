"""The output of commands: lines of progress, tables and JSON documents."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table


def log(message: str) -> None:
    """Print one line on standard error."""
    print(message, file=sys.stderr, flush=True)


def print_json(value: object) -> None:
    """Print one JSON document on standard output."""
    print(json.dumps(value))


def show(values: Mapping[str, object], as_json: bool) -> None:
    """Print an object as JSON or as a table of two columns."""
    if as_json:
        print_json(values)
        return
    table = Table(show_header=False, box=None)
    for name, value in values.items():
        for inner, number in value.items() if isinstance(value, dict) else [("", value)]:
            if isinstance(number, dict):
                text = "  ".join(f"{k} {rounded(v, 3)}" for k, v in number.items())
            else:
                text = rounded(number, 4)
            table.add_row(f"{name} {inner}".strip(), text)
    print_table(table)


def print_table(table: Table) -> None:
    """Print a table on standard output, with markup off, because cells may contain brackets such as `E[x | z]`."""
    Console(markup=False).print(table)


def plus_minus(half_width: float | None) -> str:
    """The half-width of an interval, to print after its mean; empty without one."""
    return "" if half_width is None else f" ± {half_width:.2g}"


def rounded(value: object, digits: int) -> str:
    """A number rounded to significant digits; any other value as text."""
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)
