"""`mmgen demo`: it draws and captions as `mmgen sample` and `mmgen caption` do, and `make demo` ends with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from mmgen.cli.demo import MORE, PROMPT
from mmgen.config_io import load
from tests.conftest import run

REPORT = {"t2i_accuracy": 0.97, "i2t_accuracy": 0.9674, "t2i_accuracy_shuffled": 0.0, "fd_pixel": 3.0}


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained run's folder."""
    return Path(shutil.copytree(load(trained).run.dir, tmp_path / "run", symlinks=True))


def test_demo(trained: Path, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--config", trained, "--run.dir", copy]
    _, out, _ = run(capsys, "sample", *options, "--out", tmp_path / "drawn", "picture 1", "--json")
    image = json.loads(out)["samples"][0]["image"]
    _, out, _ = run(capsys, "caption", *options, image, "--json")
    caption = json.loads(out)["captions"][0]["caption"]
    (copy / "report.json").write_text(json.dumps(REPORT))
    code, out, err = run(capsys, "demo", *options, "picture 1")
    assert code == 0
    assert out == (
        "\n"
        "caption given:   picture 1\n"
        f"image drawn:     {copy}/demo/grid.png\n"
        f"model's caption: {caption}\n"
        "scores:          t2i_accuracy 0.970  i2t_accuracy 0.967  t2i_accuracy_shuffled 0.000\n"
        f"files:           {copy}/report.json  {copy}/samples/  {copy}/metrics.jsonl  {copy}/checkpoints/latest\n"
        f'try next:        mmgen sample --config {trained} "{MORE[0]}" "{MORE[1]}"\n'
    )
    assert [line.split(":")[0] for line in err.splitlines()] == ["1 of 3", "2 of 3", "3 of 3"]
    assert (copy / "demo" / "0000.png").read_bytes() == Path(image).read_bytes()
    assert Image.open(copy / "demo" / "grid.png").size > Image.open(image).size


def test_demo_before_an_evaluation(trained: Path, copy: Path, capsys: pytest.CaptureFixture) -> None:
    code, out, _ = run(capsys, "demo", "--config", trained, "--run.dir", copy)
    assert code == 0
    assert f"caption given:   {PROMPT}\n" in out
    assert f"scores:          none yet: run mmgen eval --config {trained}\n" in out
    code, out, _ = run(capsys, "demo", "--config", trained, "--run.dir", copy, "--json")
    assert code == 0
    assert json.loads(out).keys() == {"prompt", "image", "caption", "scores"}


def test_demo_without_a_run_or_a_prompt(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code, out, err = run(capsys, "demo", "--config", trained, "--run.dir", tmp_path / "none")
    assert (code, out) == (2, "")
    assert "has no checkpoint: name a trained run" in err
    assert run(capsys, "demo", "--config", trained, " ")[0] == 2
