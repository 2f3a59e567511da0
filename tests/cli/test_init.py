"""`mmgen init`: from pictures to a settings file, and its errors. The slow test trains, scores and draws with it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from mmgen.cli.app import launch
from mmgen.config_io import load

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (40, 40, 230), "yellow": (230, 220, 20)}


def pictures(root: Path, count: int = 40) -> Path:
    """Boxes of four colours on white, with captions."""
    root.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        name = list(COLOURS)[i % 4]
        pixels = np.full((8, 8, 3), 255, np.uint8)
        top, left = rng.integers(3, size=2)
        pixels[top : top + 5, left : left + 5] = np.clip(np.array(COLOURS[name]) + rng.integers(-20, 20, 3), 0, 255)
        Image.fromarray(pixels).save(root / f"{i:04d}.png")
        (root / f"{i:04d}.txt").write_text(f"a {name} box")
    return root


def test_a_dry_run_shows_valid_settings_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "in")
    assert launch(["init", "--images", "in", "--dry-run"]) == 0
    out = capsys.readouterr()
    settings = yaml.safe_load(out.out)
    assert settings["model"]["patcher"] == {"channels": 3, "patch_size": 2, "image_sizes": [[8, 8]]}
    assert settings["eval"]["test"] == ["my-data/my-test-*.tar"]
    assert "samples looked at: 40 of 40" in out.err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


WRONG: list[tuple[Callable[[Path], list[str]], str]] = [
    (lambda at: [], "give one of --images, --table, --shards"),
    (lambda at: ["--images", str(at / "in"), "--table", str(at / "t.csv")], "leave out one of --images, --table"),
    (lambda at: ["--images", str(at / "none")], "is not a folder"),
    (lambda at: ["--images", str(at / "in"), "--out", "my.txt"], "name a file that ends in .yaml"),
    (lambda at: ["--images", str(at / "in"), "--out", str(at / "old.yaml")], "old.yaml exists"),
    (lambda at: ["--images", str(at / "in"), "--minutes", "0"], "give more than 0"),
    (lambda at: ["--images", str(at / "in"), "--size", "tinny"], "did you mean 'tiny'"),
    (lambda at: ["--images", str(at / "bare")], "no caption file"),
    (lambda at: ["--images", str(at / "in"), "--out", str(at / "new.yaml")], "there are 4 pictures, too few"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_input_is_explained(tmp_path: Path, arguments: Callable[[Path], list[str]], message: str) -> None:
    pictures(tmp_path / "in", 4)
    for path in pictures(tmp_path / "bare", 4).glob("*.txt"):
        path.unlink()
    (tmp_path / "old.yaml").touch()
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        launch(["init", *arguments(tmp_path)])


@pytest.mark.slow
def test_four_commands_lead_from_a_folder_to_scores_and_pictures(tmp_path: Path) -> None:
    """Colours are learned: captions are right, and drawn pictures have the colour of their caption."""
    pictures(tmp_path / "in", 800)

    def mmgen(*arguments: str) -> str:
        command = [sys.executable, "-m", "mmgen.cli", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    assert "Next: mmgen train --config my.yaml" in mmgen("init", "--images", "in", "--minutes", "1.5")
    config = load(tmp_path / "my.yaml")
    assert config.train.steps >= 200
    mmgen("train", "--config", "my.yaml", "--train.compile=false")
    words = ["--eval.samples", "60", "--eval.choices", "4", "--eval.classes", '["red", "green", "blue", "yellow"]']
    scores = json.loads(mmgen("eval", "runs/my", *words, "--json"))
    assert scores["i2t_exact"] > 0.9
    assert scores["i2t_exact_shuffled"] < 0.5
    assert scores["t2i_accuracy"] > 0.9
    assert scores["t2i_accuracy_shuffled"] < 0.5
    assert scores["match_by_text"] > 0.9
    assert scores["match_drawn_by_text"] > 0.9
    assert scores["match_by_image"] > 0.6
    assert scores["match_chance"] == 0.25
    shown = mmgen("eval", "runs/my", "--eval.samples", "40")
    assert "95% interval" in shown
    assert "captions with exactly" in shown
    mmgen("sample", "runs/my", "a red box", "--out", "drawn")
    drawn = np.asarray(Image.open(next((tmp_path / "drawn").glob("*.png"))).convert("RGB"), dtype=float)
    box = drawn[drawn.min(axis=2) < 150].mean(axis=0)
    assert box[0] > box[1] + 60
    assert box[0] > box[2] + 60
