"""The look at data and the rules for settings: what they find, that the settings are valid, and that they fit."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import yaml
from PIL import Image

from mmgen.config import Config
from mmgen.config_io import override
from mmgen.data.shards.samples import BadSample
from mmgen.model import MMGenConfig, MMGenModel
from mmgen.plan import plan
from mmgen.propose.file import as_settings, as_yaml
from mmgen.propose.look import Look
from mmgen.propose.measure import Pace
from mmgen.propose.settings import (
    EPOCHS,
    SIZES,
    Choice,
    Machine,
    Names,
    image_settings,
    propose,
    row_length,
    schedule,
    steps_for,
    vocabulary,
)

RNG = np.random.default_rng(0)
NAMES = Names("runs/my", "my-data/my-train-*.tar", "my-data/my-val-*.tar", "my-data/my-test-*.tar", "tokenizer.json")
CPU, GPU = Machine(gpu=False, minutes=30), Machine(gpu=True, minutes=30)


def png(height: int, width: int, grey: bool = False) -> bytes:
    buffer = io.BytesIO()
    shape = (height, width) if grey else (height, width, 3)
    Image.fromarray(RNG.integers(256, size=shape, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def look_of(sizes: list[tuple[int, int]], captions: list[str], grey: bool = False) -> Look:
    look = Look()
    for i, (height, width) in enumerate(sizes):
        look.add({"png": png(height, width, grey), "txt": captions[i % len(captions)].encode()})
    return look


def words(text: str) -> int:
    return len(text.split())


def test_a_look_counts_what_people_ask_about() -> None:
    look = look_of([(8, 8)] * 3 + [(16, 8)], ["ein Hund", "Кот", "a dog"])
    look.add({"png": png(8, 8, grey=True), "json": b'{"caption": ""}'})
    repeated = png(8, 8)
    look.add({"png": repeated, "txt": b"one"})
    look.add({"png": repeated, "txt": b"two"})
    text = "\n".join(look.lines())
    assert look.sizes == {(8, 8): 6, (16, 8): 1}
    assert "7 pictures and 6 texts" in text
    assert "86% coloured" in text
    assert "1 pictures have no text" in text
    assert "1 pictures equal an earlier one" in text
    assert "Latin" in text
    assert "Cyrillic" in text


def test_a_grey_picture_stored_in_colour_is_grey() -> None:
    grey = np.repeat(RNG.integers(256, size=(8, 8, 1), dtype=np.uint8), 3, axis=2)
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "JPEG")
    look = Look()
    look.add({"jpg": buffer.getvalue(), "txt": b"a"})
    assert not look.coloured


def test_a_bad_sample_is_refused_in_words() -> None:
    with pytest.raises(BadSample, match="cannot be decoded"):
        Look().add({"png": png(8, 8)[:60], "txt": b"a"})


@pytest.mark.parametrize(
    ("sizes", "machine", "image_sizes", "patch", "channels"),
    [
        ([(28, 28)] * 4, CPU, [(28, 28)], 4, 1),
        ([(8, 8)] * 4, CPU, [(8, 8)], 2, 1),
        ([(32, 32)] * 4, CPU, [(32, 32)], 4, 1),
        ([(64, 64)] * 4, CPU, [(32, 32)], 4, 1),
        ([(64, 64)] * 4, GPU, [(64, 64)], 4, 1),
        ([(512, 512)] * 4, GPU, [(64, 64)], 4, 1),
        ([(30, 30)] * 4, CPU, [(28, 28)], 4, 1),
        ([(3, 3)] * 4, CPU, [(2, 2)], 2, 1),
    ],
)
def test_image_sizes_fit_the_pictures_and_the_machine(
    sizes: list[tuple[int, int]], machine: Machine, image_sizes: list[tuple[int, int]], patch: int, channels: int
) -> None:
    found = image_settings(look_of(sizes, ["a"], grey=True), machine)
    assert found[:3] == (image_sizes, patch, channels)


def test_wide_and_tall_pictures_get_sizes_of_their_own() -> None:
    sizes, patch, _, why = image_settings(look_of([(60, 120)] * 10 + [(120, 60)] * 10, ["a"]), CPU)
    assert len(sizes) == 2
    assert all(h % patch == w % patch == 0 and h * w <= CPU.pixels for h, w in sizes)
    assert "of the pictures' area is kept" in why[0]


def test_rows_hold_99_of_100_documents_and_the_rest_is_counted() -> None:
    length, why = row_length([50] * 990 + [70] * 5 + [500] * 5)
    assert length == 64
    assert "at most 50" in why
    assert "the longest has 500" in why
    assert "1.0% is cut" in why
    assert row_length([130] * 100)[0] == 136


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("machine", [CPU, GPU])
def test_the_proposed_settings_are_valid_and_the_model_can_be_built(size: str, machine: Machine) -> None:
    look = look_of([(28, 28)] * 20, ["a cat on a mat", "a dog"])
    settings = as_settings([*propose(look, machine, size, NAMES, words).choices, *schedule(1000)])
    config = override(Config(), settings)
    found = plan(config)
    assert found.tokens_per_step == pytest.approx(SIZES[size].tokens, rel=0.2)
    if size == "tiny":
        model = MMGenModel(MMGenConfig.of(config, 300))
        assert sum(p.numel() for p in model.parameters()) < 2e6


def test_sizes_follow_from_the_depth() -> None:
    wide = [size.width for size in SIZES.values()]
    rates = [size.learning_rate for size in SIZES.values()]
    assert wide == sorted(wide)
    assert rates == sorted(rates, reverse=True)
    assert SIZES["tiny"].learning_rate == 0.003
    assert all(size.width % (2 * size.heads) == 0 for size in SIZES.values())
    assert SIZES["base"].learning_rate == pytest.approx(0.003 * math.sqrt(128 / 768), rel=0.05)


def test_the_file_holds_the_settings_and_their_reasons() -> None:
    chosen = [
        *propose(look_of([(28, 28)] * 20, ["a cat"]), CPU, "tiny", NAMES, words).choices, Choice("train.steps", 700, "why not"),
        *schedule(700),
    ]  # fmt: skip
    text = as_yaml(chosen, ["mmgen train --config my.yaml"])
    assert yaml.safe_load(text) == as_settings(chosen)
    assert text.startswith("# mmgen train --config my.yaml\n")
    assert "  # why not\n  steps: 700\n" in text
    assert max(map(len, text.splitlines())) < 140


def test_steps_fill_the_time_unless_the_data_are_few() -> None:
    assert steps_for(900, 0.3, 10_000, 40)[0] == 3000
    few, why = steps_for(900, 0.3, 100, 40)
    assert few == EPOCHS * 100 // 40 // 10 * 10
    assert "by heart" in why
    least, why = steps_for(10, 1, 10_000, 40)
    assert least == 200
    assert "enough for 10 steps only" in why


def test_the_estimate_is_the_sum_of_steps_and_the_rest() -> None:
    pace = Pace(seconds_per_step=0.5, fixed=60)
    assert pace.minutes(int(pace.seconds_for_steps(15) / 0.5)) == pytest.approx(15)
    assert pace.seconds_for_steps(0.5) == 0


def test_vocabularies_grow_with_the_words() -> None:
    few, _ = vocabulary(["a red car", "a blue car"])
    many, why = vocabulary([f"word{i}" for i in range(20_000)])
    assert (few, many) == (512, 8_192)
    assert "20,000" in why
