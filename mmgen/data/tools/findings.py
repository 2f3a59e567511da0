"""Folding of repeated findings: one line per kind of problem, with a count and examples."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # scripts of data_prep use this module, and need no torch
    from mmgen.data.dataset import Overlong
    from mmgen.data.shards.samples import BadRecord

EXAMPLES = 3
"""Names in a line."""
KINDS = 8
"""Kinds of bad samples that have a line of their own."""


def folded(singular: str, plural: str, names: Sequence[str], remedy: str = "") -> Iterator[str]:
    """One line for a kind of problem, or none: `1,000 duplicate keys, such as a.tar/1, a.tar/2, a.tar/3. REMEDY`."""
    if names:
        such = ", such as" if len(names) > EXAMPLES else ":"
        kind = singular if len(names) == 1 else plural
        end = f". {remedy}" if remedy else ""
        yield f"{len(names):,} {kind}{such} {', '.join(names[:EXAMPLES])}{end}"


def folded_bad(bad: Sequence[BadRecord]) -> Iterator[str]:
    """A line for each of the most frequent kinds of bad samples, and one for the rest."""
    kinds: dict[str, list[BadRecord]] = {}
    for record in bad:
        kinds.setdefault(kind_of(record.reason), []).append(record)
    by_count = sorted(kinds.values(), key=len, reverse=True)
    for records in by_count[:KINDS]:
        names = [record.name for record in records]
        yield from (f"{line} ({records[0].reason})" for line in folded("bad sample", "bad samples", names))
    rest = [f"{record.name} ({record.reason})" for records in by_count[KINDS:] for record in records]
    yield from folded("bad sample for another reason", "bad samples for other reasons", rest, "--json lists all")


def folded_overlong(overlong: Sequence[Overlong], remedy: str) -> Iterator[str]:
    """One line for documents that are longer than a row."""
    if overlong:
        names = [f"{document.shard}/{document.key} ({document.positions} positions)" for document in overlong]
        longest = max(document.positions for document in overlong)
        more = f"The longest needs {longest} positions: {remedy}"
        yield from folded("document is longer than a row", "documents are longer than a row", names, more)


def kind_of(reason: str) -> str:
    """A reason without the names, numbers and details that differ between samples of one kind."""
    return re.sub(r"'[^']*'|\[[^]]*\]|\d+", "#", reason.split(": ")[0])
