"""The index of a shard: the offsets of its samples and the lengths of their documents.

An index is one safetensors file per shard, next to the shard or in the cache. It holds columns per sample, member and
segment, which are mapped into memory. Suffixes of column names: n samples, m members, s segments.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from mmgen.config import DataConfig
from mmgen.data.progress import Log, Progress, to_stderr
from mmgen.data.shards import store
from mmgen.data.shards.pictures import STORED, image_size, maker_of, open_stored
from mmgen.data.shards.samples import (
    BadRecord,
    BadSample,
    Group,
    Sample,
    Segment,
    Text,
    Unwanted,
    assemble,
    damage,
    groups,
    parse,
)
from mmgen.data.shards.tar import Damaged
from mmgen.sequence.tokenizer import Tokenizer

VERSION = "3"
SUFFIX = ".mmgen-index"
TEXT, IMAGE = 0, 1
"""Kinds of segments; those of precomputed arrays have the numbers in `STORED`."""
Ints = NDArray[np.int64]


def settings_of(data: DataConfig) -> str:
    """The settings that decide which samples of a shard are usable and what their text is, as one string."""
    chosen = "" if data.where is None and not data.captions else f" {data.where!r} {data.captions!r}"
    return f"{VERSION} {data.captionless} {data.clean_captions} {data.limits.model_dump_json()}{chosen}"


def key_hash(shard: str, key: str) -> int:
    """A 64-bit hash that identifies a sample in fast keyed draws."""
    return int.from_bytes(hashlib.blake2b(f"{shard}\0{key}".encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class IndexMeta:
    """Facts of a whole shard."""

    settings: str
    """The settings that the shard was read with (`settings_of`)."""
    stamp: str
    """Size and version of the shard (`store.stamp`)."""
    sha256: str
    count: int
    """Number of usable samples."""
    extensions: list[str]
    bad: list[BadRecord]
    duplicates: list[str]
    """Keys that occur more than once."""
    pictures: int
    """Number of images, without precomputed arrays."""
    stored: dict[str, list[str]]
    """Kind of precomputed arrays to the fingerprints of their makers; an unknown maker is an empty string."""
    unwanted: dict[str, int] = field(default_factory=dict)
    """Why `data.where` leaves samples out, and how many."""

    def to_json(self) -> str:
        """The text that the index file stores."""
        return json.dumps(asdict(self))

    @classmethod
    def of_json(cls, text: str) -> IndexMeta:
        """The facts from the output of `to_json`, also of version 2; raises KeyError or ValueError for other text."""
        read = json.loads(text)
        return cls(
            settings=read["settings"],
            stamp=read["stamp"],
            sha256=read["sha256"],
            count=int(read["count"]),
            extensions=read["extensions"],
            bad=[BadRecord(item["shard"], item["key"], item["reason"]) for item in read["bad"]],
            duplicates=read["duplicates"],
            pictures=read.get("pictures", 0),
            stored=read["stored"] if "stored" in read else _latents_of(read.get("autoencoders", [])),
            unwanted=read.get("unwanted", {}),
        )


def _latents_of(autoencoders: list[str]) -> dict[str, list[str]]:
    """`stored` of a version 2 index, which has only latents, under the fingerprints of their autoencoders."""
    return {"latent": autoencoders} if autoencoders else {}


@dataclass(frozen=True)
class SegmentFacts:
    """The facts of one segment."""

    kind: int = TEXT
    height: int = 0
    """In pixels; of a precomputed array in cells."""
    width: int = 0
    learn: bool = True
    stored: str = ""
    """Kind of a precomputed array; empty for text and images."""
    maker: str = ""
    """Fingerprint of the maker of a precomputed array."""


class ShardIndex:
    """The columns of one shard, mapped from its index file."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        size = int.from_bytes(self._map[:8], "little")
        header = json.loads(self._map[8 : 8 + size])
        self.meta = IndexMeta.of_json(header.pop("__metadata__")["index"])
        self._header, self._start = header, 8 + size
        self.count = self.meta.count
        self._columns: dict[str, NDArray[Any]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._header

    def column(self, name: str) -> NDArray[Any]:
        """The column of this name, without a copy."""
        if name in self._columns:
            return self._columns[name]
        facts = self._header[name]
        first, last = facts["data_offsets"]
        kind = np.dtype({"U8": "u1", "I32": "<i4", "I64": "<i8", "U64": "<u8"}[facts["dtype"]])
        flat = np.frombuffer(self._map, kind, (last - first) // kind.itemsize, self._start + first)
        self._columns[name] = flat
        return flat

    def columns(self) -> dict[str, NDArray[Any]]:
        """All columns by name."""
        return {name: self.column(name) for name in self._header}

    def key(self, i: int) -> str:
        """The key of sample i."""
        ends = self.column("key_end_n")
        first = int(ends[i - 1]) if i else 0
        return bytes(self.column("key_bytes")[first : int(ends[i])]).decode()

    def members(self, i: int) -> list[tuple[str, int, int]]:
        """(extension, offset in bytes, size in bytes) of each member of sample i."""
        ends = self.column("member_end_n")
        here = slice(int(ends[i - 1]) if i else 0, int(ends[i]))
        parts = (self.column(name)[here].tolist() for name in ("extension_m", "offset_m", "size_m"))
        return [(self.meta.extensions[e], offset, size) for e, offset, size in zip(*parts, strict=True)]


class Builder:
    """Collects the columns of one shard."""

    def __init__(self) -> None:
        self.keys: list[bytes] = []
        self.hashes: list[int] = []
        self.paired: list[bool] = []
        self.member_end: list[int] = []
        self.member: list[tuple[int, int, int]] = []
        self.segment_end: list[int] = []
        self.segments: list[SegmentFacts] = []
        self.texts: list[str] = []
        self.extensions: dict[str, int] = {}

    def add(self, sample: Sample, group: Group, segments: list[SegmentFacts]) -> None:
        """Append one usable sample and the facts of its segments."""
        self.keys.append(sample.key.encode())
        self.hashes.append(key_hash(sample.shard, sample.key))
        self.paired.append(sample.paired)
        for name, member in group.members.items():
            number = self.extensions.setdefault(name, len(self.extensions))
            self.member.append((number, member.offset, member.size))
        self.member_end.append(len(self.member))
        self.segments += segments
        self.segment_end.append(len(self.segments))
        self.texts += texts_of(sample)

    def columns(self, tokenizer: Tokenizer) -> dict[str, NDArray[Any]]:
        """All columns, including the text lengths in tokens of `tokenizer`."""
        member = np.array(self.member, dtype=np.int64).reshape(-1, 3)
        return {
            "key_bytes": np.frombuffer(b"".join(self.keys), dtype=np.uint8),
            "key_end_n": np.cumsum([len(key) for key in self.keys], dtype=np.int64),
            "key_hash_n": np.array(self.hashes, dtype=np.uint64),
            "paired_n": np.array(self.paired, dtype=np.uint8),
            "member_end_n": np.array(self.member_end, dtype=np.int64),
            "extension_m": member[:, 0].astype(np.int32),
            "offset_m": member[:, 1].copy(),
            "size_m": member[:, 2].copy(),
            "segment_end_n": np.array(self.segment_end, dtype=np.int64),
            "kind_s": np.array([segment.kind for segment in self.segments], dtype=np.uint8),
            "height_s": np.array([segment.height for segment in self.segments], dtype=np.int32),
            "width_s": np.array([segment.width for segment in self.segments], dtype=np.int32),
            "learn_s": np.array([segment.learn for segment in self.segments], dtype=np.uint8),
            tokens_column(tokenizer): token_lengths(self.texts, tokenizer),
        }


def texts_of(sample: Sample) -> list[str]:
    """The text of each segment; empty for an image."""
    return [segment.text if isinstance(segment, Text) else "" for segment in sample.segments]


def tokens_column(tokenizer: Tokenizer) -> str:
    """The name of the column of text lengths in tokens of one tokenizer."""
    return f"tokens_s:{tokenizer.fingerprint}"


def token_lengths(texts: Sequence[str], tokenizer: Tokenizer) -> NDArray[np.int32]:
    """The number of tokens of each text."""
    return np.array([len(ids) for ids in tokenizer.encode_batch(texts)], dtype=np.int32)


def cached_path(shard: str, cache_dir: Path) -> Path:
    """The path in the cache for the index of a shard."""
    digest = hashlib.sha256(shard.encode()).hexdigest()[:32]
    return cache_dir.expanduser() / f"{store.name(shard)[:80]}-{digest}{SUFFIX}"


def build(shard: str, tokenizer: Tokenizer, data: DataConfig) -> bytes:
    """Read a shard once; returns the bytes of its index file."""
    builder, bad, duplicates, unwanted = Builder(), list[BadRecord](), list[str](), Counter[str]()
    name, seen = store.name(shard), set[int]()
    stamp = store.stamp(shard)
    with store.stream(shard, data.limits) as plain:
        file = store.Hashing(plain)
        try:
            for group in groups(file, data.limits):
                with _SAMPLES.get_lock():
                    _SAMPLES.value += 1
                hashed = key_hash(name, group.key)
                if hashed in seen:
                    duplicates.append(group.key)
                    bad.append(BadRecord(name, group.key, repeated(group)))
                    continue
                seen.add(hashed)
                try:
                    sample = parse(name, group, data)
                    builder.add(sample, group, [segment_facts(segment, data) for segment in sample.segments])
                except Unwanted as error:
                    unwanted[str(error)] += 1
                except BadSample as error:
                    bad.append(BadRecord(name, group.key, str(error)))
        except Damaged as error:
            bad.append(BadRecord(name, error.key, damage(error)))
            try:
                while file.read(1 << 20):  # the hash covers the whole file
                    pass
            except Damaged:
                pass
    arrays = {(segment.stored, segment.maker) for segment in builder.segments if segment.stored}
    meta = IndexMeta(
        settings=settings_of(data),
        stamp=stamp,
        sha256=file.sha256.hexdigest(),
        count=len(builder.keys),
        extensions=list(builder.extensions),
        bad=bad,
        duplicates=duplicates,
        pictures=sum(segment.kind == IMAGE for segment in builder.segments),
        stored={kind: sorted(maker for name, maker in arrays if name == kind) for kind, _ in sorted(arrays)},
        unwanted=dict(unwanted),
    )
    return _file(builder.columns(tokenizer), meta)


def repeated(group: Group) -> str:
    """The reason for a group whose key occurred earlier in the shard, not adjacent to this one."""
    return f"its key occurs again, apart from the first (members {sorted(group.members)})"


def segment_facts(segment: Segment, data: DataConfig) -> SegmentFacts:
    """The facts of a segment; raises `BadSample`."""
    if isinstance(segment, Text):
        return SegmentFacts(learn=segment.learn)
    if not segment.stored:
        return SegmentFacts(IMAGE, *image_size(segment, data.limits), segment.learn)
    opened = open_stored(segment.data)
    height, width = opened.size
    number, maker = STORED[opened.kind].number, maker_of(segment, opened.kind)
    return SegmentFacts(number, height, width, segment.learn, opened.kind, maker)


def _file(columns: dict[str, NDArray[Any]], meta: IndexMeta) -> bytes:
    return bytes(save(columns, metadata={"index": meta.to_json()}))


def _write(shard: str, cached: Path, content: bytes) -> Path:
    """Write an index next to its shard or, if that is not possible, into the cache; returns a local path."""
    try:
        if not store.is_url(shard):
            return _replace(Path(shard + SUFFIX), content)
        store.write(shard + SUFFIX, content)
    except (OSError, NotImplementedError):  # the folder or store is read-only
        pass
    try:
        return _replace(cached, content)
    except OSError as error:
        raise OSError(
            f"the index of {shard} can be written neither next to it nor to {cached.parent} ({error.strerror}): set "
            "data.cache_dir to a writable folder"
        ) from None


def _replace(path: Path, content: bytes) -> Path:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def find(shard: str, data: DataConfig) -> ShardIndex | None:
    """The index of a shard if it fits the present shard and the present settings, else None."""
    cached = cached_path(shard, data.cache_dir)
    adjacent = Path(shard + SUFFIX)
    if store.is_url(shard):
        adjacent = cached
        if not cached.exists() and (content := store.fetch(shard + SUFFIX)):
            _replace(cached, content)
    for path in (adjacent, cached):
        try:
            index = ShardIndex(path)
        except (OSError, ValueError, KeyError):  # absent, or cut short
            continue
        if index.meta.settings == settings_of(data) and index.meta.stamp == store.stamp(shard):
            return index
    return None


def ensure(shard: str, tokenizer: Tokenizer, data: DataConfig) -> ShardIndex:
    """The index of a shard with text lengths of `tokenizer`; it is made or extended if necessary."""
    index, column = find(shard, data), tokens_column(tokenizer)
    if index and column in index:
        return index
    if index is None:
        content = build(shard, tokenizer, data)
    else:
        texts: list[str] = []
        for i in range(index.count):
            texts += texts_of(load(shard, index, i, data))
        content = _file({**index.columns(), column: token_lengths(texts, tokenizer)}, index.meta)
    return ShardIndex(_write(shard, cached_path(shard, data.cache_dir), content))


def load(shard: str, index: ShardIndex, i: int, data: DataConfig) -> Sample:
    """Sample i of a shard, its images still encoded; raises `BadSample` if it can no longer be read."""
    listed, key = index.members(i), index.key(i)
    first, last = min(offset for _, offset, _ in listed), max(offset + size for _, offset, size in listed)
    try:
        if last - first <= 2 * sum(size for *_, size in listed) + 65536:
            span = store.read(shard, first, last, data.cache_dir, data.limits)
            contents = {name: span[offset - first : offset - first + size] for name, offset, size in listed}
        else:
            contents = {n: store.read(shard, o, o + size, data.cache_dir, data.limits) for n, o, size in listed}
    except OSError as error:
        raise BadSample(f"shard cannot be read: {error}") from None
    if any(len(contents[name]) != size for name, _, size in listed):
        raise BadSample("the shard is shorter than when it was indexed: index it again with `mmgen data index`")
    return assemble(store.name(shard), key, contents, data)


@dataclass(frozen=True)
class _Task:
    tokenizer: Tokenizer
    data: DataConfig


_TASK: list[_Task] = []
_SAMPLES = get_context("fork").Value("q", 0)
"""Samples that this process and its workers have indexed; for progress only."""


def _ensure_in_worker(shard: str) -> str:
    ensure(shard, _TASK[0].tokenizer, _TASK[0].data)
    return shard


def ensure_all(
    shards: Sequence[str], tokenizer: Tokenizer, data: DataConfig, workers: int = 0, log: Log = to_stderr
) -> None:
    """Index all shards that need it, in `workers` processes; a second call continues where the first one stopped.

    Raises:
        FileNotFoundError, OSError: a shard cannot be reached.
        ChildProcessError: a worker was killed.
    """
    checked = Progress("looking for indexes", "shards", len(shards), log, quiet=True).over(shards)
    todo = [shard for shard in checked if (index := find(shard, data)) is None or tokens_column(tokenizer) not in index]
    if not todo:
        return
    before = _SAMPLES.value
    with Progress("indexing", "shards", len(shards), log, done=len(shards) - len(todo)) as progress:
        progress.detail = lambda: f"{_SAMPLES.value - before} samples"
        for _ in progress.each(_each(todo, tokenizer, data, workers)):
            pass


def _each(todo: list[str], tokenizer: Tokenizer, data: DataConfig, workers: int) -> Iterator[str]:
    _TASK[:] = [_Task(tokenizer, data)]  # inherited by the workers
    if workers < 2 or len(todo) < 2:
        for shard in todo:
            yield _ensure_in_worker(shard)
        return
    with pool_of(workers) as pool:
        for future in as_completed([pool.submit(_ensure_in_worker, shard) for shard in todo]):
            yield future.result()


@contextmanager
def pool_of(workers: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of forked processes; raises ChildProcessError if one of them is killed."""
    try:
        with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
            yield pool
    except BrokenProcessPool:
        raise ChildProcessError(
            f"one of {workers} worker processes was killed, probably because memory ran out: use fewer --workers"
        ) from None
