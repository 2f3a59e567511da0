"""Lines of progress while captions are drawn and pictures are captioned."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest
import torch

from mmgen.config import Config
from mmgen.data import progress
from mmgen.data.loader import Corpus
from mmgen.data.shards.samples import read
from mmgen.evaluate.report import Generator, held_out_losses
from mmgen.generate.decoder import Decoder
from tests.conftest import awake, picture


@pytest.mark.broad
def test_drawing_and_captioning_report_counts(config: Config) -> None:
    model, tokenizer = awake(config)
    lines: list[str] = []
    generator = Generator(model, tokenizer, config.sample, 2, lines.append)
    samples = list(read(config.data.train))[:3]
    assert len(generator.draw(samples, 1.5)) == 3
    assert len(generator.describe([picture(np.random.default_rng(0))] * 3)) == 3
    assert lines == ["drawing at guidance 1.5: 3 of 3 pictures", "captioning: 3 of 3 pictures"]


@pytest.mark.broad
def test_held_out_losses_report_batches(config: Config) -> None:
    model, tokenizer = awake(config, torch.float32)
    lines: list[str] = []
    held_out_losses(model, Corpus(config.data.val, tokenizer, config), lines.append)
    assert re.fullmatch(r"computing held-out losses: \d+ batches", lines[0])
    assert lines[-1] == "scoring held-out documents: 40 of 40 samples"


@pytest.mark.broad
def test_a_slow_phase_reports_the_minutes_to_go(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interval between two lines is ten seconds; here it is a twentieth of one."""
    assert progress.INTERVAL == 10
    monkeypatch.setattr(progress, "INTERVAL", 0.05)
    generate = Decoder.generate

    def slowly(self: Decoder, requests: list) -> list:
        time.sleep(0.2)
        return generate(self, requests)

    monkeypatch.setattr(Decoder, "generate", slowly)
    model, tokenizer = awake(config)
    lines: list[str] = []
    Generator(model, tokenizer, config.sample, 1, lines.append).draw(list(read(config.data.train))[:2], 1.0)
    assert lines[0] == "drawing at guidance 1: 0 of 2 pictures"
    assert "drawing at guidance 1: 1 of 2 pictures, less than a minute to go" in lines
    assert lines[-1] == "drawing at guidance 1: 2 of 2 pictures"
