"""Ablations: the runs of a file, arms made equal, statistics over seeds, and trainings that are not repeated."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

from mmgen import ablate
from mmgen.ablate import equal, runs, statistics
from mmgen.ablate.arms import nested
from mmgen.cli.ablate import table, table_of_differences
from mmgen.config import Config
from mmgen.config_io import override
from mmgen.data.documents import Share
from mmgen.data.loader import Corpus
from mmgen.model import build_model
from mmgen.sequence.tokenizer import Tokenizer
from mmgen.train.flops import Arithmetic
from tests.conftest import pairs, write_tar


@pytest.fixture
def labelled(tmp_path: Path, config: Config) -> Config:
    """Settings whose shards have labels and a judge."""
    members = pairs(40)
    for name in members:
        if name.endswith(".json"):
            members[name] = json.dumps({**json.loads(members[name]), "objects": [{"digit": 1}]}).encode()
    shards = [str(write_tar(tmp_path / "labelled.tar", members))]
    return override(config, {"data": {"train": shards, "val": shards}, "eval": {"judge": shards, "test": shards}})


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


SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 160}


def proportions(arm: ablate.Arm) -> tuple[float, float, float]:
    """Feed-forward width, depth and width of the head, each over the width."""
    backbone = arm.config.model.backbone
    width = backbone.hidden_size
    return (
        backbone.intermediate_size / width,
        backbone.num_hidden_layers / width,
        arm.config.objective.mar.head.width / width,
    )


@pytest.mark.slow
def test_equal_parameters_scale_all_parts_together(tmp_path: Path, config: Config) -> None:
    config = override(config, {"model": {"backbone": SIZES}})
    mar = {"objective.kind": "mar", "objective.mar.head.width": 64}
    arms = {"transfusion": {}, "mar": mar, "raster": {**mar, "objective.mar.order": "raster"}}
    _, unequal = ablate.read(written(tmp_path, config, arms=arms))
    _, found = ablate.read(written(tmp_path, config, arms=arms, equal="parameters"))
    assert found[0] == unequal[0]
    tokenizer = Tokenizer.of(config)
    for before, arm in zip(unequal[1:], found[1:], strict=True):
        assert before.parameters / found[0].parameters > 1.2
        assert abs(arm.parameters / found[0].parameters - 1) <= equal.TOLERANCE
        assert sum(p.numel() for p in build_model(arm.config, len(tokenizer)).parameters()) == arm.parameters
        old, new = proportions(before), proportions(arm)
        assert new[0] == pytest.approx(old[0], rel=equal.RATIO)
        assert new[1] == pytest.approx(old[1], rel=0.34)  # whole layers
        assert new[2] == pytest.approx(old[2], rel=0.03)
        assert arm.config.model.backbone.hidden_size < 64
        assert f"width {arm.shape.hidden_size}, feed-forward {arm.shape.intermediate_size}" in arm.line
        assert arm.shape.objective["head"]["width"] == arm.config.objective.mar.head.width


def test_arms_that_cannot_be_equal_are_refused(tmp_path: Path, config: Config) -> None:
    large = {"transfusion": {}, "mar": {"objective.kind": "mar", "objective.mar.head": {"width": 512, "depth": 40}}}
    with pytest.raises(ValueError, match="arm 'mar' cannot have .* within 1%"):
        ablate.read(written(tmp_path, config, equal="parameters", arms=large))
    pretrained = {"transfusion": {}, "other": {"model.backbone": "gpt2"}}
    with pytest.raises(ValueError, match="arm 'other': a pretrained backbone has a fixed number"):
        ablate.read(written(tmp_path, config, equal="parameters", arms=pretrained))


def test_equal_flops(tmp_path: Path, config: Config) -> None:
    _, arms = ablate.read(written(tmp_path, config, equal="flops", common={"train.steps": 200}))
    total = [arm.flops * arm.config.train.steps for arm in arms]
    assert total[1] == pytest.approx(total[0], rel=0.5 / 100)
    tokenizer = Tokenizer.of(config)
    for arm in arms:
        corpus = Corpus(config.data.train, tokenizer, arm.config)
        counter = Arithmetic(build_model(arm.config, len(tokenizer)))
        steps = [counter.of(step.micro) for step in corpus.steps(0, equal.STEPS, corpus.start, Share())]
        assert arm.flops == pytest.approx(np.mean(steps), rel=1e-12)


def test_intervals_equal_those_of_scipys_t_distribution() -> None:
    values = [0.9, 0.95, 0.97]
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    interval = statistics.interval(values)
    assert interval.mean == pytest.approx((low + high) / 2)
    assert interval.half_width == pytest.approx((high - low) / 2)
    assert statistics.intervals([[1.0, 2.0], [3.0, 2.0]]).mean == [2.0, 2.0]
    assert statistics.intervals([[1.0, 0.9], [3.0, 0.95], [2.0, 0.97]]).at(1) == interval
    assert statistics.interval([1.0]) == ablate.Interval(1.0, None)


def test_the_summary_has_numbers_that_all_runs_report() -> None:
    runs = [
        {"a": 1, "b": 2.0, "c": [1, 2], "d": "x", "e": True, "f": [], "g": 1},
        {"a": 3, "b": 2.0, "c": [3, 2], "g": None},
    ]
    assert set(statistics.summary(runs)) == {"a", "b", "c"}


def test_nested_keys() -> None:
    tree = nested({"train.lr": 1, "train": {"steps": 2}, "sample.steps": 3, "run": {"seed": 1}, "run.seed": 2})
    assert tree == {"train": {"lr": 1, "steps": 2}, "sample": {"steps": 3}, "run": {"seed": 2}}


def wide(mean: float, seeds: int, draws: int, correlation: float, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Scores [draws, seeds] of two arms that share part of the noise of each seed; the first is better by `mean`."""
    shared, *own = rng.standard_normal((3, draws, seeds))
    first, second = (correlation**0.5 * shared + (1 - correlation) ** 0.5 * part for part in own)
    return mean + first, second


def unpaired(ours: list[float], theirs: list[float]) -> statistics.Difference:
    """Welch's interval, which ignores that runs share seeds."""
    found = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval()
    return statistics.Difference(float(found.low + found.high) / 2, float(found.high - found.low) / 2, None)


def coverage(count: Callable[..., statistics.Difference]) -> tuple[float, float]:
    """Share of 1,500 simulated ablations of five seeds whose interval holds the true difference; mean half-width."""
    ours, theirs = wide(0.3, 5, 1500, correlation=0.8, rng=np.random.default_rng(0))
    found = [count(a.tolist(), b.tolist()) for a, b in zip(ours, theirs, strict=True)]
    return float(np.mean([abs(each.mean - 0.3) <= each.half_width for each in found])), float(
        np.mean([each.half_width for each in found])
    )


def test_paired_intervals_cover_at_their_rate_and_unpaired_ones_are_wider() -> None:
    covered, width = coverage(statistics.difference)
    assert abs(covered - 0.95) < 3 * (0.95 * 0.05 / 1500) ** 0.5
    loose, wider = coverage(unpaired)
    assert wider > 1.5 * width
    assert loose > 0.985  # the same bound finds that seeds were not paired


@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_the_difference_equals_scipys_paired_test(seeds: int) -> None:
    ours, theirs = (row[0].tolist() for row in wide(1.0, seeds, 1, 0.5, np.random.default_rng(seeds)))
    found = statistics.difference(ours, theirs)
    test = stats.ttest_rel(ours, theirs)
    low, high = test.confidence_interval()
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx((low, high))
    assert found.half_width != pytest.approx(unpaired(ours, theirs).half_width, rel=0.01)
    assert statistics.difference([1.5], [1.0]) == statistics.Difference(0.5, None, None)


@pytest.mark.parametrize("seeds", [2, 3, 5, 8])
def test_the_smallest_detectable_difference_is_found_four_times_in_five(seeds: int) -> None:
    """With the true standard deviation 1 of pairs, 20,000 simulated t-tests."""
    shift = statistics.detectable_shift(seeds)
    pairs = np.random.default_rng(1).standard_normal((20_000, seeds)) + shift / seeds**0.5
    found = np.mean(stats.ttest_1samp(pairs, 0.0, axis=1).pvalue < 0.05)
    assert found == pytest.approx(0.8, abs=3 * (0.16 / 20_000) ** 0.5)
    values = pairs[0].tolist()
    detectable = statistics.difference(values, [0.0] * seeds).detectable
    assert detectable == pytest.approx(shift * np.std(values, ddof=1) / seeds**0.5)


def test_many_seeds_need_the_normal_distribution() -> None:
    assert statistics.detectable_shift(10_000) == pytest.approx(stats.norm.ppf(0.975) + stats.norm.ppf(0.8), rel=1e-3)


def test_the_baseline_of_a_cell_is_the_baseline_arm_at_the_same_point(tmp_path: Path, config: Config) -> None:
    path = written(tmp_path, config, baseline="mar", grid={"sample.steps": [2, 3]})
    _, arms = ablate.read(path)
    assert {arm.name: arm.baseline for arm in arms} == {
        "transfusion_steps=2": "mar_steps=2", "transfusion_steps=3": "mar_steps=3",
        "mar_steps=2": None, "mar_steps=3": "mar_steps=2",
    }  # fmt: skip
    with pytest.raises(ValueError, match="unknown .*baseline 'mra', did you mean 'mar'"):
        ablate.read(written(tmp_path, config, baseline="mra"))


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


class Commands:
    """Replaces the processes of an ablation by reports; `broken` is the seed whose runs fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, broken: int = -1) -> None:
        self.ran: list[tuple[str, str, int]] = []
        self.broken = broken
        monkeypatch.setattr(subprocess, "run", self)

    def __call__(self, words: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        settings = yaml.safe_load(Path(words[-1]).read_text())
        folder, seed, kind = Path(settings["run"]["dir"]), settings["run"]["seed"], settings["objective"]["kind"]
        self.ran.append((words[3], folder.parent.name, seed))
        if seed == self.broken:
            return subprocess.CompletedProcess(words, 1)
        if words[3] == "train":
            (folder / "checkpoints").mkdir()
            (folder / "checkpoints" / "step-6").write_text(folder.parent.name)
        else:
            assert (folder / "checkpoints" / "step-6").exists()
            score = 0.5 + 0.1 * seed + (0.3 + 0.02 * seed if kind == "mar" else 0)
            report = {"t2i_accuracy": score, "train_seconds": 12.0, "reference_generators": {}, "val": [1.0, score]}
            (folder / "report.json").write_text(json.dumps(report))
        return subprocess.CompletedProcess(words, 0)


def test_runs_resume_and_failures_are_named(tmp_path: Path, labelled: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command is one process; finished runs are not repeated, and a failed run stops the ablation."""
    commands = Commands(monkeypatch, broken=1)
    path, lines = written(tmp_path, labelled), list[str]()
    with pytest.raises(ChildProcessError, match=r"train of .*transfusion/seed-1 ended with code 1: see .*train\.log"):
        ablate.ablate(path, lines.append)
    assert commands.ran[:4] == [
        ("train", "transfusion", 0), ("eval", "transfusion", 0), ("train", "mar", 0), ("eval", "mar", 0),
    ]  # fmt: skip
    partial = json.loads((tmp_path / "out" / "report.json").read_text())
    assert partial["seeds"] == [0]
    assert partial["differences"]["mar"]["scores"]["t2i_accuracy"]["half_width"] is None
    commands = Commands(monkeypatch)
    found = ablate.ablate(path, lines.append)
    report = asdict(found)
    assert [(arm, seed) for _, arm, seed in commands.ran] == [("transfusion", 1)] * 2 + [("mar", 1)] * 2
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    arm = report["arms"]["mar"]
    assert arm["t2i_accuracy"]["mean"] == pytest.approx(0.86)
    assert arm["seconds_per_step"]["mean"] == 2.0
    assert arm["val"]["mean"] == pytest.approx([1.0, 0.86])
    difference = report["differences"]["mar"]
    assert difference["baseline"] == "transfusion"
    assert difference["scores"]["t2i_accuracy"]["mean"] == pytest.approx(0.31)
    assert difference["scores"]["t2i_accuracy"]["half_width"] == pytest.approx(12.706 * 0.01, rel=1e-3)  # t of 1 degree
    assert report["shapes"]["mar"]["hidden_size"] == 32
    (cells,) = [list(column.cells) for column in table_of_differences(found).columns[1:]]
    assert cells[0] == f"+0.31 ± 0.13 ({statistics.detectable_shift(2) * 0.01:.2g})"
    assert any("t2i_accuracy" in cell for cell in table(found).columns[0].cells)
    other = written(tmp_path, labelled, arms={"transfusion": {"train.lr": 0.5}})
    with pytest.raises(ValueError, match="choose another `out`"):
        ablate.ablate(other, lines.append)


def test_arms_that_differ_in_sampling_share_a_training(
    tmp_path: Path, labelled: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = Commands(monkeypatch)
    arms = {
        "plain": {}, "guided": {"sample.guidance_scale": 3.0}, "last": {"sample.weights": "weight", "eval.samples": 7},
        "other": {"train.lr": 0.5}, "other_guided": {"train.lr": 0.5, "sample.guidance_scale": 3.0},
    }  # fmt: skip
    path = written(tmp_path, labelled, arms=arms)
    found = ablate.ablate(path, print)
    trained = [(arm, seed) for command, arm, seed in commands.ran if command == "train"]
    assert trained == [(arm, seed) for seed in (0, 1) for arm in ("plain", "other")]
    assert len([command for command, *_ in commands.ran if command == "eval"]) == 2 * len(arms)
    assert {name: shape.trained_by for name, shape in found.shapes.items()} == {
        "plain": "plain", "guided": "plain", "last": "plain", "other": "other", "other_guided": "other",
    }  # fmt: skip
    (tmp_path / "moved").mkdir()
    (tmp_path / "out").rename(tmp_path / "moved" / "out")
    shared = tmp_path / "moved" / "out" / "guided" / "seed-1" / "checkpoints" / "step-6"
    assert shared.read_text() == "plain"


def test_a_training_that_an_arm_began_itself_is_completed(
    tmp_path: Path, labelled: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Versions that shared no training left such a folder; its checkpoint may be an early one."""
    path = written(tmp_path, labelled, arms={"plain": {}, "guided": {"sample.steps": 3}}, seeds=[0])
    (tmp_path / "out" / "guided" / "seed-0" / "checkpoints").mkdir(parents=True)
    commands = Commands(monkeypatch)
    with pytest.raises(FileExistsError):  # the replaced training finds its folder
        ablate.ablate(path, print)
    assert commands.ran[-1] == ("train", "guided", 0)


def test_without_a_judge_or_labels_losses_are_compared(tmp_path: Path, config: Config, labelled: Config) -> None:
    """A whole ablation of two steps, in processes of its own; nothing is scored."""
    digits = override(labelled, {"eval": {"task": "digits"}})
    unlabelled = override(digits, {"data": {"train": config.data.train}})
    (arm,) = ablate.read(written(tmp_path, unlabelled, arms={"a": {}}))[1]
    assert not arm.judged
    (arm,) = ablate.read(written(tmp_path, digits, arms={"a": {}}))[1]
    assert arm.judged
    (arm,) = ablate.read(written(tmp_path, labelled, arms={"a": {}}))[1]
    assert arm.judged
    with pytest.raises(ValueError, match="arm 'a' has nothing to compare: set data.val"):
        ablate.read(written(tmp_path, override(config, {"data": {"val": []}}), arms={"a": {}}))


@pytest.mark.slow
def test_an_ablation_without_a_judge(tmp_path: Path, config: Config) -> None:
    """Real processes of two steps: losses of the training itself, paired by seed, and a table of losses alone."""
    common = {"train": {"steps": 2, "save_every": 2, "peak_tflops": 1.0}}
    lines: list[str] = []
    found = ablate.ablate(written(tmp_path, config, common=common), lines.append)
    assert not [line for line in lines if line.endswith(": eval")]
    assert {"val_loss_text", "val_loss_image", "seconds_per_step"} <= set(found.differences["mar"].scores)
    last = json.loads((tmp_path / "out" / "mar" / "seed-1" / "metrics.jsonl").read_text().splitlines()[-1])
    run = json.loads((tmp_path / "out" / "mar" / "seed-1" / "report.json").read_text())
    assert run["val_loss_image"] == last["val_loss/image"]
    shown = {str(cell) for cell in table(found).columns[0].cells}
    assert {"val_loss_text", "val_loss_image"} <= shown
    assert not any("t2i" in cell or "fd_pixel" in cell for cell in shown)
    assert ablate.ablate(written(tmp_path, config, common=common), lines.append) == found


def test_losses_of_a_run_without_validation_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    with pytest.raises(ValueError, match="has no validation losses or no checkpoint"):
        runs.losses(tmp_path, 1)
