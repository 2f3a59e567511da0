"""Prints the oldest versions that pyproject.toml allows, one per line: `python -m tests.oldest > oldest.txt`.

Continuous integration installs them and runs the tests, so each lower bound in pyproject.toml is a tested version.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = Path(__file__).parent.parent / "pyproject.toml"


def requirements(*extras: str) -> list[Requirement]:
    """The requirements of pyproject.toml on this machine, including these optional groups.

    A later group may narrow the range of an earlier one.
    """
    project = tomllib.loads(PROJECT.read_text())["project"]
    lines = project["dependencies"] + [line for extra in extras for line in project["optional-dependencies"][extra]]
    parsed = [Requirement(line) for line in lines]
    return [requirement for requirement in parsed if requirement.marker is None or requirement.marker.evaluate()]


def oldest(requirement: Requirement) -> str:
    """The requirement at its lower bound, as `name==version`; only the name if it has no lower bound."""
    (lower,) = [part.version for part in requirement.specifier if part.operator == ">="] or [""]
    return f"{requirement.name}=={lower}" if lower else requirement.name


if __name__ == "__main__":
    print("\n".join(oldest(requirement) for requirement in requirements(*sys.argv[1:])))
