"""The project itself: directions of imports, layout of the tests, pinned versions."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from packaging.utils import canonicalize_name

from tests.oldest import oldest, requirements

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


def test_imports_go_one_way() -> None:
    done = subprocess.run([BIN / "lint-imports"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_flow_imports_nothing_else_of_mmgen() -> None:
    for path in (ROOT / "mmgen" / "flow").glob("*.py"):
        assert not re.search(
            r"import (mmgen\.(?!flow)|transformers|tokenizers)|from (mmgen\.(?!flow)|transformers|tokenizers)",
            path.read_text(),
        )


def test_tests_mirror_the_packages() -> None:
    """A folder or file of tests is named after what it tests; these few are about no single package."""
    packages = {path.name for path in (ROOT / "mmgen").iterdir() if path.is_dir()} | {"data_prep"}
    modules = {path.stem for path in (ROOT / "mmgen").glob("*.py")}
    folders = {path.parent.relative_to(ROOT / "tests").parts[0] for path in ROOT.glob("tests/*/__init__.py")}
    files = {path.stem.removeprefix("test_") for path in ROOT.glob("tests/test_*.py")}
    assert folders - packages == {"faults", "fixtures", "golden", "growth"}
    assert files - modules == {"project", "layout", "guides", "words"}


def pins() -> dict[str, list[str]]:
    """The lines of constraints.txt per package: `name==version`, then its hashes."""
    text = re.sub(r"^#.*\n", "", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    entries = [entry.split() for entry in text.replace("\\\n", " ").splitlines()]
    return {canonicalize_name(entry[0].split("==")[0]): entry for entry in entries}


def test_every_requirement_is_pinned_within_its_range() -> None:
    pinned = pins()
    for requirement in requirements("dev", "mutation"):
        version = pinned[canonicalize_name(requirement.name)][0].split("==")[1]
        assert requirement.specifier.contains(version), (str(requirement), version)


def test_every_pin_but_torch_has_hashes() -> None:
    for name, (_, *hashes) in pins().items():
        assert bool(hashes) == (name != "torch"), name
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", found) for found in hashes), name


def test_every_requirement_names_a_version_that_was_tried() -> None:
    for requirement in requirements("data", "ode", "lab", "prep"):
        assert "==" in oldest(requirement), f"{requirement.name} has no lower bound"
