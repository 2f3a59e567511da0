"""Compares what two commits compute: `python -m tests.golden.compare fa834f0 HEAD [--case digits ...]`.

Each commit is checked out into a temporary folder and recorded on this machine by the script of the working tree, so
the results must be equal bit for bit. The exit code is 1 if they differ or if a commit cannot be recorded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import cyclopts

from tests.golden.record import CASES, differences

ROOT = Path(__file__).parents[2]
SHOWN = 2000
"""How many characters of a failed command's errors are printed."""


def recorded(commit: str, cases: tuple[str, ...], folder: Path) -> dict[str, dict]:
    """The records of all cases, as a commit computes them."""
    tree, out = folder / "tree", folder / "out"
    out.mkdir(parents=True)
    subprocess.run(["git", "-C", ROOT, "worktree", "add", "--quiet", "--detach", tree, commit], check=True)
    try:
        # The script comes from the working tree, the packages `mmgen` and `data_prep` from the commit.
        script = tree / "record_golden.py"
        script.write_text((Path(__file__).parent / "record.py").read_text())
        command = [sys.executable, str(script), *cases, "--out", str(out), "--configs", str(tree / "configs")]
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        done = subprocess.run(command, check=False, cwd=tree, env=environment, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            # With a text, sys.exit prints it to stderr and exits with code 1.
            sys.exit(f"Recording commit {commit} failed with exit code {done.returncode}:\n{done.stderr[-SHOWN:]}")
    finally:
        subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", tree], check=True)
    return {case: json.loads((out / f"{case}.json").read_text()) for case in cases}


def main(
    old: str,
    new: str = "HEAD",
    *,
    case: Annotated[tuple[str, ...], cyclopts.Parameter(help=f"One of {', '.join(CASES)}; all by default.")] = (),
) -> int:
    """Record two commits and print their differences."""
    cases = case or tuple(CASES)
    with tempfile.TemporaryDirectory() as name:
        one, other = (recorded(commit, cases, Path(name) / side) for side, commit in (("a", old), ("b", new)))
    wrong = [f"{case}: {line}" for case in cases for line in differences(one[case], other[case])]
    print("\n".join(wrong) or f"{old} and {new} compute the same: {', '.join(cases)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(cyclopts.run(main))
