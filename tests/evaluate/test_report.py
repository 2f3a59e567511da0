"""Tasks and judge on real pictures, metrics against published formulas, and scores that expose each baseline."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from data_prep import digits as digits_prep
from data_prep import scenes as scenes_prep
from mmgen.config import PatcherConfig
from mmgen.data.shards.samples import BadRecord
from mmgen.evaluate.baselines import BASELINES, draw_baseline, training_digit
from mmgen.evaluate.distances import (
    frechet,
    frechet_unbiased,
    nearest_distance,
    two_sample_accuracy,
    within_class_variance,
)
from mmgen.evaluate.features import Pictures, Real, seventeen_values
from mmgen.evaluate.metrics import Drawn, agreement, score
from mmgen.evaluate.tasks import COLOURS, PLACES, Digits, Object, Scenes
from mmgen.image.patch import PixelPatcher
from tests.conftest import write_tar

objects = st.builds(Object, st.integers(0, 9), st.sampled_from(list(COLOURS)), st.sampled_from(list(PLACES)))


@given(st.lists(objects, min_size=1, max_size=2, unique_by=lambda o: o.place), st.integers(0, 10**6))
def test_every_caption_is_parsed_back(things: list[Object], seed: int) -> None:
    rng = np.random.default_rng(seed)
    caption = scenes_prep.describe(things, rng)
    assert Scenes().parse(caption) == frozenset(things), caption
    assert Digits().parse(digits_prep.caption(things[0].digit, rng)) == frozenset({Object(things[0].digit)})


@pytest.mark.parametrize(
    "caption", ["", "a red", "a red 7 top left and", "a red 7 top left and a blue 3 top left", "7 7"]
)
def test_scene_captions_without_a_clear_meaning_are_not_parsed(caption: str) -> None:
    assert Scenes().parse(caption) is None


@pytest.mark.parametrize("caption", ["", "a red", "7 7", "seven and 3", "a digit"])
def test_digit_captions_without_a_clear_meaning_are_not_parsed(caption: str) -> None:
    assert Digits().parse(caption) is None


@pytest.fixture(scope="module")
def splits() -> digits_prep.Split:
    return digits_prep.split()


def test_splits_share_no_image(splits: digits_prep.Split) -> None:
    contents = {name: {image.tobytes() for image in images} for name, (images, _) in splits.items()}
    assert sum(len(images) for images, _ in splits.values()) == 1797
    for a, b in combinations(contents, 2):
        assert len(contents[a] & contents[b]) == 0, (a, b)
    assert [len(splits[name][1]) for name in ("train", "val", "judge", "test")] == [1131, 126, 323, 217]
    for _, labels in splits.values():
        share = np.bincount(labels) / len(labels)
        assert np.abs(share - 0.1).max() < 0.02


def test_quadrants_and_colours_of_real_scenes_are_read_without_error(splits: digits_prep.Split) -> None:
    """The rules of the task are exact on scenes composed of every test digit."""
    rng = np.random.default_rng(0)
    images, labels = splits["test"]
    for i in range(len(images)):
        j = int(rng.integers(len(images)))
        colours = rng.choice(list(COLOURS), 2)
        places = rng.permutation(list(PLACES))[:2]
        things = [Object(int(labels[k]), str(c), str(p)) for k, c, p in zip((i, j), colours, places, strict=True)]
        marks = Scenes().marks(scenes_prep.paint([(images[i], things[0]), (images[j], things[1])]))
        assert {(m.colour, m.place) for m in marks} == {(t.colour, t.place) for t in things}
        for mark in marks:
            source = images[i] if mark.place == things[0].place else images[j]
            assert np.abs(mark.grey.astype(int) - source).max() <= 1


def test_training_scenes_have_no_held_out_combination() -> None:
    images, labels = digits_prep.split()["train"]
    for name, inside in (("train", False), ("heldout", True)):
        for sample in scenes_prep.scenes(name, 200, images, labels):
            held = [
                (list(COLOURS).index(o["colour"]), o["digit"]) in scenes_prep.HELD_OUT
                for o in sample["json"]["objects"]
            ]
            assert any(held) == inside
    assert 1 / 8 < len(scenes_prep.HELD_OUT) / 60 < 1 / 6


def test_frechet_equals_the_published_formula() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(300, 6)), 0.5 + rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6))
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(ca + cb - 2 * sqrtm(ca @ cb).real)
    assert frechet(a, b) == pytest.approx(expected, rel=1e-8)
    assert abs(frechet(a, a)) < 1e-9


def test_unbiased_frechet_equals_the_distance_of_the_distributions() -> None:
    """For 217 samples of each of two Gaussians in 64 dimensions, most of the plain distance is bias."""
    rng = np.random.default_rng(0)
    for shift, spread in ((0.0, 1.0), (0.1, 1.0), (0.05, 0.8)):
        exact = 64 * (shift**2 + (1 - spread) ** 2)  # |m|^2 + tr((1 - s)^2 I)
        pairs = [(rng.normal(size=(217, 64)), rng.normal(shift, spread, (217, 64))) for _ in range(4)]
        plain = np.mean([frechet(a, b) for a, b in pairs])
        unbiased = np.mean([frechet_unbiased(a, b) for a, b in pairs])
        assert plain - exact > 8
        assert abs(unbiased - exact) < 0.1 * (plain - exact)
    assert frechet_unbiased(rng.normal(size=(129, 64)), rng.normal(size=(400, 64))) is None, "too few pictures"


def test_nearest_distance_equals_scipy() -> None:
    from scipy.spatial import cKDTree

    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(40, 5)), rng.normal(size=(300, 5))
    assert nearest_distance(a, b) == pytest.approx(cKDTree(b).query(a)[0].mean())


def test_two_sample_accuracy_of_equal_and_of_shifted_sets() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 300, 5))
    assert abs(two_sample_accuracy(a, b) - 0.5) < 0.08
    assert two_sample_accuracy(a, b + 3) > 0.95


def real_of(splits: digits_prep.Split, tmp_path: Path) -> Real:
    """Real pictures, read from shards as `mmgen eval` does."""
    sides = []
    for name in ("train", "test"):
        members = {}
        for i, (image, label) in enumerate(zip(*splits[name], strict=True)):
            members[f"{i:04d}.png"] = digits_prep.png(image)
            members[f"{i:04d}.json"] = json.dumps({"caption": str(label), "objects": [{"digit": int(label)}]}).encode()
        members["9999.png"] = b"no image"
        members["9999.json"] = members["0000.json"]
        shard = write_tar(tmp_path / f"{name}.tar", members)
        bad: list[BadRecord] = []
        patcher = PixelPatcher(PatcherConfig(channels=1, patch_size=2, image_sizes=[(8, 8)]))
        sides.append(Pictures([str(shard)], patcher, bad))
        assert [item.key for item in bad] == ["9999"], "a broken picture is counted and left out"
    return Real(Digits(), *sides, n=500)


def test_each_baseline_has_a_bad_score(splits: digits_prep.Split, tmp_path: Path) -> None:
    """All four baselines have a perfect accuracy, but each has another score that is bad; real digits have none."""

    class Oracle:
        """A judge that reads every picture as its caption names it."""

        def read(self, pictures):
            return wanted[: len(pictures)]

    real = real_of(splits, tmp_path)
    wanted = [truth for truth in real.test_truth for _ in range(2)][:500]
    genuine = draw_baseline(training_digit, wanted, real)
    scores = {
        name: score(Drawn(draw_baseline(baseline, wanted, real), wanted, real, Oracle()))
        for name, baseline in BASELINES.items()
    }
    assert scores["class_mean_plus_noise"]["within_class_variance_ratio"] < 0.3
    assert scores["class_mean_plus_noise"]["two_sample_accuracy"] > 0.9
    assert scores["mean_of_two_training_images"]["within_class_variance_ratio"] < 0.7
    assert scores["noised_training_image"]["two_sample_accuracy"] > 0.8
    assert scores["class_gaussian"]["two_sample_accuracy"] > 0.7
    images, labels = splits["judge"]
    truths = [frozenset({Object(int(label))}) for label in labels]
    wanted = truths
    unseen = score(Drawn(list(images), truths, real, Oracle()))
    assert 0.85 < unseen["within_class_variance_ratio"] < 1.15
    assert unseen["two_sample_accuracy"] < 0.62
    assert unseen["fd_pixel"] < 3 * real.frechet(genuine)
    assert abs(unseen["fd_pixel_unbiased"]) < 0.3 * real.frechet(genuine)
    assert real.separable(genuine) < 0.62
    assert 0.9 < unseen["nn_distance_ratio"] < 1.1


def test_agreement_needs_every_attribute() -> None:
    right = frozenset({Object(7, "red", "top left"), Object(3, "blue", "top right")})
    assert agreement([right, None, right - {Object(7, "red", "top left")}, right], [right] * 4) == 0.5


def test_ink_in_another_quadrant_is_read() -> None:
    grey = np.full((8, 8), 255, np.uint8)
    picture = scenes_prep.paint([(grey, Object(1, "red", "top left"))])
    assert len(Scenes().marks(picture)) == 1
    picture[12, 12] = (90, 0, 0)
    assert Scenes().marks(picture) is None, "too bright for blank and too dark for ink"
    picture[12, 12] = (255, 0, 0)
    assert len(Scenes().marks(picture)) == 2


def test_within_class_variance() -> None:
    rng = np.random.default_rng(0)
    members = rng.normal(size=(5000, 3))
    assert within_class_variance({0: members, 1: members + 10}) == pytest.approx(3, rel=0.05)


def test_rounding_to_seventeen_values_changes_no_real_digit() -> None:
    for images, _ in digits_prep.split().values():
        assert np.array_equal(seventeen_values(images), images)
