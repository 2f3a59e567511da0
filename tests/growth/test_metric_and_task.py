"""Adding a metric or a task: one function or class, and one line of a registry."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmgen.config import PatcherConfig
from mmgen.evaluate.baselines import BASELINES, draw_baseline
from mmgen.evaluate.features import Pictures, Real
from mmgen.evaluate.judge import Judge
from mmgen.evaluate.metrics import METRICS, Drawn, score
from mmgen.evaluate.report import CaptionScores, HeldOutLosses, Report, caption_scores
from mmgen.evaluate.tasks import TASKS, Mark, Object, Pixels, Task
from mmgen.image.patch import PixelPatcher
from tests.conftest import write_tar

COUNT = 80


class Upper(Task):
    """A digit in the upper half of a grey picture of 16 rows; captions are like `upper 7`."""

    def parse(self, caption: str) -> frozenset[Object] | None:
        words = caption.split()
        return frozenset({Object(int(words[1]))}) if len(words) == 2 and words[0] == "upper" else None

    def marks(self, pixels: Pixels) -> list[Mark] | None:
        return None if pixels[8:].max() > 64 else [Mark(pixels[:8])]

    def compose(self, digits: Sequence[tuple[Pixels, Object]]) -> Pixels:
        return np.concatenate([digits[0][0], np.zeros((8, 8), np.uint8)])


def png(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def noisy_digit(digit: int, rng: np.random.Generator) -> Pixels:
    """Ten patterns that any classifier can distinguish."""
    grey = rng.integers(0, 40, (8, 8)).astype(np.uint8)
    grey[digit % 8, : 4 + digit // 8 * 4] = 255
    return grey


def shard(path: Path, task: Task | None, count: int, seed: int) -> str:
    """Labelled pictures of a task, or of digits alone."""
    rng, members = np.random.default_rng(seed), dict[str, bytes]()
    for i in range(count):
        thing = Object(i % 10)
        grey = noisy_digit(i % 10, rng)
        members[f"{i:03d}.png"] = png(task.compose([(grey, thing)]) if task else grey)
        members[f"{i:03d}.json"] = json.dumps({"caption": f"upper {i % 10}", "objects": [thing.as_dict()]}).encode()
    return str(write_tar(path, members))


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """Pictures of the new task, where only the first is wrong."""
    monkeypatch.setitem(TASKS, "upper", Upper)
    task = TASKS["upper"]()
    patcher = PixelPatcher(PatcherConfig(channels=1, patch_size=2, image_sizes=[(16, 8)]))
    train, test = (
        Pictures([shard(tmp_path / f"{name}.tar", task, COUNT, seed)], patcher, [])
        for seed, name in enumerate(("train", "test"))
    )
    judge = Judge(task, [shard(tmp_path / "judge.tar", None, COUNT, 2)])
    wanted = [frozenset({Object((i + (i == 0)) % 10)}) for i in range(COUNT)]
    return Drawn(test.pixels, wanted, Real(task, train, test, COUNT), judge)


def test_a_new_task_is_scored(drawn: Drawn) -> None:
    found = score(drawn)
    assert list(found) == list(METRICS)
    assert found["t2i_accuracy"] == pytest.approx(1 - 1 / COUNT)
    assert caption_scores(["upper 1", "lower 1"], drawn.real.task, [frozenset({Object(1)})] * 2) == CaptionScores(
        2, 0.5
    )
    baseline = draw_baseline(BASELINES["class_mean_plus_noise"], drawn.wanted, drawn.real)
    assert score(Drawn(baseline, drawn.wanted, drawn.real, drawn.judge))["within_class_variance_ratio"] is not None


def test_a_new_metric_is_reported(drawn: Drawn, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report has it under its name, for the model and for every baseline."""
    monkeypatch.setitem(METRICS, "mean_pixel", lambda drawn: float(np.mean(drawn.pictures)))
    found = score(drawn)
    assert found["mean_pixel"] == pytest.approx(np.mean(drawn.pictures))
    flat = report(found).flat()
    assert flat["mean_pixel"] == found["mean_pixel"]
    assert flat["reference_generators"]["class_gaussian"]["mean_pixel"] == found["mean_pixel"]


def report(scores: dict[str, float | None]) -> Report:
    return Report(
        step=7,
        t2i_n=60,
        t2i_guidance=1.5,
        t2i_solver_steps=4,
        seconds_per_image=0.1,
        scores=scores,
        t2i_accuracy_w1=0.5,
        t2i_accuracy_shuffled=0.1,
        t2i_ceiling=1.0,
        fd_pixel_floor=0.2,
        two_sample_accuracy_real=0.5,
        t2i_accuracy_heldout_combination=None,
        captions=CaptionScores(60, 0.9),
        losses=None,
        bad_samples=0,
        train_seconds=3.0,
        parameters=10,
        reference_generators={"class_gaussian": scores},
        eval_seconds=1.0,
    )


def test_a_report_is_flat_and_omits_scores_that_were_not_requested() -> None:
    """The keys of `report.json` have a fixed order, and a metric without a value is null."""
    scores = {**dict.fromkeys(METRICS, 0.5), "fd_pixel_unbiased": None}
    begin = ["step", "t2i_n", "t2i_guidance", "t2i_solver_steps", "seconds_per_image", "t2i_accuracy", "fd_pixel"]
    begin += ["fd_pixel_unbiased", "within_class_variance_ratio", "two_sample_accuracy", "nn_distance_ratio"]
    begin += ["t2i_accuracy_w1", "t2i_accuracy_shuffled", "t2i_ceiling", "fd_pixel_floor", "two_sample_accuracy_real"]
    end = ["bad_samples", "train_seconds", "parameters", "reference_generators", "eval_seconds"]
    plain = report(scores)
    assert list(plain.flat()) == [*begin, "i2t_n", "i2t_accuracy", *end]
    assert plain.flat()["fd_pixel_unbiased"] is None
    full = replace(plain, t2i_accuracy_heldout_combination=0.3, losses=HeldOutLosses(1.0, 2.0, [2.0]))
    losses = ["val_loss_text", "val_loss_image", "val_loss_image_by_place"]
    middle = ["t2i_accuracy_heldout_combination", "i2t_n", "i2t_accuracy", *losses]
    assert list(full.flat()) == [*begin, *middle, *end]
