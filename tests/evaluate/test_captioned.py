"""Scores of captioned images without labels: words, distances, classes, matching, and a whole report."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from data_prep import folder
from data_prep import tokenizer as bpe
from mmgen.config import Config, DataConfig, PatcherConfig
from mmgen.config_io import override
from mmgen.data.loader import Corpus
from mmgen.data.shards.samples import Sample
from mmgen.data.views import AFTER, TEXT, Views
from mmgen.evaluate import matching
from mmgen.evaluate.captioned import captioned, evaluate_captioned
from mmgen.evaluate.classes import UNKNOWN, Classes, ClassJudge, accuracy
from mmgen.evaluate.distances import kernel_distance, spread_ratio
from mmgen.evaluate.extractors import PixelValues, build_extractor
from mmgen.evaluate.features import Pictures
from mmgen.evaluate.matching import Pair, match, pairs
from mmgen.evaluate.references import BASELINES, References
from mmgen.evaluate.summary import ROWS, table
from mmgen.evaluate.words import exact, f1, mean, share
from mmgen.image.patch import PixelPatcher
from mmgen.model import MMGenModel
from mmgen.sequence.document import TextSegment
from mmgen.sequence.tokenizer import Tokenizer
from mmgen.train.checkpoint.read import load_model, newest_good
from mmgen.train.loop import train
from tests.cli.test_init import COLOURS, pictures
from tests.data.common import tar_of

RNG = np.random.default_rng(0)
GRID = (2, 2)


@pytest.mark.parametrize(
    ("written", "wanted", "expected"),
    [
        ("a red box", "A red box.", 1.0),
        ("a red box", "a blue box", 2 / 3),
        ("a a a", "a b", 2 / 5),
        ("", "", 1.0),
        ("", "a", 0.0),
        ("Ein Hund", "ein hund!", 1.0),
    ],
)
def test_f1_counts_each_word_as_often_as_it_occurs(written: str, wanted: str, expected: float) -> None:
    assert f1(written, wanted) == pytest.approx(expected)


def test_shares_have_wilsons_interval_and_means_students() -> None:
    """Against Wilson's closed form (1927) and the textbook interval of a mean."""
    found, p, n, z = share([True] * 18 + [False] * 2), 0.9, 20, 1.959964
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert (found.mean, found.low, found.high) == pytest.approx(
        (p, (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)), abs=1e-5
    )
    values = [1.0, 2.0, 4.0]
    found = mean(values)
    assert found.mean == pytest.approx(7 / 3)
    assert found.high == pytest.approx(7 / 3 + 4.302653 * np.std(values, ddof=1) / math.sqrt(3))
    assert exact(["a b", "c"], ["A b.", "d"]).mean == 0.5
    with pytest.raises(ValueError, match="nothing"):
        share([])


def test_the_kernel_distance_is_the_unbiased_mmd() -> None:
    """Against the double sum of Binkowski et al. 2018, equation (4)."""
    a, b = RNG.normal(size=(5, 3)), RNG.normal(1, 1, size=(6, 3))

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / 3 + 1) ** 3)

    same_a = sum(kernel(a[i], a[j]) for i in range(5) for j in range(5) if i != j) / 20
    same_b = sum(kernel(b[i], b[j]) for i in range(6) for j in range(6) if i != j) / 30
    across = sum(kernel(x, y) for x in a for y in b) / 30
    assert kernel_distance(a, b) == pytest.approx(same_a + same_b - 2 * across)
    equal = [kernel_distance(RNG.normal(size=(50, 3)), RNG.normal(size=(50, 3))) for _ in range(50)]
    assert abs(np.mean(equal)) < 3 * np.std(equal) / math.sqrt(50) + 0.05


def test_the_spread_of_one_caption_is_compared_with_the_real_one() -> None:
    real = RNG.normal(size=(400, 2))
    groups = ["a", "b"] * 200
    assert spread_ratio(0.5 * real, real, groups) == pytest.approx(0.25)
    centred = np.where(np.arange(400)[:, None] % 2 == 0, 5.0, -5.0) * np.ones((400, 2))
    assert spread_ratio(centred, real, groups) == 0, "the distance between captions does not count"
    assert spread_ratio(real, real, range(400)) is None


def test_captions_are_those_that_training_reads_and_longer_documents_are_left_out(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    picture = (pictures(tmp_path / "in", 1) / "0000.png").read_bytes()
    for i in range(20):
        members |= {f"{i:02d}.png": picture, f"{i:02d}.json": json.dumps({"long": f"long {i}"}).encode()}
    listed = json.dumps(["make it", {"image": "a.png"}, "red", {"image": "b.png"}]).encode()
    members |= {"pair.a.png": picture, "pair.b.png": picture, "pair.json": listed}
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of(members))
    patcher = PixelPatcher(PatcherConfig(image_sizes=[(8, 8)]))
    found = captioned(Pictures([str(path)], patcher, [], DataConfig(captions={"long": 1.0})))
    assert sorted(sample.caption for sample in found.samples) == sorted(f"long {i}" for i in range(20))


def test_repeated_captions_do_not_count_as_variety() -> None:
    """As many prompts as real pictures, or three times as many: the same variety."""
    data = np.random.default_rng(1)
    images = [Image.fromarray(data.integers(256, size=(4, 4, 3), dtype=np.uint8)) for _ in range(40)]
    samples = [Sample("s", str(i), (), True) for i in range(40)]
    sides = Pictures.__new__(Pictures)
    sides.samples, sides.images, sides.pixels = samples, images, [np.asarray(image) for image in images]
    real = References(PixelValues("", torch.device("cpu")), sides, sides, 40)
    drawn = [Image.fromarray(data.integers(256, size=(4, 4, 3), dtype=np.uint8)) for _ in range(40)]
    captions = ["a", "b"] * 20
    once, often = real.scores(drawn, captions), real.scores(drawn * 3, captions * 3)
    assert once["diversity_ratio"] == often["diversity_ratio"]


def test_a_caption_names_one_class_or_none() -> None:
    classes = Classes(["shirt", "t-shirt", "boot"])

    def name(caption: str) -> str | None:
        found = classes.of(caption)
        return None if found == UNKNOWN else classes.names[found]

    assert name("a photo of a T-shirt") == "t-shirt"
    assert name("a shirt") == "shirt"
    assert name("a shirt and a boot") is None
    assert name("boots") is None


def test_the_judge_of_classes_reads_pictures_and_shuffled_captions_are_chance() -> None:
    labels, colours = np.arange(80) % 4, np.array([*COLOURS.values()])
    images = [
        Image.fromarray(np.clip(colours[k] + RNG.integers(-40, 40, (6, 6, 3)), 0, 255).astype(np.uint8)) for k in labels
    ]
    judge = ClassJudge(PixelValues("", torch.device("cpu")), images[:40], labels[:40])
    assert accuracy(judge.read(images[40:]), labels[40:]).mean > 0.95
    assert accuracy(judge.read(images[40:]), np.roll(labels[40:], -1)).mean < 0.1
    with pytest.raises(ValueError, match=r"fewer than two of eval\.classes"):
        ClassJudge(PixelValues("", torch.device("cpu")), images[:40], np.zeros(40, dtype=np.int64))
    with pytest.raises(ValueError, match=r"names exactly one of eval\.classes"):
        accuracy(labels, np.full(80, UNKNOWN))


@pytest.mark.parametrize(
    ("kind", "weights", "message"),
    [
        ("pixel", "", "did you mean 'pixels'"),
        ("transformers", "", "set eval.features_model"),
        ("transformers", "no/such", "cannot be loaded"),
    ],
)
def test_missing_features_are_explained(kind: str, weights: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=message):
        build_extractor(kind, weights)


def test_a_vision_model_of_transformers_gives_features(tmp_path: Path) -> None:
    """A random DINOv2 on disk, against a call of the library."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    model = Dinov2Model(Dinov2Config(**sizes)).eval()
    model.save_pretrained(tmp_path)
    processor = BitImageProcessor(
        size={"height": 28, "width": 28}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor.save_pretrained(tmp_path)
    images = [Image.fromarray(RNG.integers(256, size=(8, 8), dtype=np.uint8)) for _ in range(70)]
    extractor = build_extractor("transformers", str(tmp_path))
    found = extractor(images)
    with torch.no_grad():
        one = processor(images=[images[69].convert("RGB")], return_tensors="pt")
        expected = model(**one).pooler_output
    np.testing.assert_allclose(found[69:], expected.numpy(), atol=1e-5)
    assert found.shape == (70, 16)
    assert len(extractor.fingerprint) == 16


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of three steps on boxes of four colours."""
    at = tmp_path_factory.mktemp("captioned")
    folder.main(pictures(at / "in", 240), out=at / "set", val=0.1, test=0.2)
    shards = {name: [str(at / "set" / f"set-{name}-*.tar")] for name in ("train", "val", "test")}
    bpe.main(*shards["train"], out=at / "tokenizer.json", vocabulary=300)
    settings = {
        "run": {"dir": at / "run"},
        "data": {
            "train": shards["train"], "val": shards["val"], "tokenizer": at / "tokenizer.json", "row_length": 64,
            "workers": 0,
        },
        "model": {
            "backbone": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
                         "intermediate_size": 32},
            "patcher": {"channels": 3, "patch_size": 4, "image_sizes": [[8, 8]]},
        },
        "train": {"steps": 3, "batch_rows": 4, "save_every": 3, "sample_every": 0, "tensorboard": False},
        "sample": {"steps": 2, "max_new_tokens": 8},
        "eval": {"test": shards["test"], "samples": 30, "choices": 4},
    }  # fmt: skip
    config = override(Config(), settings)
    train(config)
    return config


def test_every_score_is_in_the_report_and_in_its_table(run: Config, capsys: pytest.CaptureFixture[str]) -> None:
    config = override(run, {"eval": {"classes": list(COLOURS), "guidance_curve": [1.0]}})
    checkpoint = newest_good(config.run.dir)
    assert checkpoint is not None
    model, tokenizer = loaded(config), Tokenizer.of(config)
    flat = evaluate_captioned(model, tokenizer, config, checkpoint.state, lambda line: None).flat()
    assert {row.key for row in ROWS} <= set(flat) | {"fd_unbiased"}
    assert flat["i2t_exact"] <= 0.2, "an untrained model writes no caption"
    assert flat["i2t_exact_commonest"] > 0.1
    assert flat["match_chance"] == 0.25
    assert flat["t2i_ceiling"] > 0.9
    assert flat["nn_distance_ratio"] > 1.5, "an untrained model draws noise"
    assert flat["two_sample_accuracy"] > flat["two_sample_accuracy_floor"] - 0.2
    assert set(flat["reference_generators"]) == set(BASELINES)
    assert flat["reference_generators"]["random_training_picture"]["nn_distance_ratio"] == pytest.approx(0, abs=0.02)
    assert flat["guidance_curve"][0]["guidance"] == 1.0
    known = flat["provenance"]
    assert known["step"] == 3
    assert known["tokenizer_fingerprint"] == tokenizer.fingerprint
    assert known["versions"]["torch"]
    assert (config.run.dir / "samples" / "evaluation.png").exists()
    Console(width=200).print(table(flat))
    assert "i2t_exact" in capsys.readouterr().out


def loaded(config: Config) -> MMGenModel:
    checkpoint = newest_good(config.run.dir)
    assert checkpoint is not None
    return load_model(checkpoint.folder)[0]


def corpus_of(config: Config) -> Corpus:
    return Corpus(config.eval.test, Tokenizer.of(config), config)


def test_captions_to_choose_from_differ_and_do_not_depend_on_the_run(run: Config) -> None:
    asked = pairs(corpus_of(run), 20, 4, GRID)
    again = pairs(corpus_of(override(run, {"run": {"seed": 7}})), 20, 4, GRID)
    assert len(asked) == 20
    for one, other in zip(asked, again, strict=True):
        assert len({tuple(caption.ids) for caption in one.captions}) == 4
        assert [c.ids for c in one.captions] == [c.ids for c in other.captions]
    own = Counter(tuple(pair.captions[0].ids) for pair in asked)
    assert len(own) == 4
    assert len(pairs(corpus_of(run), 20, 40, GRID)[0].captions) == 4, "there are four captions only"


@pytest.mark.parametrize("own", [0, 3])
def test_the_caption_with_the_lowest_loss_is_picked(run: Config, monkeypatch: pytest.MonkeyPatch, own: int) -> None:
    """With losses that are lowest for caption `own` of four: all are right if that is the first, else none."""

    def known(model: object, patcher: object, batch: object, sums: Tensor, counts: Tensor) -> None:
        losses = torch.where(torch.arange(len(sums)) % 4 == own, 0.0, 1.0).double()
        sums[:, AFTER], sums[:, len(TEXT)] = losses, losses

    monkeypatch.setattr(matching, "add_losses", known)
    corpus = corpus_of(run)
    found = match(loaded(run), corpus, pairs(corpus, 12, 4, GRID), by_image=True)
    assert found.by_image is not None
    assert found.by_text.mean == found.by_image.mean == float(own == 0)


def test_all_captions_of_a_picture_are_compared_with_the_same_noise(run: Config) -> None:
    corpus = corpus_of(run)
    views = Views(corpus, loaded(run).build_patcher())
    pair, other = pairs(corpus, 2, 4, GRID)

    def keys(pair: Pair, caption: TextSegment) -> list[int]:
        (batch,) = views.packed(list(views.image_views(0, [caption, pair.picture], pair.decoded, 0)), 1, 8)
        return [int(key) for key in batch.raw.noise_key_C if key]

    first = keys(pair, pair.captions[0])
    assert first == keys(pair, pair.captions[1])
    assert len(set(first)) == 8
    assert not set(first) & set(keys(other, pair.captions[0]))
