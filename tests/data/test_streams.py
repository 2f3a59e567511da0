"""Shards that are read in streams, without an index, keep the guarantees of the indexed order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import yaml

from mmgen.config import Config
from mmgen.config_io import override
from mmgen.data.documents import Share
from mmgen.data.loader import Corpus, steps
from mmgen.data.order import Cursor, Cursors, PlannedDocument, Position
from mmgen.data.tools.check import FAULTS, CheckOptions
from mmgen.data.tools.check_streams import check_streams
from mmgen.plan import plan
from mmgen.train.loop import train
from tests.conftest import run
from tests.data.common import STEPS, contents, epoch_names, names, opened, row_digests, tokenizer_of


def global_steps(config: Config, first: int, start: Cursors, world: int) -> Iterator[list[str]]:
    """The rows of global steps, joined from the shares of `world` processes."""
    corpus, rows = opened(config), config.train.batch_rows
    ranks = [steps(corpus, first, STEPS, start, Share(rank, world)) for rank in range(world)]
    for shares in zip(*ranks, strict=True):
        digests = [row_digests(share) for share in shares]
        yield [digests[i % world][i // world] for i in range(rows)]


def test_an_epoch_holds_each_sample_once(streamed: Config) -> None:
    streams = opened(streamed).dataset
    for epoch in range(3):
        assert epoch_names(streams, epoch) == Counter(names(streamed.data.train))
    first = [[streams.shard(stream, place, epoch) for stream in range(4) for place in range(2)] for epoch in (0, 1)]
    assert first[0] != first[1], "each epoch assigns its shards to streams in another order"
    orders = [
        [d.sample.key for row in islice(streams.rows(0, Cursor()), 9) for d in row.documents if d.epoch == e]
        for e in (0, 1)
    ]
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0]), "a window is shuffled"


def test_worlds_workers_and_resumes_are_one_run(streamed: Config) -> None:
    """Steps 0 to n on one process, the rest on 1, 2 or 4 with 0, 1 or 2 workers: the rows equal those of one."""
    whole = list(steps(opened(streamed), 0, STEPS, Cursors()))
    rows = [row_digests(step) for step in whole]
    assert len({digest for step in rows for digest in step}) == 8 * STEPS
    for world, workers in ((2, 0), (4, 0), (1, 2), (2, 1), (2, 2)):
        config = override(streamed, {"data": {"workers": workers}})
        assert list(global_steps(config, 0, Cursors(), world)) == rows, (world, workers)
    for at in range(1, STEPS):
        stored = Cursors.of(json.loads(json.dumps(whole[at - 1].after.as_dict())))
        assert list(global_steps(streamed, at, stored, (1, 2, 4)[at % 3])) == rows[at:], at
    wrong = next(global_steps(streamed, 4, whole[4].after, 1))
    assert wrong != rows[4], "an off-by-one resume must change the rows"


def test_each_rank_reads_its_own_streams(streamed: Config) -> None:
    whole = next(steps(opened(streamed), 0, 1, Cursors()))
    shares = [next(steps(opened(streamed), 0, 1, Cursors(), Share(rank, 2))) for rank in range(2)]
    assert contents(opened(streamed).first_step()) == contents(whole)
    assert [contents(opened(streamed).first_step(Share(rank, 2))) for rank in range(2)] == [
        contents(share) for share in shares
    ]
    assert [sorted(share.after.streams) for share in shares] == [[0, 2], [1, 3]]
    assert Cursors.union(share.after for share in shares) == whole.after
    assert len(whole.after.as_dict()["streams"]) == 4
    assert {len(entry) for entry in whole.after.as_dict()["streams"]} == {7}
    assert sum(share.images for share in shares) == whole.images > 0


def test_micro_steps_are_a_cut_of_the_step(streamed: Config) -> None:
    whole = next(steps(opened(streamed), 0, 1, Cursors()))
    cut = next(steps(opened(override(streamed, {"train": {"micro_rows": 3}})), 0, 1, Cursors()))
    assert [len(batch.ids_BS) for batch in cut.micro] == [3, 3, 3]
    assert row_digests(cut)[:8] == row_digests(whole)


def test_documents_are_those_of_the_indexed_order(streamed: Config) -> None:
    """A sample gives the same document in streams and through the index, which is the oracle."""
    streams, indexed = opened(streamed), Corpus(streamed.data.train, tokenizer_of(streamed), streamed)
    number = {indexed.dataset.name(i): i for i in range(len(indexed.samples))}
    forms = set()
    for stream in range(4):
        for row in islice(streams.dataset.rows(stream, Cursor()), 12):
            for document in row.documents:
                index = number[streams.name(document)]
                lengths, images, form = (
                    int(column[0]) for column in indexed.dataset.lengths(np.array([document.epoch]), np.array([index]))
                )
                assert (document.length, document.images, document.form) == (lengths, images, form)
                other = PlannedDocument(document.epoch, index, lengths, images, form)
                mine, theirs = streams.write(document, None), indexed.write(other, None)
                assert (mine.ids, mine.position, mine.block) == (theirs.ids, theirs.position, theirs.block)
                for a, b in zip(mine.images, theirs.images, strict=True):
                    np.testing.assert_array_equal(a.x_NP, b.x_NP)
                for a, b in zip(mine.blocks, theirs.blocks, strict=True):
                    assert all(np.array_equal(a.block.draws[name], b.block.draws[name]) for name in b.block.draws)
                forms.add(form)
    assert len(forms) > 1


def test_times_of_a_step_are_spread_over_all_streams(streamed: Config) -> None:
    """With equally many images in each stream, their times are even over the whole step (Kingma et al. 2021)."""
    alone = {"row_length": 24, "caption_drop": 0.0, "image_first": 0.0}  # one document fits a row
    config = override(streamed, {"data": alone, "objective": {"time": {"stratified": True}}})
    for step in steps(opened(config), 0, STEPS, Cursors()):
        assert step.documents == step.images == 8
        batch = step.micro[0]
        numbers = [n for n in batch.image_I.unique().tolist() if n >= 0]
        times = np.sort([float(batch.draws["t"][batch.image_I == number][0]) for number in numbers])
        np.testing.assert_allclose(np.diff([*times, times[0] + 1]), 1 / 8, atol=1e-5)


def test_settings_that_streams_cannot_keep_are_refused(streamed: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"data.streams is 4, which 3 processes .* start 1 or 2 or 4 processes, .* data.streams 6"
    ):
        streamed.check_processes(3)
    with pytest.raises(ValueError, match="3 processes"):
        next(steps(opened(streamed), 0, 1, Cursors(), Share(0, 3)))
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="3 processes"):
        plan(streamed)
    with pytest.raises(
        ValueError,
        match=r"batch_rows is 6 and data.streams 4.* train.batch_rows to 8, or data.streams to a divisor of 6",
    ):
        override(streamed, {"train": {"batch_rows": 6}})
    with pytest.raises(ValueError, match=r"data.streams is 8, but data.train has 7 shard.*set data.streams to 7"):
        opened(override(streamed, {"data": {"streams": 8}}))
    sources = [{"shards": streamed.data.train[:3], "weight": 2.0}, *streamed.data.train[3:]]
    with pytest.raises(ValueError, match="sources of different weight: set data.streams to 0"):
        override(streamed, {"data": {"train": sources}})
    override(streamed, {"data": {"train": [{"shards": streamed.data.train[:3]}, *streamed.data.train[3:]]}})


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_every_fault_of_the_streams_is_detected(streamed: Config, fault: str | None) -> None:
    options = CheckOptions(decode=fault is None, inject=fault)
    report = check_streams(tokenizer_of(streamed), streamed, options).as_dict()
    wrong = {
        None: set(), "per_rank_seed": {"same_for_any_world"}, "dropped_carry": {"coverage_exact"},
        "off_by_one": {"same_after_resume"}, "duplicated_shard": {"coverage_exact"},
    }[fault]  # fmt: skip
    assert {name for name, value in report.items() if value is False} - {"holds"} == wrong
    assert report["holds"] == (fault is None)
    assert report["samples"] - 5 * (fault == "duplicated_shard") == len(names(streamed.data.train))
    assert report["duplicates"] == (5 if fault == "duplicated_shard" else 0)


def test_the_command_checks_streams(streamed: Config, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(streamed.model_dump(mode="json")))
    code, out, _ = run(capsys, "data", "check", "--config", tmp_path / "run.yaml", "--json")
    assert (code, json.loads(out)["streams"]) == (0, 4)
    code, out, _ = run(capsys, "data", "check", "--config", tmp_path / "run.yaml", "--inject", "off_by_one")
    assert code == 1
    assert "same_after_resume" in out


def losses(config: Config) -> list[tuple[int, float]]:
    lines = (config.run.dir / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], line["loss"]) for line in map(json.loads, lines) if "loss" in line]


def test_a_streamed_run_resumes(streamed: Config, tmp_path: Path) -> None:
    """Six steps at once, and four steps and two more: the same losses; another order is refused."""
    steady = override(
        streamed, {"train": {"min_lr_ratio": 1.0, "save_every": 2}}
    )  # the cosine depends on the last step
    whole = override(steady, {"run": {"dir": str(tmp_path / "whole")}, "data": {"val": streamed.data.train[:1]}})
    cut = override(steady, {"run": {"dir": str(tmp_path / "cut")}})
    assert train(whole) == train(override(cut, {"train": {"steps": 4}})) == train(cut) == 0
    assert losses(cut) == losses(whole)
    for change in ({"streams": 2}, {"streams": 0}, {"window": 16}):
        with pytest.raises(ValueError, match="belongs to another configuration"):
            train(override(cut, {"data": change, "train": {"steps": 8}}))


def started(config: Config, world: int, port: int) -> subprocess.CompletedProcess[str]:
    """`mmgen train` as a user starts it on `world` processes."""
    file = config.run.dir.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    words = [sys.executable, "-m", "mmgen.cli", "train", "--config", file]
    if world > 1:
        launch = ["--nproc-per-node", str(world), "--master-port", str(port), "-m", "mmgen.cli"]
        words = [Path(sys.executable).parent / "torchrun", *launch, *words[3:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_two_processes_train_like_one(streamed: Config, tmp_path: Path) -> None:
    """Steps 1 to 4 on two processes, 5 and 6 on one, from a checkpoint of all streams."""
    steady = override(streamed, {"train": {"min_lr_ratio": 1.0, "save_every": 2}})
    one = override(steady, {"run": {"dir": str(tmp_path / "one")}})
    two = override(steady, {"run": {"dir": str(tmp_path / "two")}})
    assert started(one, 1, 0).returncode == 0
    assert started(override(two, {"train": {"steps": 4}}), 2, 29631).returncode == 0
    assert started(two, 1, 0).returncode == 0
    np.testing.assert_allclose(np.array(losses(two)), np.array(losses(one)), rtol=1e-4)
    refused = started(override(steady, {"run": {"dir": str(tmp_path / "three")}}), 3, 29632)
    assert refused.returncode != 0
    assert "data.streams is 4, which 3 processes cannot share" in refused.stderr


def test_validation_keeps_its_index(streamed: Config) -> None:
    assert isinstance(Corpus(streamed.data.train[:1], tokenizer_of(streamed), streamed).start, Position)
