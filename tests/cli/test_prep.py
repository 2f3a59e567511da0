"""`mmgen prep`: the scripts of `data_prep`, from any folder."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from mmgen.cli.prep import scripts
from tests.conftest import run


def test_every_script_is_listed_with_its_purpose(capsys: pytest.CaptureFixture) -> None:
    code, out, _ = run(capsys, "prep")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(scripts())
    folder = Path(importlib.import_module("data_prep").__file__ or "").parent
    assert set(scripts()) == {path.stem for path in folder.glob("*.py")} - {"__init__", "shards"}
    assert all(scripts().values())


def test_a_script_runs_from_any_folder_with_its_own_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (8, 8)).save(pictures / "a.png")
    (pictures / "a.txt").write_text("a black square")
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "prep", "folder", "pictures", "--out", "one", "--name", "mine")
    assert code == 0, err
    command = [sys.executable, "-m", "data_prep.folder", "pictures", "--out", "two", "--name", "mine"]
    subprocess.run(command, check=True, capture_output=True)
    one, two = ((tmp_path / name / "mine-000000.tar").read_bytes() for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prep", "foldr"], "mmgen: error: unknown script 'foldr': did you mean 'folder'?"),
        (["prep", "xyz"], "unknown script 'xyz': give one of digits, folder"),
        (
            ["prep", "folder", "missing", "--out", "out"],
            "error: missing is not a folder: name the folder of the images",
        ),
        (["prep", "folder"], "error: "),
    ],
)
def test_errors(words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    code, _, err = run(capsys, *words)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_help_of_a_script_shows_its_options(capsys: pytest.CaptureFixture) -> None:
    code, out, _ = run(capsys, "prep", "folder", "--help")
    assert code == 0
    assert "Usage: mmgen prep folder" in out
    assert "--captionless" in out
