"""Small runs reproduce their golden records, which also name the processor and the versions that made them.

The message of a commit that changes a record names the numbers that changed, and why.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.golden.record import CASES, FOLDER, differences

ROOT = Path(__file__).parents[2]


SLOW = [case for case in CASES if case != "shards"]
"""The cases that train; continuous integration runs them, and `make test` leaves them out."""


@pytest.mark.parametrize("case", ["shards", *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)])
def test_a_small_run_reproduces_its_record(case: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.golden.record", case, "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    old, new = (json.loads((folder / f"{case}.json").read_text()) for folder in (FOLDER, tmp_path))
    assert differences(old, new) == []


def test_a_changed_bit_is_detected_on_the_same_machine_and_a_small_change_on_others() -> None:
    old = json.loads((FOLDER / "digits.json").read_text())
    new = json.loads((FOLDER / "digits.json").read_text())
    new["steps"][7][0] *= 1 + 1e-12
    assert differences(old, new) == [f"steps: [7] [0] {old['steps'][7][0]} and {new['steps'][7][0]}"]
    new["environment"]["torch"] = "another"
    assert differences(old, new) == []
    new["steps"][7][0] *= 1 + 2e-4
    assert len(differences(old, new)) == 1


def test_a_changed_image_or_caption_is_detected() -> None:
    old = json.loads((FOLDER / "digits.json").read_text())
    new = json.loads((FOLDER / "digits.json").read_text())
    new["captions"][3] = "0" * 16
    assert differences(old, new) == [f"captions: [3] {old['captions'][3]} and {'0' * 16}"]
