"""Writes proposed settings as a YAML file with the reason of each as a comment."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import yaml

from mmgen.config import Config
from mmgen.propose.settings import Choice

WIDTH = 100


def as_yaml(choices: Sequence[Choice], head: Sequence[str]) -> str:
    """The text of a settings file: comment lines, then each section with its settings and their reasons."""
    lines = [f"# {line}".rstrip() for line in head]
    for section in Config.model_fields:
        inside = [choice for choice in choices if choice.name.partition(".")[0] == section]
        for choice in inside:
            if "." not in choice.name:
                lines += [*_comment(choice.why, ""), f"{section}: {_flow(choice.value)}"]
        keyed = [choice for choice in inside if "." in choice.name]
        if keyed:
            lines.append(f"{section}:")
        for choice in keyed:
            lines += [*_comment(choice.why, "  "), f"  {choice.name.partition('.')[2]}: {_flow(choice.value)}"]
    return "\n".join(lines) + "\n"


def as_settings(choices: Sequence[Choice]) -> dict[str, Any]:
    """The proposed settings as the nested mapping that the file holds."""
    found: dict[str, Any] = {}
    for choice in choices:
        section, _, key = choice.name.partition(".")
        if key:
            found.setdefault(section, {})[key] = choice.value
        else:
            found[section] = choice.value
    return found


def _comment(text: str, indent: str) -> list[str]:
    return [f"{indent}# {line}" for line in textwrap.wrap(text, WIDTH)]


def _flow(value: Any) -> str:
    """A value on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False).strip().removesuffix("\n...")
