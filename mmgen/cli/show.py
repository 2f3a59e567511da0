"""What commands print: a line for people, a table, or one JSON document."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table


def log(message: str) -> None:
    """One line for people, on standard error."""
    print(message, file=sys.stderr, flush=True)


def print_json(value: object) -> None:
    """One JSON document on standard output."""
    print(json.dumps(value))


def show(values: Mapping[str, object], as_json: bool) -> None:
    """A flat object as JSON or as a table."""
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
    """A table on standard output, its cells as they are: `E[x | z]` is no markup."""
    Console(markup=False).print(table)


def plus_minus(half_width: float | None) -> str:
    """An interval's half-width behind its mean."""
    return "" if half_width is None else f" ± {half_width:.2g}"


def rounded(value: object, digits: int) -> str:
    """A number rounded to the given digits; anything else as it prints."""
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)
