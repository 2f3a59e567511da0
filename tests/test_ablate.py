"""Ablations: the runs of a file, arms made equal, intervals, and resuming without repeating a run."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats
from torch.utils.flop_counter import FlopCounterMode

from mmgen import ablate
from mmgen.config import Config
from mmgen.data.loader import Corpus
from mmgen.model import build_model
from mmgen.sequence.tokenizer import Tokenizer
from tests.conftest import ready


def written(tmp_path: Path, config: Config, **fields: object) -> Path:
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    file = {
        "base": str(base), "out": str(tmp_path / "out"), "seeds": [0, 1],
        "arms": {"transfusion": {}, "mar": {"objective.kind": "mar", "objective.mar.head.width": 16}}, **fields,
    }  # fmt: skip
    path = tmp_path / "ablation.yaml"
    path.write_text(yaml.safe_dump(file, sort_keys=False))
    return path


def test_every_arm_is_combined_with_the_grid(tmp_path: Path, config: Config) -> None:
    path = written(tmp_path, config, grid={"train.lr": [0.1, 0.2], "sample": [{"steps": 3}]})
    _, arms = ablate.read(path)
    assert [arm.name.split("_")[:2] for arm in arms] == [
        ["transfusion", "lr=0.1"], ["transfusion", "lr=0.2"], ["mar", "lr=0.1"], ["mar", "lr=0.2"],
    ]  # fmt: skip
    assert [arm.config.objective.kind for arm in arms] == ["transfusion"] * 2 + ["mar"] * 2
    assert {arm.config.sample.steps for arm in arms} == {3}


def test_equal_parameters(tmp_path: Path, config: Config) -> None:
    _, unequal = ablate.read(written(tmp_path, config))
    _, arms = ablate.read(written(tmp_path, config, equal="parameters"))
    assert unequal[0].parameters == arms[0].parameters
    assert abs(unequal[1].parameters / unequal[0].parameters - 1) > 0.02
    assert abs(arms[1].parameters / arms[0].parameters - 1) <= 0.02
    tokenizer = Tokenizer.of(config)
    for arm in arms:
        assert sum(p.numel() for p in build_model(arm.config, len(tokenizer)).parameters()) == arm.parameters
    large = {"transfusion": {}, "mar": {"objective.kind": "mar", "objective.mar.head.width": 512}}
    with pytest.raises(ValueError, match="make its head or depth smaller"):
        ablate.read(written(tmp_path, config, equal="parameters", arms=large))


def test_equal_flops(tmp_path: Path, config: Config) -> None:
    _, arms = ablate.read(written(tmp_path, config, equal="flops"))
    total = [arm.flops * arm.config.train.steps for arm in arms]
    assert abs(total[1] / total[0] - 1) <= 0.5 * arms[1].flops / total[0] + 1e-9
    tokenizer = Tokenizer.of(config)
    corpus = Corpus(config.data.train, tokenizer, config)
    model = build_model(config, len(tokenizer))
    with FlopCounterMode(display=False) as counter:
        losses = model(ready(corpus, corpus.first_step().micro[0]))
        (losses.text + losses.image).backward()
    assert arms[0].flops == counter.get_total_flops()


def test_intervals_equal_those_of_scipys_t_distribution() -> None:
    values = [0.9, 0.95, 0.97]
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    interval = ablate.interval(values)
    assert interval.mean == pytest.approx((low + high) / 2)
    assert interval.half_width == pytest.approx((high - low) / 2)
    assert ablate.intervals([[1.0, 2.0], [3.0, 2.0]]).mean == [2.0, 2.0]
    assert ablate.intervals([[1.0, 0.9], [3.0, 0.95], [2.0, 0.97]]).at(1) == interval
    assert ablate.interval([1.0]) == ablate.Interval(1.0, None)


def test_the_summary_has_numbers_that_all_runs_report() -> None:
    runs = [
        {"a": 1, "b": 2.0, "c": [1, 2], "d": "x", "e": True, "f": [], "g": 1},
        {"a": 3, "b": 2.0, "c": [3, 2], "g": None},
    ]
    assert set(ablate.summary(runs)) == {"a", "b", "c"}


def test_nested_keys() -> None:
    tree = ablate.nested({"train.lr": 1, "train": {"steps": 2}, "sample.steps": 3, "run": {"seed": 1}, "run.seed": 2})
    assert tree == {"train": {"lr": 1, "steps": 2}, "sample": {"steps": 3}, "run": {"seed": 2}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"equal": "minutes"}, "equal"),
        ({"arm": {}}, "arm"),
        ({"arms": {"a": {"train.stepz": 3}}}, "arm 'a': unknown key 'train.stepz', did you mean 'train.steps'"),
        ({"seeds": []}, "seeds"),
    ],
)
def test_invalid_files_raise_with_the_key(tmp_path: Path, config: Config, fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ablate.read(written(tmp_path, config, **fields))


def test_runs_resume_and_failures_are_named(tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command is one process; finished runs are not repeated, and a failed run stops the ablation."""
    commands: list[tuple[str, str]] = []
    broken = {"seed": 1}

    def fake(words: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        settings = yaml.safe_load(Path(words[-1]).read_text())
        commands.append((words[3], f"{settings['objective']['kind']} {settings['run']['seed']}"))
        if settings["run"]["seed"] == broken["seed"]:
            return subprocess.CompletedProcess(words, 1)
        if words[3] == "eval":
            score = 0.5 + 0.1 * settings["run"]["seed"]
            report = {"t2i_accuracy": score, "train_seconds": 12.0, "reference_generators": {}, "val": [1.0, score]}
            (Path(settings["run"]["dir"]) / "report.json").write_text(json.dumps(report))
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(subprocess, "run", fake)
    path, lines = written(tmp_path, config), list[str]()
    with pytest.raises(ChildProcessError, match=r"train of .*transfusion/seed-1 ended with code 1: see .*train\.log"):
        ablate.ablate(path, lines.append)
    assert commands[:4] == [
        ("train", "transfusion 0"),
        ("eval", "transfusion 0"),
        ("train", "mar 0"),
        ("eval", "mar 0"),
    ]
    partial = json.loads((tmp_path / "out" / "report.json").read_text())
    assert partial["seeds"] == [0]
    commands.clear()
    broken.clear()
    broken["seed"] = -1
    report = asdict(ablate.ablate(path, lines.append))
    assert [seed for _, seed in commands] == ["transfusion 1", "transfusion 1", "mar 1", "mar 1"]
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    arm = report["arms"]["mar"]
    assert arm["t2i_accuracy"]["mean"] == pytest.approx(0.55)
    assert arm["seconds_per_step"]["mean"] == 2.0
    assert arm["val"]["mean"] == pytest.approx([1.0, 0.55])
    other = written(tmp_path, config, arms={"transfusion": {"train.lr": 0.5}})
    with pytest.raises(ValueError, match="choose another `out`"):
        ablate.ablate(other, lines.append)
