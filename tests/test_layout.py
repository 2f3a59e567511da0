"""Files that the guides name exist, and no source file is longer than 450 lines."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GUIDES = ("README.md", "CONTRIBUTING.md", "SECURITY.md")
LONG = {"mmgen/config.py"}
"""Files that may be longer: config.py defines all settings of mmgen."""


@pytest.mark.parametrize("guide", GUIDES)
def test_files_named_in_a_guide_exist(guide: str) -> None:
    named = re.findall(r"(?:mmgen|tests|data_prep|configs|launch)/[\w./-]*[\w/]", (ROOT / guide).read_text())
    missing = sorted({path for path in named if not (ROOT / path).exists()})
    assert missing == []


def test_no_file_is_longer_than_450_lines() -> None:
    files = [path for folder in ("mmgen", "data_prep", "tests") for path in (ROOT / folder).rglob("*.py")]
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert {name for name, count in lines.items() if count > 450} <= LONG
