"""`train.init_from`: what a new run takes over when its tokenizer or its image sizes differ; changed settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmgen.config import Config
from mmgen.config_io import override
from mmgen.sequence.tokenizer import size_token
from mmgen.train.checkpoint import read as checkpoint
from mmgen.train.checkpoint.start import same_tokens, table_part
from mmgen.train.loop import train


class Table:
    """A stored table of rows, read in parts as a checkpoint's."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.flat = rows.flatten()

    def numel(self, kind: str, name: str) -> int:
        return self.flat.numel()

    def read(self, kind: str, name: str, start: int, numel: int) -> torch.Tensor:
        return self.flat[start : start + numel]


def test_any_part_of_a_table_has_the_rows_of_the_same_tokens() -> None:
    """Against indexing the whole table, for all cuts that ZeRO may make."""
    old = torch.arange(15.0).view(5, 3)
    rows = [2, 3, -1, 0, 4, -1, 1]
    whole = torch.stack([old[row] if row >= 0 else old.mean(0) for row in rows]).flatten()
    for start in range(21):
        for numel in range(1, 22 - start):
            part = table_part(Table(old), "ema", "t", 3, rows, (start, numel))  # type: ignore[arg-type]
            torch.testing.assert_close(part, whole[start : start + numel])


def test_rows_past_the_tokens_keep_their_number() -> None:
    old = torch.arange(12.0).view(6, 2)
    torch.testing.assert_close(table_part(Table(old), "ema", "t", 2, [1, 0], (0, 12)).view(6, 2)[2:], old[2:])  # type: ignore[arg-type]


def test_tokens_are_matched_by_text() -> None:
    assert same_tokens({"a": 0, "b": 1, "<|7x7|>": 2}, {"b": 0, "<|3x3|>": 1, "a": 2}) == [1, -1, 0]


def test_size_tokens_are_taken_over_by_grid(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a new size listed first, each row of the vocabulary keeps its token; by number, they would be exchanged."""
    train(config)
    found = checkpoint.latest(config.run.dir)
    assert found is not None
    sizes = [[8, 4], *map(list, config.model.patcher.image_sizes)]
    settings = override(
        config,
        {
            "run": {"dir": tmp_path / "next"},
            "model": {"patcher": {"image_sizes": sizes}},
            "train": {"init_from": found, "lr": 1e-12, "steps": 1},
        },
    )
    assert train(settings) == 0
    out = capsys.readouterr().out
    old, before = checkpoint.load_model(found)
    new, now = checkpoint.load_model(tmp_path / "next" / "checkpoints" / "latest", "weight")
    was, table = old.get_input_embeddings().weight, new.get_input_embeddings().weight
    for text, number in now.vocabulary.items():
        expected = was[before.vocabulary[text]] if text in before.vocabulary else was.mean(0)
        torch.testing.assert_close(table[number], expected, msg=text)
    moved = size_token((2, 2))
    assert now.vocabulary[moved] != before.vocabulary[moved]
    assert f"1 new ones start at the mean: {size_token((4, 2))}" in out
    assert "(step 6, ema)" in out


def test_a_run_folder_may_be_named(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(config)
    settings = override(config, {"run": {"dir": tmp_path / "n"}, "train": {"init_from": config.run.dir, "steps": 1}})
    assert train(settings) == 0
    assert "parameters are reused" in capsys.readouterr().out


def test_a_continued_run_names_its_changed_settings(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    train(config)
    steps = config.train.steps
    capsys.readouterr()
    assert train(override(config, {"train": {"steps": steps + 1, "lr": 0.0005}})) == 0
    out = capsys.readouterr().out
    assert f"continuing from step {steps} with changed settings" in out
    assert "train.lr (0.0005 here" in out
    assert train(override(config, {"train": {"steps": steps + 2, "lr": 0.0005}})) == 0
    assert "train.lr" not in capsys.readouterr().out
