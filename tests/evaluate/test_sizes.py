"""Digits at two declared sizes: training, evaluation of both sizes, and the readings of the task at each."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data_prep import digits as digits_prep
from mmgen.config import Config, PatcherConfig
from mmgen.config_io import override
from mmgen.evaluate.baselines import draw_baseline, training_digit
from mmgen.evaluate.features import Pictures, Real
from mmgen.evaluate.judge import Judge
from mmgen.evaluate.metrics import METRICS, agreement
from mmgen.evaluate.report import Generator, evaluate, held_out_losses
from mmgen.evaluate.tasks import Digits, Scenes, resized
from mmgen.image.patch import PixelPatcher
from mmgen.train.checkpoint.read import load_model, read_trainer
from mmgen.train.loop import train
from tests.conftest import tiny, write_tar

SIZES = [(8, 8), (16, 16)]


def shard(folder: Path, name: str, count: int, sizes: list[tuple[int, int]]) -> str:
    """Real digits of a part; every other one is enlarged to the second size."""
    images, labels = digits_prep.split()[name]
    members = {}
    for i in range(count):
        picture = resized(images[i], sizes[i % len(sizes)])
        members[f"{i:04d}.png"] = digits_prep.png(picture)
        caption = {"caption": f"a {labels[i]}", "objects": [{"digit": int(labels[i])}]}
        members[f"{i:04d}.json"] = json.dumps(caption).encode()
    return str(write_tar(folder / f"{name}.tar", members))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of three steps on digits of 8x8 and 16x16 pixels, with rules by size and the image loss per image."""
    folder = tmp_path_factory.mktemp("sizes")
    by_side = {"base": 1.0, "patches": 4, "power": 0.5}
    config = override(tiny(folder), {
        "data": {
            "train": [shard(folder, "train", 400, SIZES)], "val": [shard(folder, "val", 20, SIZES)], "row_length": 64,
        },
        "model": {"patcher": {"channels": 1, "patch_size": 4, "image_sizes": SIZES}},
        "objective": {"image_loss": "image", "noise_scale": by_side, "time": {"shift": by_side}},
        "train": {"steps": 3, "save_every": 3, "batch_rows": 8},
        "sample": {"steps": 2},
        "eval": {
            "task": "digits", "judge": [shard(folder, "judge", 100, SIZES[:1])], "test": [shard(folder, "test", 144, SIZES)],
            "samples": 72, "batch": 72,
        },
    })  # fmt: skip
    assert train(config) == 0
    return config


def test_every_declared_size_is_scored(trained: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys of the first size are those of today; those of the second end with it."""
    drawn: list[tuple[int, int]] = []
    draw = Generator.draw

    def recorded(self: Generator, *arguments: object) -> list:
        images = draw(self, *arguments)
        drawn.extend(image.size for image in images)
        return images

    monkeypatch.setattr(Generator, "draw", recorded)
    folder = trained.run.dir / "checkpoints" / "latest"
    model, tokenizer = load_model(folder)
    lines: list[str] = []
    evaluate(model, tokenizer, trained, read_trainer(folder), lines.append)
    flat = json.loads((trained.run.dir / "report.json").read_text())
    assert drawn == [(8, 8)] * 144 + [(16, 16)] * 144
    pictures = [*METRICS, "t2i_n", "t2i_accuracy_w1", "t2i_accuracy_shuffled", "t2i_ceiling", "fd_pixel_floor"]
    pictures += ["two_sample_accuracy_real", "i2t_n", "i2t_accuracy", "seconds_per_image", "reference_generators"]
    for key in pictures:
        assert key in flat
        assert f"{key}_16x16" in flat
        assert f"{key}_8x8" not in flat
    assert flat["i2t_n"] == flat["i2t_n_16x16"] == 72
    assert flat["t2i_ceiling"] > 0.8
    assert flat["t2i_ceiling_16x16"] > 0.8, "the judge reads enlarged digits as it reads small ones"
    assert flat["val_loss_image_8x8"] != flat["val_loss_image_16x16"]
    assert min(flat["val_loss_image_8x8"], flat["val_loss_image_16x16"]) <= flat["val_loss_image"]
    assert {path.name for path in (trained.run.dir / "samples").iterdir()} >= {"evaluation.png", "evaluation_16x16.png"}


def test_losses_by_cell_are_those_of_the_first_size(trained: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patches of the larger size, whose cells have the same numbers, are not counted."""
    from mmgen.data.loader import Corpus
    from mmgen.evaluate import report

    model, tokenizer = load_model(trained.run.dir / "checkpoints" / "latest")
    corpus = Corpus(trained.data.val, tokenizer, trained, None)
    real, seen = report.held_out, []

    def recorded(*arguments: object):
        for batch, losses in real(*arguments):
            sizes = batch.grid_C2[batch.image_I[batch.loss_at_J]].prod(1)
            cells = batch.cell_I2[batch.loss_at_J]
            seen.extend(zip(sizes.tolist(), map(tuple, cells.tolist()), losses.image_J.tolist(), strict=True))
            yield batch, losses

    monkeypatch.setattr(report, "held_out", recorded)
    found = held_out_losses(model, corpus)
    for k, cell in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        expected = np.mean([loss for size, where, loss in seen if size == 4 and where == cell])
        assert found.val_loss_image_by_place[k] == pytest.approx(expected, rel=1e-5)
    by_size = {name: np.mean([loss for size, _, loss in seen if size == n]) for name, n in (("8x8", 4), ("16x16", 16))}
    assert found.by_size == pytest.approx(by_size, rel=1e-5)


def test_a_size_without_real_pictures_is_named(trained: Config, tmp_path: Path) -> None:
    folder = trained.run.dir / "checkpoints" / "latest"
    model, tokenizer = load_model(folder)
    only = override(trained, {"eval": {"test": [shard(tmp_path, "test", 72, SIZES[1:])]}})
    with pytest.raises(ValueError, match="no real pictures of 8x8, the first"):
        evaluate(model, tokenizer, only, read_trainer(folder), lambda line: None)


def test_enlarged_digits_are_read_exactly(tmp_path: Path) -> None:
    """A digit of twice the size has the same marks; so have baselines, and pictures of other tasks."""
    images, labels = digits_prep.split()["test"]
    for image in images[:20]:
        (mark,) = Digits().find(resized(image, (16, 16)))
        assert np.array_equal(mark.grey, image)
    scene = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert np.array_equal(resized(resized(scene, (48, 32)), (16, 16)), scene)
    scene[:] = 0
    scene[:8, :8, 0] = images[0]
    assert [mark.place for mark in Scenes().find(resized(scene, (32, 32)))] == ["top left"]

    patcher = PixelPatcher(PatcherConfig(channels=1, patch_size=4, image_sizes=SIZES))
    train_side, test_side = (Pictures([shard(tmp_path, name, 200, SIZES)], patcher, []) for name in ("train", "test"))
    real = Real(Digits(), train_side.of_size((16, 16)), test_side.of_size((16, 16)), 100)
    baseline = draw_baseline(training_digit, real.test_truth, real)
    assert {picture.shape for picture in baseline} == {(16, 16)}
    judge = Judge(Digits(), [shard(tmp_path, "judge", 200, SIZES[:1])])
    assert agreement(judge.read(baseline), real.test_truth) > 0.9
    enlarged = {picture.tobytes() for picture in train_side.of_size((16, 16)).pixels}
    assert all(picture.tobytes() in enlarged for picture in baseline), "real digits, enlarged as the data are"
    assert len(train_side.of_size((8, 8)).samples) == len(train_side.of_size((16, 16)).samples) == 100
