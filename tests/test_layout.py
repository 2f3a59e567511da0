"""Files that guides name exist, and no file has grown past what one subject needs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GUIDES = ("README.md", "CONTRIBUTING.md", "SECURITY.md")
LONG = {"mmgen/config.py"}
"""One thing: every setting of mmgen, which no other file defines."""


@pytest.mark.parametrize("guide", GUIDES)
def test_files_that_a_guide_names_exist(guide: str) -> None:
    named = re.findall(r"(?:mmgen|tests|data_prep|configs|launch)/[\w./-]*[\w/]", (ROOT / guide).read_text())
    missing = sorted({path for path in named if not (ROOT / path).exists()})
    assert missing == []


def test_no_file_is_longer_than_450_lines() -> None:
    files = [path for folder in ("mmgen", "data_prep", "tests") for path in (ROOT / folder).rglob("*.py")]
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert {name for name, count in lines.items() if count > 450} <= LONG
