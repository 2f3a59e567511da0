"""The command `mmgen prep`: runs a script of `data_prep`, which turns raw sources into shards."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.table import Table

from mmgen.cli.show import print_table
from mmgen.config import nearest

CALL = "run(main)"
"""The line at the end of each script; other modules of `data_prep` lack it."""


def prep(
    *words: Annotated[str, Parameter(help="Name of a script, then its arguments.", allow_leading_hyphen=True)],
) -> int:
    """Turn pictures, tables, pages or text into shards.

    Without a name it lists the scripts. `mmgen prep NAME --help` shows the options of one; each is also
    `python -m data_prep.NAME`.

    Example:
        mmgen prep folder pictures --out data/mine
    """
    return run_script(words)


def run_script(words: Sequence[str]) -> int:
    """Run the script that the first word names with the other words; without words, list the scripts.

    Raises:
        ValueError: there is no such script, or the package `data_prep` is not installed.
    """
    known = scripts()
    if not words:
        table = Table(show_header=False, box=None)
        for name, purpose in known.items():
            table.add_row(name, purpose)
        print_table(table)
        return 0
    name, *arguments = words
    if name not in known:
        near = nearest(name, list(known))
        hint = f"did you mean '{near}'?" if near else f"give one of {', '.join(known)}"
        raise ValueError(f"unknown script '{name}': {hint}")
    module = importlib.import_module(f"data_prep.{name}")
    importlib.import_module("data_prep").run(module.main, arguments, f"mmgen prep {name}")
    return 0


def scripts() -> dict[str, str]:
    """The name of each script of `data_prep`, and what it does."""
    found = importlib.util.find_spec("data_prep")
    if found is None or not found.submodule_search_locations:
        raise ValueError("the package data_prep is not installed: install mmgen again, or run from its repository")
    (folder,) = found.submodule_search_locations
    purposes = {}
    for path in sorted(Path(folder).glob("*.py")):
        source = path.read_text(encoding="utf-8")
        if source.rstrip().endswith(CALL):
            first = (ast.get_docstring(ast.parse(source)) or "").splitlines()[0]
            purposes[path.stem] = first.partition(": `python")[0]
    return purposes


def asks_for_script(words: Sequence[str]) -> bool:
    """Whether a command line runs a script, whose options are its own."""
    return list(words[:1]) == ["prep"] and len(words) > 1 and not words[1].startswith("-")
