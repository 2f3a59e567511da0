"""Streams with bad samples, shards or connections, and reads that are interrupted or resumed."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.spec import AbstractFileSystem

from mmgen.config import Config, LimitsConfig
from mmgen.config_io import override
from mmgen.data.loader import steps
from mmgen.data.order import Cursor, Cursors
from mmgen.data.shards import store
from mmgen.train.report import refuse_bad_data
from tests.conftest import pairs, tiny, write_tar
from tests.data.common import STEPS, contents, epoch_names, names, opened, row_digests, write_shards


def test_bad_samples_are_skipped_and_reported_once(streamed: Config, tmp_path: Path) -> None:
    """A caption of invalid JSON, a repeated key, a cut archive: an epoch holds the other samples once."""
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
        assert bad == [(i.shard, i.key) for step in whole[:at] for i in step.bad] + rest, (
            "reported once, in the step that read it"
        )
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


def test_compressed_and_remote_shards_are_read_too(streamed: Config, tmp_path: Path) -> None:
    plain = [contents(step) for step in steps(opened(streamed), 0, STEPS, Cursors())]
    remote = override(streamed, {"data": {"train": [f"file://{path}" for path in streamed.data.train]}})
    assert [contents(step) for step in steps(opened(remote), 0, STEPS, Cursors())] == plain
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
    """A file whose n-th read fails, once."""

    def __init__(self, file: Any, left: list[int]) -> None:
        self.file, self.left = file, left

    def read(self, size: int, /) -> bytes:
        self.left[0] -= 1
        if self.left[0] == 0:
            raise OSError("the line is dead")
        return self.file.read(size)


def test_an_interrupted_read_is_continued(streamed: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = [contents(step) for step in steps(opened(streamed), 0, 4, Cursors())]
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
        assert [contents(step) for step in steps(opened(streamed), 0, 4, Cursors())] == plain
    left[0] = 1
    monkeypatch.setattr(store, "RETRIES", ())
    with pytest.raises(OSError, match=r"part-\d.tar cannot be read: the line is dead"):
        next(steps(opened(streamed), 0, 4, Cursors()))


class DyingFile(io.BytesIO):
    """A remote file whose connection breaks."""

    def read(self, size: int | None = -1, /) -> bytes:
        raise RuntimeError("the payload is not complete")


class DyingStore(AbstractFileSystem):
    """A store that raises errors of its own type, as stores of fsspec do."""

    protocol = "dying"

    def open(self, path: str, mode: str = "rb", **options: object) -> DyingFile:
        return DyingFile()


def test_errors_of_remote_stores_become_oserrors() -> None:
    fsspec.register_implementation("dying", DyingStore, clobber=True)
    with (
        store.stream("dying://far/a.tar", LimitsConfig()) as file,
        pytest.raises(OSError, match="dying://far/a.tar cannot be reached: the payload"),
    ):
        file.read(1)


def test_resuming_reads_one_shard_and_one_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any position, a resume opens the shard of the cursor and the shards of its window."""
    config = tiny(tmp_path, data={"train": write_shards(tmp_path / "many", 24), "streams": 1, "window": 10})
    streams = opened(config).dataset
    opens: list[str] = []
    stream = store.stream
    monkeypatch.setattr(store, "stream", lambda shard, limits: (opens.append(shard), stream(shard, limits))[1])
    cursors = [row.after for row in islice(streams.rows(0, Cursor()), 120)]
    assert cursors[-1].shard > 10
    for cursor in cursors[::9]:
        opens.clear()
        next(streams.rows(0, cursor))
        assert opens[0] == streams.shard(0, cursor.shard, cursor.epoch)
        assert len(opens) <= 3, "shards hold at least 5 samples, a window 10"


def test_shards_without_a_usable_sample_end_the_run(streamed: Config, tmp_path: Path) -> None:
    empty = str(write_tar(tmp_path / "empty.tar", {"a.json": b"{"}))
    config = override(streamed, {"data": {"train": [empty], "streams": 1}})
    with pytest.raises(
        ValueError, match="stream 0 finds no usable sample in its shards: the last bad one is .*caption cannot be read"
    ):
        next(steps(opened(config), 0, 1, Cursors()))
    one = override(config, {"data": {"train": [empty, *streamed.data.train[:1]]}})
    assert next(steps(opened(one), 0, 1, Cursors())).documents > 0, "one bad shard among good ones is skipped"
    Path(streamed.data.train[2]).unlink()
    with pytest.raises(FileNotFoundError, match=r"part-2.tar does not exist"):
        opened(streamed)


def test_the_share_of_bad_samples_is_relative_to_those_read(streamed: Config) -> None:
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
