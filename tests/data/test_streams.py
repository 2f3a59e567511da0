"""Shards without an index, read in streams: the promises of the indexed order, kept by reading forward."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import yaml
from fsspec.spec import AbstractFileSystem

from mmgen.config import Config, LimitsConfig
from mmgen.config_io import override
from mmgen.data.documents import Share, Step
from mmgen.data.loader import Corpus, steps
from mmgen.data.order import Cursor, Cursors, PlannedDocument, Position
from mmgen.data.shards import store
from mmgen.data.streams import StreamCorpus, Streams, training_corpus
from mmgen.data.tools.check import FAULTS, CheckOptions
from mmgen.data.tools.check_streams import check_streams
from mmgen.plan import plan
from mmgen.sequence.tokenizer import Tokenizer
from mmgen.train.loop import train
from mmgen.train.report import refuse_bad_data
from tests.conftest import pairs, run, tiny, write_tar

STEPS = 9


def write_shards(folder: Path, count: int = 7) -> list[str]:
    """Shards of 5, 6, ... captioned pictures, whose keys are unlike in all of them."""
    folder.mkdir(exist_ok=True)
    paths = []
    for number in range(count):
        members = {f"{number}-{name}": data for name, data in pairs(5 + number, number).items()}
        paths.append(str(write_tar(folder / f"part-{number}.tar", members)))
    return paths


@pytest.fixture
def streamed(tmp_path: Path) -> Config:
    shards = write_shards(tmp_path / "shards")
    return tiny(tmp_path, data={"train": shards, "streams": 4, "window": 12}, train={"batch_rows": 8})


def words(config: Config) -> Tokenizer:
    return Tokenizer.of(config)


def opened(config: Config) -> StreamCorpus:
    corpus = training_corpus(config, words(config))
    assert isinstance(corpus, StreamCorpus)
    return corpus


def row_digests(step: Step) -> list[str]:
    """What stands in each row of a step: tokens, pixels, noise and times."""
    found = []
    for batch in step.micro:
        for b in range(len(batch.ids_BS)):
            here = batch.at_I // batch.ids_BS.shape[1] == b
            parts = [batch.ids_BS[b], batch.document_BS[b], batch.label_BS[b], batch.patches_UP[batch.source_I][here]]
            parts += [batch.draws[name][here] for name in sorted(batch.draws)]
            found.append(hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest())
    return found


def told(step: Step) -> tuple[Any, ...]:
    return row_digests(step), step.after, step.documents, step.positions, step.images


def global_steps(config: Config, first: int, start: Cursors, world: int) -> Iterator[list[str]]:
    """The rows of global steps, put together from what each of `world` processes holds."""
    corpus, rows = opened(config), config.train.batch_rows
    ranks = [steps(corpus, first, STEPS, start, Share(rank, world)) for rank in range(world)]
    for shares in zip(*ranks, strict=True):
        digests = [row_digests(share) for share in shares]
        yield [digests[i % world][i // world] for i in range(rows)]


def names(shards: list[str]) -> set[tuple[str, str]]:
    """(shard, key) of every sample, told by tarfile."""
    return {(Path(s).name, name.split(".")[0]) for s in shards for name in tarfile.open(s).getnames()}


def epoch_names(streams: Streams, epoch: int) -> Counter[tuple[str, str]]:
    seen: Counter[tuple[str, str]] = Counter()
    for stream in range(streams.count):
        for row in streams.rows(stream, Cursor()):
            if row.documents[0].epoch > epoch:
                break
            seen.update((d.sample.shard, d.sample.key) for d in row.documents if d.epoch == epoch)
    return seen


def test_an_epoch_holds_each_sample_once(streamed: Config) -> None:
    streams = opened(streamed).dataset
    for epoch in range(3):
        assert epoch_names(streams, epoch) == Counter(names(streamed.data.train))
    first = [[streams.shard(stream, place, epoch) for stream in range(4) for place in range(2)] for epoch in (0, 1)]
    assert first[0] != first[1], "every epoch deals its shards anew"
    orders = [
        [d.sample.key for row in islice(streams.rows(0, Cursor()), 9) for d in row.documents if d.epoch == e]
        for e in (0, 1)
    ]
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0]), "a window is shuffled"


def test_worlds_workers_and_resumes_are_one_run(streamed: Config) -> None:
    """Steps 0 to n on one process, the rest on 1, 2 or 4, with 0, 1 or 2 workers each: the rows of one process."""
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
    assert wrong != rows[4], "an off-by-one resume must show"


def test_ranks_know_their_own_streams(streamed: Config) -> None:
    whole = next(steps(opened(streamed), 0, 1, Cursors()))
    shares = [next(steps(opened(streamed), 0, 1, Cursors(), Share(rank, 2))) for rank in range(2)]
    assert told(opened(streamed).first_step()) == told(whole)
    assert [told(opened(streamed).first_step(Share(rank, 2))) for rank in range(2)] == [told(share) for share in shares]
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
    """One sample in one epoch is one document, whoever read it: the index is the oracle."""
    streams, indexed = opened(streamed), Corpus(streamed.data.train, words(streamed), streamed)
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


def test_bad_samples_are_passed_over_and_told_once(streamed: Config, tmp_path: Path) -> None:
    """A caption that is no JSON, a repeated key, a cut archive: the rest of an epoch is there, once."""
    members = {f"a-{name}": data for name, data in pairs(6, 9).items()}
    members["a-0002.json"] = b"{"
    shard = write_tar(tmp_path / "bad.tar", members)
    with tarfile.open(shard, "a") as tar:
        info = tarfile.TarInfo("a-0000.txt")
        info.size = 5
        tar.addfile(info, io.BytesIO(b"again"))
    cut = Path(write_shards(tmp_path / "other", 1)[0]).rename(tmp_path / "cut.tar")
    content = cut.read_bytes()
    cut.write_bytes(content[: content.index(b"0-0003.png") + 100])
    config = override(streamed, {"data": {"train": [*streamed.data.train, str(shard), str(cut)]}})
    corpus = opened(config)
    expected = names(streamed.data.train) | {("bad.tar", f"a-{i:04d}") for i in (0, 1, 3, 4, 5)}
    expected |= {("cut.tar", f"0-{i:04d}") for i in range(2)}  # the third was open where the archive ends
    assert epoch_names(corpus.dataset, 0) == Counter(expected)
    assert epoch_names(corpus.dataset, 1) == Counter(expected)
    whole = list(steps(corpus, 0, 14, Cursors()))
    bad = [(item.shard, item.key) for step in whole for item in step.bad]
    in_first = Counter(bad)
    assert set(bad) == {("bad.tar", "a-0002"), ("bad.tar", "a-0000"), ("cut.tar", "0-0002")}
    for at in range(1, 14):
        rest = [(i.shard, i.key) for step in steps(corpus, at, 14, whole[at - 1].after) for i in step.bad]
        assert bad == [(i.shard, i.key) for step in whole[:at] for i in step.bad] + rest, "told once, where met"
    assert max(in_first.values()) <= 1 + max(cursor.epoch for cursor in whole[-1].after.streams.values())


def test_an_undecodable_image_leaves_its_slot_empty(streamed: Config, tmp_path: Path) -> None:
    one = override(streamed, {"model": {"patcher": {"image_sizes": [[4, 4]]}}})
    good = one.data.train
    folder = tmp_path / "holed"
    folder.mkdir()
    holed = []
    for path in good:
        data = Path(path).read_bytes()
        if path.endswith("part-3.tar"):
            at = data.index(b"IDAT", data.index(b"3-0004.png")) + 6
            data = data[:at] + bytes(8) + data[at + 8 :]
        (folder / Path(path).name).write_bytes(data)
        holed.append(str(folder / Path(path).name))
    runs = [
        list(steps(opened(override(one, {"data": {"train": shards}})), 0, STEPS, Cursors())) for shards in (good, holed)
    ]
    lost = [item for step in runs[1] for item in step.bad]
    assert {(item.shard, item.key) for item in lost} == {("part-3.tar", "3-0004")}
    for whole, part in zip(*runs, strict=True):
        a, b = row_digests(whole), row_digests(part)
        assert sum(x != y for x, y in zip(a, b, strict=True)) == len(part.bad)
        assert (whole.after, whole.documents) == (part.after, part.documents)


def test_packed_and_remote_shards_are_read_too(streamed: Config, tmp_path: Path) -> None:
    plain = [told(step) for step in steps(opened(streamed), 0, STEPS, Cursors())]
    remote = override(streamed, {"data": {"train": [f"file://{path}" for path in streamed.data.train]}})
    assert [told(step) for step in steps(opened(remote), 0, STEPS, Cursors())] == plain
    assert not list(tmp_path.rglob("*.mmgen-index")), "no index is made"
    folder = tmp_path / "packed"
    folder.mkdir()
    packed = []
    for path in streamed.data.train:
        packed.append(str(folder / (Path(path).name + ".gz")))
        Path(packed[-1]).write_bytes(gzip.compress(Path(path).read_bytes()))
    seen = epoch_names(opened(override(streamed, {"data": {"train": packed}})).dataset, 0)
    assert seen == Counter({(f"{shard}.gz", key): 1 for shard, key in names(streamed.data.train)})


class Breaking:
    """A file that fails once, in its middle."""

    def __init__(self, file: Any, left: list[int]) -> None:
        self.file, self.left = file, left

    def read(self, size: int, /) -> bytes:
        self.left[0] -= 1
        if self.left[0] == 0:
            raise OSError("the line is dead")
        return self.file.read(size)


def test_a_reading_that_breaks_off_goes_on(streamed: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = [told(step) for step in steps(opened(streamed), 0, 4, Cursors())]
    left = [0]
    stream = store.stream

    @contextmanager
    def breaking(shard: str, limits: Any) -> Iterator[Breaking]:
        with stream(shard, limits) as file:
            yield Breaking(file, left)

    monkeypatch.setattr(store, "stream", breaking)
    monkeypatch.setattr(store, "RETRIES", (0.0,))
    for after in (1, 30, 61):
        left[0] = after
        assert [told(step) for step in steps(opened(streamed), 0, 4, Cursors())] == plain
    left[0] = 1
    monkeypatch.setattr(store, "RETRIES", ())
    with pytest.raises(OSError, match=r"part-\d.tar cannot be read: the line is dead"):
        next(steps(opened(streamed), 0, 4, Cursors()))


class DyingFile(io.BytesIO):
    """A remote file whose connection ends."""

    def read(self, size: int | None = -1, /) -> bytes:
        raise RuntimeError("the payload is not complete")


class DyingStore(AbstractFileSystem):
    """A store whose errors are of its own kind, as those of fsspec's stores are."""

    protocol = "dying"

    def open(self, path: str, mode: str = "rb", **options: object) -> DyingFile:
        return DyingFile()


def test_what_breaks_in_a_far_store_is_an_error_of_reading() -> None:
    fsspec.register_implementation("dying", DyingStore, clobber=True)
    with (
        store.stream("dying://far/a.tar", LimitsConfig()) as file,
        pytest.raises(OSError, match="dying://far/a.tar cannot be reached: the payload"),
    ):
        file.read(1)


def test_resuming_reads_one_shard_and_one_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However far a run is: what is opened is the shard of the cursor and what its window takes."""
    config = tiny(tmp_path, data={"train": write_shards(tmp_path / "many", 24), "streams": 1, "window": 10})
    streams = opened(config).dataset
    opens: list[str] = []
    stream = store.stream
    monkeypatch.setattr(store, "stream", lambda shard, limits: (opens.append(shard), stream(shard, limits))[1])
    cursors = [row.after for row in islice(streams.rows(0, Cursor()), 120)]
    assert cursors[-1].place > 10
    for cursor in cursors[::9]:
        opens.clear()
        next(streams.rows(0, cursor))
        assert opens[0] == streams.shard(0, cursor.place, cursor.epoch)
        assert len(opens) <= 3, "shards hold at least 5 samples, a window 10"


def test_what_streams_cannot_do_is_refused(streamed: Config, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_shards_of_nothing_end_the_run(streamed: Config, tmp_path: Path) -> None:
    empty = str(write_tar(tmp_path / "empty.tar", {"a.json": b"{"}))
    config = override(streamed, {"data": {"train": [empty], "streams": 1}})
    with pytest.raises(
        ValueError, match="stream 0 finds no usable sample in its shards: the last bad one is .*caption cannot be read"
    ):
        next(steps(opened(config), 0, 1, Cursors()))
    one = override(config, {"data": {"train": [empty, *streamed.data.train[:1]]}})
    assert next(steps(opened(one), 0, 1, Cursors())).documents > 0, "one bad shard among good ones is passed over"
    Path(streamed.data.train[2]).unlink()
    with pytest.raises(FileNotFoundError, match=r"part-2.tar does not exist"):
        opened(streamed)


def test_the_rate_of_bad_samples_is_of_those_met(streamed: Config) -> None:
    corpus = opened(streamed)
    position = list(steps(corpus, 0, STEPS, Cursors()))[-1].after
    assert corpus.known(position) == 1000
    assert sum(cursor.met for cursor in position.streams.values()) <= len(names(streamed.data.train))
    late = list(steps(corpus, 0, 30, Cursors()))[-1].after
    assert min(cursor.epoch for cursor in late.streams.values()) > 0
    assert sum(cursor.met for cursor in late.streams.values()) == len(names(streamed.data.train)), "each counts once"
    far = Cursors({0: Cursor(met=900), 1: Cursor(met=1200)})
    assert corpus.known(far) == 2100
    streamed.run.dir.mkdir()
    (streamed.run.dir / "quarantine.jsonl").write_text('{"shard": "a"}\n')
    refuse_bad_data(21, corpus.known(far), streamed)
    with pytest.raises(ValueError, match="22 of 2100 samples"):
        refuse_bad_data(22, corpus.known(far), streamed)


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_every_fault_of_the_streams_is_seen(streamed: Config, fault: str | None) -> None:
    options = CheckOptions(decode=fault is None, inject=fault)
    report = check_streams(words(streamed), streamed, options).as_dict()
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


def test_a_streamed_run_resumes_where_it_was(streamed: Config, tmp_path: Path) -> None:
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
def test_two_processes_train_what_one_does(streamed: Config, tmp_path: Path) -> None:
    """Steps 1 to 4 on two processes, 5 and 6 on one, from a checkpoint that knows all streams."""
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
    assert isinstance(Corpus(streamed.data.train[:1], words(streamed), streamed).start, Position)
