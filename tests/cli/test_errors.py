"""Wrong input to every command: one or a few lines that name the cause, exit code 2, and no text of a library."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from mmgen.cli import app
from mmgen.cli.errors import sentence
from mmgen.config_io import load
from tests.conftest import picture, png, run

LIBRARY = (
    "Traceback",
    "pydantic",
    "Errno",
    "os error",
    "site-packages",
    "codec can't",
    "median",
    "<class",
    "while ",
    "<unicode string>",
    "<stream",
    "tag:yaml",
)
"""Texts of Python and of libraries that no message shows."""


def fails(capsys: pytest.CaptureFixture, *words: object) -> str:
    """The message of a command that ends with code 2 and prints no result."""
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, ""), (code, out, err)
    progress, _, message = err.partition("mmgen: error: ")
    assert message
    assert all(line.startswith("indexing") for line in progress.splitlines())
    assert not [text for text in LIBRARY if text in err], err
    assert len(err) < 700, err
    return message.rstrip()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a folder and files that are no settings, pictures or shards."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nxxxx")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "unknown command 'trian', did you mean 'train'? (one of: init, prep, train, "),
        (["lab", "rum"], "unknown command 'lab rum', did you mean 'run'? (one of: list, run)"),
        (["--foo"], "unknown option --foo: see `mmgen --help`"),
        (
            ["train", "--data.train", "a.tar", "b.tar", "c.tar"],
            "unexpected argument 'b.tar c.tar': the shell expanded a pattern of shards: put it in quotes",
        ),
        (
            ["train", "--train.compile", "false"],
            "unexpected argument 'false': write --NAME for true and --no-NAME for false, as in --train.no-compile",
        ),
        (["help"], "unknown command 'help': see `mmgen --help`"),
        (["check", "partiy"], "unknown command 'check partiy', did you mean 'parity'?"),
        (["train", "train.steps=5"], "unexpected argument 'train.steps=5', did you mean --train.steps 5?"),
        (["train", "a.yaml"], "unexpected argument 'a.yaml', did you mean --config a.yaml?"),
        (["lab", "run", "--steps", "1"], "unknown option --steps: `mmgen lab run --help` lists options"),
        (["settings", " "], "the search word is empty: `mmgen settings` lists all settings"),
        (["settings", "bananaz"], "no section, key or description contains 'bananaz': `mmgen settings` lists all"),
        (
            ["train", "--model.patcher.image_sizes", "40"],
            "--model.patcher.image_sizes needs a list in quotes, such as --model.patcher.image_sizes '[[",
        ),
        (
            ["train", "--sample.guidance-interval", "[0, 0.5]"],
            "--sample.guidance-interval needs 2 values, one after the other and without brackets",
        ),
        (
            ["train", "--model.patcher.image_sizes", "40", "41"],
            "model.patcher.image_sizes must be a list, each item a ",
        ),
        (["train", "--model.patcher.image_sizes", "[]"], "model.patcher.image_sizes"),
        (["train", "--data.val", "null"], "data.val must be a list, each item text"),
        (["train", "--config", "gone.yaml"], "gone.yaml does not exist: correct the path, which is relative to this "),
        (["train", "--config", "folder"], "folder is a folder: name a YAML file"),
        (["data", "check"], "no shards are given: name .tar files, or give --config FILE with data.train"),
        (["sample"], 'no caption is given: write one or more, such as "a red 7 top left"'),
        (
            ["train", "--foo"],
            "unknown option --foo: `mmgen train --help` lists options, and `mmgen settings` lists settings",
        ),
        (["train", "-x"], "unknown option -x: `mmgen train --help` lists options"),
        (["train", "--train.setps", "5"], "unknown option --train.setps, did you mean --train.steps?"),
        (["train", "--dry_rnu"], "unknown option --dry_rnu, did you mean --dry-run?"),
        (["train", "extra"], "unexpected argument 'extra': see `mmgen train --help`"),
        (["train", "--train.steps"], "--train.steps needs a value: see `mmgen train --help`"),
        (["train", "--config"], "--config needs a value: see `mmgen --help`"),
        (
            ["train", "--train.steps", "5", "--train.steps", "6"],
            "--train.steps is given more than once: keep one of them",
        ),
        (["train", "--json=5"], "--json: '5' is not true or false"),
        (["ablate"], "FILE is missing: see `mmgen ablate --help`"),
        (["ablate", "folder"], "folder is a folder: name a YAML file"),
        (["ablate", "binary.yaml"], "binary.yaml is not a YAML file: it is not text in UTF-8"),
        (["ablate", "empty.yaml"], "empty.yaml is not a mapping: it needs the keys base, out and arms"),
        (["bench", "step", "--rounds", "0"], "--rounds must be at least 1 (got 0)"),
        (["bench", "generation", "--rounds", "0"], "--rounds must be at least 1 (got 0)"),
        (["bench", "samplers", "--rounds", "-1"], "--rounds must be at least 1 (got -1)"),
        (["bench", "samplers", "--rounds", "x"], "--rounds: 'x' is not a whole number"),
        (["bench", "data", "--samples", "0"], "--samples must be at least 1 (got 0)"),
        (["lab", "run"], "no experiment is given: name one, or add --all (`mmgen lab list` shows them)"),
        (
            ["lab", "run", "--all", "--inject", "sgin"],
            "unknown fault 'sgin', did you mean 'sign'? (one of: sign, half, ",
        ),
        (["lab", "run", "--all", "--jobs", "0"], "--jobs must be at least 1 (got 0)"),
        (["data", "show", "0"], "COUNT must be at least 1 (got 0)"),
        (["data", "show", "x"], "COUNT: 'x' is not a whole number"),
        (["data", "check", "--world", "0"], "--world must be at least 1 (got 0)"),
        (["data", "index", "--workers", "-1"], "--workers must be at least 0 (got -1)"),
        (["data", "buckets", "--n", "0"], "--n must be at least 1 (got 0)"),
        (["data", "buckets", "--pixels", "x"], "--pixels: 'x' is not a height and a width such as 256x256"),
        (["caption", "gone.png"], "gone.png does not exist: correct the path"),
        (["caption", "folder"], "the folder folder holds no picture (.png, .jpg"),
        (["caption", "broken.png"], "broken.png is not an image: give a PNG, JPEG or another picture file"),
        (["sample", "x", "--seed", "-1"], "--seed must be at least 0 (got -1)"),
        (
            ["sample", "x", "--run.dir", "file"],
            "file is a file, not a run folder: name a trained run as the first argument or with --config FILE",
        ),
        (["export", "--out", "file"], "--out file is a file where a folder is needed: choose another path"),
    ],
)
@pytest.mark.usefixtures("place")
def test_options_and_files(capsys: pytest.CaptureFixture, words: list[str], message: str) -> None:
    assert fails(capsys, *words).startswith(message)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("run.dir", "file", "file is a file where a folder is needed: choose another path"),
        ("run.dir", "file/run", "file/run has a file where a folder is needed: choose another path"),
        (
            "train.init_from",
            "folder",
            "folder is not a checkpoint of mmgen: no manifest.json (No such file or directory)",
        ),
        (
            "model.backbone.model_type",
            "qwen33",
            "unknown model.backbone.model_type 'qwen33': give a decoder of transformers, did you ",
        ),
        (
            "model.backbone.model_type",
            "t5gemma",
            "unknown model.backbone.model_type 't5gemma': give a decoder of transformers, ",
        ),
        (
            "model.backbone.pretrained",
            "gone",
            "model.backbone.pretrained 'gone' cannot be loaded: it is not a local folder",
        ),
        ("model.backbone.extra.rope_theta", "x", "a decoder of type 'qwen3' cannot be built: "),
    ],
)
@pytest.mark.usefixtures("place")
def test_settings_of_a_run(capsys: pytest.CaptureFixture, file: Path, key: str, value: str, message: str) -> None:
    assert fails(capsys, "train", "--config", file, f"--{key}", value).startswith(message)


def test_keys_of_an_ablation(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "ablation.yaml"
    path.write_text(yaml.safe_dump({"out": "o", "arms": {"a": {}}, "seed": [1], "thing": 2}))
    assert fails(capsys, "ablate", path).splitlines() == [
        f"{path}: the key 'base' is missing: it is the YAML file of the run that the arms change",
        f"{path}: unknown key 'seed', did you mean 'seeds'?",
        f"{path}: unknown key 'thing', the keys are base, out, equal, seeds, baseline, common, arms, grid",
    ]


def test_the_file_of_a_run_is_not_an_ablation(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("run: {seed: 1}\ntrain: {steps: 5}\n")
    assert fails(capsys, "ablate", path).startswith(f"{path} has the settings of a run: name a file such as")


def test_an_empty_list_on_the_command_line(capsys: pytest.CaptureFixture, file: Path) -> None:
    for words in (["--data.val", "[]"], ["--data.empty-val"]):
        code, out, err = run(capsys, "train", "--config", file, "--dry-run", "--json", *words)
        assert code == 0, err
        assert json.loads(out)["config"]["data"]["val"] == []


def test_evaluation_names_the_setting_that_is_empty(capsys: pytest.CaptureFixture, trained: Path) -> None:
    words = ["eval", "--config", trained]
    labelled = ["--eval.test", "x.tar", "--eval.task", "digits"]
    for key, task, given in (("eval.test", "captions", []), ("eval.judge", "digits", labelled)):
        code, out, err = run(capsys, *words, *given)
        assert (code, out) == (2, "")
        assert f"mmgen: error: {key} is empty: the task '{task}' needs shards there\n" in err


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("manifest.json", "{", "{} is not a checkpoint of mmgen: its manifest.json is damaged"),
        ("manifest.json", "[]", "{} is not a checkpoint of mmgen: its manifest.json is damaged"),
        ("trainer.json", "{", "{}/trainer.json is damaged: it is not JSON"),
        ("trainer.json", "{}", "{}/trainer.json is damaged: these keys are wrong or missing: step, config, position, "),
    ],
)
def test_damaged_checkpoints(
    name: str, text: str, message: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(load(trained).run.dir, folder, symlinks=True)
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        manifest = checkpoint / "manifest.json"
        (checkpoint / name).write_text(text)
        if name != "manifest.json":
            manifest.write_text(json.dumps({}))
    code, out, err = run(capsys, "sample", "--config", trained, "x", "--run.dir", folder)
    assert (code, out) == (2, "")
    assert f"all checkpoints of {folder} are damaged: " + message.format(folder / "checkpoints" / "step-6") in err
    assert not [text for text in LIBRARY if text in err], err


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EACCES, "a/b cannot be opened, as you have no permission: change it with chmod, or choose another path"),
        (errno.ENOENT, "a/b does not exist: correct the path, or make it first"),
        (errno.ENOSPC, "a/b cannot be written, as the disk is full: free some space, or choose another path"),
        (errno.EIO, "a/b: Input/output error"),
    ],
)
def test_errors_of_the_operating_system(number: int, message: str) -> None:
    assert sentence(OSError(number, os.strerror(number), "a/b")) == message
    inside = sentence(ValueError(f"a/b is no shard: {OSError(number, os.strerror(number), 'a/b')}"))
    assert inside == f"a/b is no shard: {os.strerror(number)}: 'a/b'"


def test_ctrl_c_and_a_closed_pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def stop(_words: list[str]) -> int:
        raise KeyboardInterrupt

    command = f"{sys.executable} -m mmgen.cli settings | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ('run.dir: Path = "runs/default"\n', "")
    monkeypatch.setattr(app, "launch", stop)
    assert run(capsys, "settings") == (130, "", "mmgen: error: interrupted\n")


def test_an_image_with_its_end_missing(place: Path, capsys: pytest.CaptureFixture) -> None:
    (place / "short.png").write_bytes(png(picture(np.random.default_rng(0)))[:60])
    assert fails(capsys, "caption", "short.png") == "short.png cannot be read as an image: image file is truncated"
