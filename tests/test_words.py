"""The words of the whole tree: phrases and identifiers that made it hard to read are not used again."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = {".py", ".yaml", ".yml", ".sh", ".md", ".toml", ""}
EXEMPT = {"constraints.txt", "LICENSE", "tests/test_words.py"}

INSTEAD = {
    r"tells?|told": "say what is printed, reported or returned",
    r"says?|said": "a file contains, a message states, a function returns",
    r"nobody|no one": "name who or what",
    r"manieth": "give the index",
    r"heed(s|ed)?": "is used, is ignored",
    r"vouch(es|ed)?": "is checked, is not checked",
    r"whence|thereof|wherein|whereof|thereby|hereby|lest|albeit|amid|hence": "plain English",
    r"for ?ever": "without end, or name the time limit",
    r"stands?(?!-)|stood": "is, is at, is in",
    r"anew": "again",
    r"besides?": "next to, in addition to",
    r"in (the )?place of": "instead of",
    r"gone through": "read, visited",
    r"(go|goes|going|went) on": "continue",
    r"answers? to": "detects, reacts to",
    r"knows? nothing": "does not depend on",
    r"spells? out": "lists, gives",
    r"bends less": "is straighter",
    r"names itself": "reports its rank",
    r"wherever it": "plain English",
    r"by then": "name the time",
    r"(out )?of which": "two sentences",
    r"to itself alone": "only to itself",
    r"nothing but|all but|but for": "only, except",
    r"whose they are": "where they come from",
    r"(at|in) one go": "at once",
    r"one by one": "one at a time",
    r"by hand": "manually",
    r"cheats?|imitations?": "baseline",
}
"""Phrases, as regular expressions of whole words, and what to write."""
IDENTIFIERS = {"tell", "told", "said", "stands", "manieth"}
PHRASES = {phrase: re.compile(rf"\b({phrase})\b", re.IGNORECASE) for phrase in INSTEAD}


def texts() -> list[Path]:
    """Every tracked text file, relative to the root."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    paths = [Path(line) for line in listed.stdout.splitlines()]
    return [path for path in paths if path.suffix in TEXT and str(path) not in EXEMPT and (ROOT / path).is_file()]


def banned_phrases(text: str) -> list[str]:
    """`line: phrase (what to write)` for each banned phrase, also in a name whose words are joined by underscores."""
    lines = text.replace("serve_forever", "").replace("_", " ").splitlines()  # a method of Python's socketserver
    return [
        f"{number}: {match[0]} ({INSTEAD[phrase]})"
        for number, line in enumerate(lines, 1)
        for phrase, pattern in PHRASES.items()
        for match in pattern.finditer(line)
    ]


def banned_identifiers(source: str) -> list[str]:
    """Names of variables, parameters, functions, classes and attributes that contain a banned word."""
    found = []
    for node in ast.walk(ast.parse(source)):
        name = next(
            (getattr(node, field, None) for field in ("id", "arg", "name", "attr") if hasattr(node, field)), None
        )
        if isinstance(name, str) and IDENTIFIERS & set(name.lower().split("_")):
            found.append(f"{getattr(node, 'lineno', 0)}: {name}")
    return found


@pytest.mark.parametrize("folder", sorted({path.parts[0] for path in texts()}))
def test_no_banned_phrase(folder: str) -> None:
    lines = [
        f"{path}:{hit}"
        for path in texts()
        if path.parts[0] == folder
        for hit in banned_phrases((ROOT / path).read_text())
    ]
    assert not lines, "\n".join(lines)


def test_no_banned_identifier() -> None:
    lines = [
        f"{path}:{hit}"
        for path in texts()
        if path.suffix == ".py"
        for hit in banned_identifiers((ROOT / path).read_text())
    ]
    assert not lines, "\n".join(lines)


def test_the_checks_see_what_they_ban() -> None:
    assert banned_phrases("It waits for ever.\nNobody TELLS it.") == [
        "1: for ever (without end, or name the time limit)",
        "2: TELLS (say what is printed, reported or returned)",
        "2: Nobody (name who or what)",
    ]
    assert banned_phrases("def test_flow_knows_nothing() -> None: ...")
    assert not banned_phrases("The standard: a teller understands forevermore.")
    assert sorted(banned_identifiers("def f(tell, x):\n    told = x.said_before\n    class Stands: ...\n")) == [
        "1: tell", "2: said_before", "2: told", "3: Stands",
    ]  # fmt: skip
    assert not banned_identifiers("def understands(teller): return teller.saids")
