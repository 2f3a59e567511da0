"""The command `mmgen settings`: lists and searches the settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

from cyclopts import Parameter

from mmgen.cli.flags import Json
from mmgen.cli.show import print_json
from mmgen.config import nearest
from mmgen.config_io import Setting, field_names
from mmgen.config_io import settings as every_setting


def settings(
    *names: Annotated[str, Parameter(help="Sections, keys, or words in keys and descriptions; by default all.")],
    as_json: Json = False,
) -> int:
    """List or search the settings: type, default, choices, description.

    A section or key lists its settings; any other word finds settings whose key or description contains it.

    Example:
        mmgen settings train.lr objective.time guidance
    """
    everything = list(every_setting())
    matching = {item.name for name in names for item in find(name, everything)}
    chosen = [item for item in everything if not names or item.name in matching]
    if as_json:
        print_json([asdict(item) for item in chosen])
        return 0
    for item in chosen:
        print(f"{item.name}: {item.type} = {json.dumps(item.default)}")
        print(f"    {item.description}" + (f" One of: {', '.join(item.choices)}." if item.choices else ""))
    return 0


def find(name: str, everything: Sequence[Setting]) -> list[Setting]:
    """The settings of a section or key, or else those whose key or description contains the name in any case.

    Raises:
        ValueError: no setting matches; the message names the most similar section or key.
    """
    if not name.strip():
        raise ValueError("the search word is empty: `mmgen settings` lists all settings")
    name = name.removeprefix("--")
    inside = [item for item in everything if f"{item.name}.".startswith(f"{name}.")]
    found = inside or [item for item in everything if name.lower() in f"{item.name}\n{item.description}".lower()]
    if not found:
        near = nearest(name, field_names())
        raise ValueError(
            f"no section, key or description contains '{name}'"
            + (f": did you mean '{near}'?" if near else ": `mmgen settings` lists all")
        )
    return found
