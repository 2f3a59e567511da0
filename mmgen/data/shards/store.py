"""Where shards are: local files and fsspec URLs, expanded, described and read in ranges."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from braceexpand import braceexpand

from mmgen.config import LimitsConfig, SourceConfig
from mmgen.data.shards.tar import CHUNK, Damaged, Readable

Patterns = Sequence[str | SourceConfig]
PACKED = (".gz", ".tgz", ".zst")
GRACE = 64 * 2**20
"""Bytes that any compressed shard may unpack to, whatever its ratio."""
OPEN_FILES = 64
RETRIES = (0.1, 0.5, 2.0)
"""Seconds to wait before a remote range is asked for again."""


def is_url(path: str) -> bool:
    """Whether a path names a file system of fsspec."""
    return re.match(r"[A-Za-z][\w+.-]*:", path) is not None and not Path(path).exists()


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in it; raises ValueError for a protocol that is not there."""
    import fsspec

    if url.startswith("pipe:"):
        raise ValueError(f"{url} would run a shell command: name a file, or a URL such as s3://bucket/shard.tar")
    try:
        found, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise ValueError(f"{url} cannot be opened: {error}") from None
    return found, str(path)


def expand(patterns: Patterns) -> list[str]:
    """Shards of paths, URLs, brace patterns, globs and sources, in that order.

    Raises:
        FileNotFoundError: a shard does not exist, or a glob finds nothing; the message names it.
        ValueError: no pattern was given.
    """
    shards = []
    for pattern in patterns:
        if isinstance(pattern, SourceConfig):
            shards += expand(pattern.shards)
            continue
        for path in braceexpand(pattern):
            shards += _found(path)
    if not shards:
        raise ValueError("no shards are given: set data.train (or the setting that is empty) to one or more .tar files")
    return shards


def _found(path: str) -> list[str]:
    wild = any(sign in path for sign in "*[") or ("?" in path and not is_url(path))
    if is_url(path):
        if not wild:
            return [path]
        files, inside = filesystem(path)
        shards = sorted(str(files.unstrip_protocol(name)) for name in files.glob(inside))
    elif wild and not Path(path).exists():
        shards = sorted(glob.glob(path, recursive=True))
    else:
        shards = [path] if Path(path).is_file() else []
    if not shards:
        raise FileNotFoundError(f"shard {path} does not exist: make it first or correct the path in the config")
    return shards


def is_shard(file: str) -> bool:
    """Whether a file is a shard by its name."""
    return file.endswith((".tar", ".tar.gz", ".tgz", ".tar.zst"))


def name(shard: str) -> str:
    """The name of a shard that randomness and messages use: the same wherever it is stored."""
    return shard.rstrip("/").rsplit("/", 1)[-1].split("?", 1)[0]


def stamp(shard: str) -> str:
    """Size and version of a shard as its store tells them; another stamp means another content.

    Raises:
        FileNotFoundError: it does not exist.
        OSError: its store cannot be reached.
    """
    if not is_url(shard):
        status = os.stat(shard)
        return f"{status.st_size} {status.st_mtime_ns}"
    files, path = filesystem(shard)
    try:
        with _reached(shard):
            facts = files.info(path)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"shard {shard} does not exist: make it first or correct the URL in the config"
        ) from None
    version = next((facts[k] for k in ("ETag", "etag", "md5", "mtime", "LastModified", "created") if facts.get(k)), "")
    return f"{facts.get('size')} {version}"


@contextmanager
def stream(shard: str, limits: LimitsConfig) -> Iterator[Any]:
    """A shard as a file that is read forward, unpacked where its name ends in .gz, .tgz or .zst.

    Reading raises `Damaged` where it unpacks to more than the limits allow or cannot be unpacked.
    """
    with _opened(shard) as file:
        near = _Far(file, shard) if is_url(shard) else file
        yield Unpacked(near, name(shard), limits) if name(shard).endswith(PACKED) else near


def _opened(shard: str) -> Any:
    if not is_url(shard):
        return open(shard, "rb")
    files, path = filesystem(shard)
    with _reached(shard):
        return files.open(path, "rb", block_size=4 * CHUNK)


class _Far:
    """A remote file read forward; whatever breaks is an OSError that names it."""

    def __init__(self, file: Any, url: str) -> None:
        self.file, self.url = file, url

    def read(self, size: int, /) -> bytes:
        with _reached(self.url):
            return bytes(self.file.read(size))


class Unpacked:
    """A gzip or Zstandard file read forward, with a cap on what it may become."""

    def __init__(self, file: Readable, shard: str, limits: LimitsConfig) -> None:
        self.file, self.limits = file, limits
        self._zst = shard.endswith(".zst")
        self._engine = self._new()
        self._rest = b""
        self._ready = b""
        self.taken = self.given = 0

    def _new(self) -> Any:
        if not self._zst:
            return zlib.decompressobj(wbits=31)
        try:
            import zstandard
        except ImportError:
            raise ImportError("a .zst shard needs the package zstandard: install mmgen[data]") from None
        return zstandard.ZstdDecompressor(max_window_size=2**27).decompressobj()

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes, none at the end."""
        while not self._ready:
            if not self._step(size):
                return b""
        part, self._ready = self._ready[:size], self._ready[size:]
        return part

    def _step(self, size: int) -> bool:
        if not self._rest:
            # Zstandard unpacks all it is given at once, up to some ten thousand times as much.
            self._rest = self.file.read(4096 if self._zst else 1 << 16)
            self.taken += len(self._rest)
        if not self._rest:
            if not self._engine.eof:
                raise Damaged("its compressed data ends early")
            return False
        if self._engine.eof:
            if not self._rest.strip(b"\0"):  # padding after the last stream
                self._rest = b""
                return True
            self._engine = self._new()
        try:
            if self._zst:
                self._ready = self._engine.decompress(self._rest)
                self._rest = self._engine.unused_data if self._engine.eof else b""
            else:
                self._ready = self._engine.decompress(self._rest, size)
                self._rest = self._engine.unused_data if self._engine.eof else self._engine.unconsumed_tail
        except Exception as error:  # zlib.error and ZstdError, which share no base
            raise Damaged(f"its compressed data is wrong: {error}") from None
        self.given += len(self._ready)
        most = min(self.limits.shard_bytes, max(GRACE, self.limits.ratio * self.taken))
        if self.given > most:
            raise Damaged(f"it unpacks to more than {most} bytes (data.limits.ratio, data.limits.shard_bytes)")
        return True


def read(shard: str, start: int, end: int, cache_dir: Path, limits: LimitsConfig) -> bytes:
    """Bytes [start, end) of the uncompressed shard; fewer where it is shorter."""
    if not is_url(shard) and not shard.endswith(PACKED):
        return os.pread(_descriptor(shard).number, end - start, start)
    if name(shard).endswith(PACKED):
        return os.pread(_descriptor(str(unpacked(shard, cache_dir, limits))).number, end - start, start)
    files, path = filesystem(shard)
    for wait in RETRIES:
        try:
            with _reached(shard):
                return bytes(files.cat_file(path, start=start, end=end))
        except OSError:
            time.sleep(wait)
    with _reached(shard):
        return bytes(files.cat_file(path, start=start, end=end))


@contextmanager
def _reached(url: str) -> Iterator[None]:
    """Errors of any file system's own kind become an OSError that names the URL."""
    try:
        yield
    except (OSError, NotImplementedError):
        raise
    except Exception as error:
        raise OSError(f"{url} cannot be reached: {error}") from None


def fetch(url: str) -> bytes | None:
    """A whole small file, or None where it cannot be had."""
    files, path = filesystem(url)
    try:
        with _reached(url):
            return bytes(files.cat_file(path))
    except OSError:
        return None


def write(url: str, content: bytes) -> None:
    """Write a small file; raises OSError or NotImplementedError where that is not possible."""
    files, path = filesystem(url)
    with _reached(url):
        files.pipe_file(path, content)


class _Open:
    """A file descriptor that is closed when nothing refers to it any more."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        os.close(self.number)


@lru_cache(maxsize=OPEN_FILES)
def _descriptor(path: str) -> _Open:
    return _Open(path)


@lru_cache(maxsize=4096)
def unpacked(shard: str, cache_dir: Path, limits: LimitsConfig) -> Path:
    """A compressed shard, unpacked once into the cache, where samples can be found again by offset."""
    folder = cache_dir.expanduser()
    path = folder / (hashlib.sha256(f"{shard}\0{stamp(shard)}".encode()).hexdigest()[:32] + ".tar")
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.part")
    try:
        with stream(shard, limits) as source, temporary.open("wb") as out:
            try:
                while part := source.read(CHUNK):
                    out.write(part)
            except Damaged:
                pass  # the index tells what was lost; samples before the damage are still read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
