"""The index of a shard: where each sample stands and how long its document is, without decoding anything again.

One safetensors file per shard, beside it or in the cache: columns per sample, member and segment, mapped into memory
and read where needed. Names of columns: n samples, m members, s segments.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from mmgen.config import DataConfig
from mmgen.data.shards import store
from mmgen.data.shards.samples import (
    Bad,
    BadSample,
    Group,
    Picture,
    Sample,
    assemble,
    autoencoder_of,
    damage,
    groups,
    image_size,
    parse,
)
from mmgen.data.shards.tar import Damaged
from mmgen.sequence.tokenizer import Tokenizer

VERSION = "2"
SUFFIX = ".mmgen-index"
TEXT, IMAGE, LATENT = 0, 1, 2
Ints = NDArray[np.int64]
Tell = Callable[[int, int], None]
"""Called with the number of shards done and of all shards."""


def settings_of(data: DataConfig) -> str:
    """What decides which samples of a shard are sound, and what their text is."""
    return f"{VERSION} {data.captionless} {data.clean_captions} {data.limits.model_dump_json()}"


def key_hash(shard: str, key: str) -> int:
    """64 bits that stand for a sample in fast keyed draws."""
    return int.from_bytes(hashlib.blake2b(f"{shard}\0{key}".encode(), digest_size=8).digest(), "little")


class ShardIndex:
    """The columns of one shard, mapped from its index file."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        size = int.from_bytes(self._map[:8], "little")
        header = json.loads(self._map[8 : 8 + size])
        self.meta: dict[str, Any] = json.loads(header.pop("__metadata__")["index"])
        self._header, self._start = header, 8 + size
        self.count = int(self.meta["count"])
        self._columns: dict[str, NDArray[Any]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._header

    def column(self, name: str) -> NDArray[Any]:
        """One column, without a copy."""
        if name in self._columns:
            return self._columns[name]
        facts = self._header[name]
        first, last = facts["data_offsets"]
        kind = np.dtype({"U8": "u1", "I32": "<i4", "I64": "<i8", "U64": "<u8"}[facts["dtype"]])
        flat = np.frombuffer(self._map, kind, (last - first) // kind.itemsize, self._start + first)
        self._columns[name] = flat
        return flat

    def columns(self) -> dict[str, NDArray[Any]]:
        """All of them."""
        return {name: self.column(name) for name in self._header}

    def key(self, i: int) -> str:
        """Key of sample i."""
        ends = self.column("key_end_n")
        first = int(ends[i - 1]) if i else 0
        return bytes(self.column("key_bytes")[first : int(ends[i])]).decode()

    def members(self, i: int) -> list[tuple[str, int, int]]:
        """(extension, offset, size) of the members of sample i."""
        ends = self.column("member_end_n")
        here = slice(int(ends[i - 1]) if i else 0, int(ends[i]))
        parts = (self.column(name)[here].tolist() for name in ("extension_m", "offset_m", "size_m"))
        return [(self.meta["extensions"][e], offset, size) for e, offset, size in zip(*parts, strict=True)]


class Builder:
    """Collects the columns of one shard."""

    def __init__(self) -> None:
        self.keys: list[bytes] = []
        self.hashes: list[int] = []
        self.paired: list[bool] = []
        self.member_end: list[int] = []
        self.member: list[tuple[int, int, int]] = []
        self.segment_end: list[int] = []
        self.segment: list[tuple[int, int, int]] = []
        self.texts: list[str] = []
        self.extensions: dict[str, int] = {}

    def add(self, sample: Sample, group: Group, sizes: list[tuple[int, int, int]]) -> None:
        """Append one sound sample; `sizes` are (kind, height, width) of its segments."""
        self.keys.append(sample.key.encode())
        self.hashes.append(key_hash(sample.shard, sample.key))
        self.paired.append(sample.paired)
        for name, member in group.members.items():
            number = self.extensions.setdefault(name, len(self.extensions))
            self.member.append((number, member.offset, member.size))
        self.member_end.append(len(self.member))
        self.segment += sizes
        self.segment_end.append(len(self.segment))
        self.texts += [s if isinstance(s, str) else "" for s in sample.segments]

    def columns(self, tokenizer: Tokenizer) -> dict[str, NDArray[Any]]:
        """All columns, text lengths in tokens of `tokenizer` among them."""
        member = np.array(self.member, dtype=np.int64).reshape(-1, 3)
        segment = np.array(self.segment, dtype=np.int32).reshape(-1, 3)
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
            "kind_s": segment[:, 0].astype(np.uint8),
            "height_s": segment[:, 1].copy(),
            "width_s": segment[:, 2].copy(),
            tokens_column(tokenizer): token_lengths(self.texts, tokenizer),
        }


def tokens_column(tokenizer: Tokenizer) -> str:
    """Name of the column of text lengths in tokens of one tokenizer."""
    return f"tokens_s:{tokenizer.fingerprint}"


def token_lengths(texts: Sequence[str], tokenizer: Tokenizer) -> NDArray[np.int32]:
    """Tokens of each text."""
    return np.array([len(ids) for ids in tokenizer.encode_batch(texts)], dtype=np.int32)


class _Hashing:
    """A file read forward, hashed on the way."""

    def __init__(self, file: Any) -> None:
        self.file, self.sha256 = file, hashlib.sha256()

    def read(self, size: int, /) -> bytes:
        part: bytes = self.file.read(size)
        self.sha256.update(part)
        return part


def cached_path(shard: str, cache_dir: Path) -> Path:
    """Where the index of a shard stands if not beside it."""
    digest = hashlib.sha256(shard.encode()).hexdigest()[:32]
    return cache_dir.expanduser() / f"{store.name(shard)[:80]}-{digest}{SUFFIX}"


def build(shard: str, tokenizer: Tokenizer, data: DataConfig) -> bytes:
    """Read a shard once and return its index as the bytes of a file."""
    builder, bad, duplicates = Builder(), list[Bad](), list[str]()
    pictures, autoencoders = 0, set[str]()
    name, seen = store.name(shard), set[int]()
    stamp = store.stamp(shard)
    with store.stream(shard, data.limits) as plain:
        file = _Hashing(plain)
        try:
            for group in groups(file, data.limits):
                hashed = key_hash(name, group.key)
                if hashed in seen:
                    duplicates.append(group.key)
                    bad.append({"shard": name, "key": group.key, "reason": repeated(group)})
                    continue
                seen.add(hashed)
                try:
                    sample = parse(name, group, data)
                    builder.add(sample, group, [segment_facts(segment, data) for segment in sample.segments])
                    shown = [segment for segment in sample.segments if isinstance(segment, Picture)]
                    pictures += sum(not picture.latent for picture in shown)
                    autoencoders |= {autoencoder_of(picture) for picture in shown if picture.latent}
                except BadSample as error:
                    bad.append({"shard": name, "key": group.key, "reason": str(error)})
        except Damaged as error:
            bad.append({"shard": name, "key": error.key, "reason": damage(error)})
            try:
                while file.read(1 << 20):  # the hash is that of the whole file
                    pass
            except Damaged:
                pass
    meta = {
        "settings": settings_of(data),
        "stamp": stamp,
        "sha256": file.sha256.hexdigest(),
        "count": len(builder.keys),
        "extensions": list(builder.extensions),
        "bad": bad,
        "duplicates": duplicates,
        "pictures": pictures,
        "autoencoders": sorted(autoencoders),
    }
    return _file(builder.columns(tokenizer), meta)


def repeated(group: Group) -> str:
    """Why a group is bad whose key stood in the shard before."""
    return f"its key occurs again, apart from the first (members {sorted(group.members)})"


def segment_facts(segment: str | Picture, data: DataConfig) -> tuple[int, int, int]:
    """(kind, height, width) of a segment; raises `BadSample`."""
    if isinstance(segment, str):
        return TEXT, 0, 0
    return (LATENT if segment.latent else IMAGE, *image_size(segment, data.limits))


def _file(columns: dict[str, NDArray[Any]], meta: dict[str, Any]) -> bytes:
    return bytes(save(columns, metadata={"index": json.dumps(meta)}))


def _write(shard: str, cached: Path, content: bytes) -> Path:
    """Put an index beside its shard, else into the cache; returns a local path."""
    try:
        if not store.is_url(shard):
            return _replace(Path(shard + SUFFIX), content)
        store.write(shard + SUFFIX, content)
    except (OSError, NotImplementedError):  # a place where we may not write
        pass
    return _replace(cached, content)


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
    """The index of a shard as it is now and as it would be read now, or None."""
    cached = cached_path(shard, data.cache_dir)
    beside = Path(shard + SUFFIX)
    if store.is_url(shard):
        beside = cached
        if not cached.exists() and (content := store.fetch(shard + SUFFIX)):
            _replace(cached, content)
    for path in (beside, cached):
        try:
            found = ShardIndex(path)
        except (OSError, ValueError, KeyError):  # absent, or cut short
            continue
        if found.meta["settings"] == settings_of(data) and found.meta["stamp"] == store.stamp(shard):
            return found
    return None


def ensure(shard: str, tokenizer: Tokenizer, data: DataConfig) -> ShardIndex:
    """The index of a shard with text lengths of `tokenizer`, made or extended where it is missing."""
    found, column = find(shard, data), tokens_column(tokenizer)
    if found and column in found:
        return found
    if found is None:
        content = build(shard, tokenizer, data)
    else:
        texts: list[str] = []
        for i in range(found.count):
            sample = load(shard, found, i, data)
            texts += [s if isinstance(s, str) else "" for s in sample.segments]
        content = _file({**found.columns(), column: token_lengths(texts, tokenizer)}, found.meta)
    return ShardIndex(_write(shard, cached_path(shard, data.cache_dir), content))


def load(shard: str, index: ShardIndex, i: int, data: DataConfig) -> Sample:
    """Sample i of a shard, its images still encoded; raises `BadSample` where it cannot be read any more."""
    listed, key = index.members(i), index.key(i)
    first, last = min(offset for _, offset, _ in listed), max(offset + size for _, offset, size in listed)
    try:
        if last - first <= 2 * sum(size for *_, size in listed) + 65536:
            span = store.read(shard, first, last, data.cache_dir, data.limits)
            found = {name: span[offset - first : offset - first + size] for name, offset, size in listed}
        else:
            found = {n: store.read(shard, o, o + size, data.cache_dir, data.limits) for n, o, size in listed}
    except OSError as error:
        raise BadSample(f"shard cannot be read: {error}") from None
    if any(len(found[name]) != size for name, _, size in listed):
        raise BadSample("the shard is shorter than when it was indexed")
    return assemble(store.name(shard), key, found, data)


@dataclass(frozen=True)
class _Task:
    tokenizer: Tokenizer
    data: DataConfig


_TASK: list[_Task] = []


def _ensure_in_worker(shard: str) -> str:
    ensure(shard, _TASK[0].tokenizer, _TASK[0].data)
    return shard


def ensure_all(
    shards: Sequence[str], tokenizer: Tokenizer, data: DataConfig, workers: int = 0, tell: Tell | None = None
) -> None:
    """Index all shards that need it, in `workers` processes; a second call goes on where a first one stopped.

    Raises:
        FileNotFoundError, OSError: a shard cannot be reached.
    """
    todo = [shard for shard in shards if (found := find(shard, data)) is None or tokens_column(tokenizer) not in found]
    for done, _ in enumerate(_each(todo, tokenizer, data, workers), len(shards) - len(todo) + 1):
        if tell:
            tell(done, len(shards))


def _each(todo: list[str], tokenizer: Tokenizer, data: DataConfig, workers: int) -> Iterator[str]:
    _TASK[:] = [_Task(tokenizer, data)]  # inherited by the workers
    if workers < 2 or len(todo) < 2:
        for shard in todo:
            yield _ensure_in_worker(shard)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        for future in as_completed([pool.submit(_ensure_in_worker, shard) for shard in todo]):
            yield future.result()
