"""Access to shards in local files and at fsspec URLs: expanding patterns, and reading forward or in byte ranges."""

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
from mmgen.data.progress import Progress
from mmgen.data.shards.tar import CHUNK, Damaged, Readable

Patterns = Sequence[str | SourceConfig]
PACKED = (".gz", ".tgz", ".zst")
GRACE = 64 * 2**20
"""Bytes that any compressed shard may unpack to, regardless of its compression ratio."""
OPEN_FILES = 64
RETRIES = (0.1, 0.5, 2.0)
"""Seconds to wait before each retry of a remote read."""


def is_url(path: str) -> bool:
    """Whether a path is an fsspec URL."""
    return re.match(r"[A-Za-z][\w+.-]*:", path) is not None and not Path(path).exists()


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it; raises ValueError if its protocol is not available."""
    import fsspec

    if url.startswith("pipe:"):
        raise ValueError(f"{url} would run a shell command: name a file, or a URL such as s3://bucket/shard.tar")
    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise ValueError(f"{url} cannot be opened: {error}") from None
    return system, str(path)


def expand(patterns: Patterns) -> list[str]:
    """The shards of paths, URLs, brace patterns, globs and sources, in the given order.

    Raises:
        FileNotFoundError: a shard does not exist, or a glob matches nothing; the message names it.
        ValueError: there is no pattern, or its braces do not match.
    """
    shards = []
    for pattern in patterns:
        if isinstance(pattern, SourceConfig):
            shards += expand(pattern.shards)
            continue
        try:
            paths = [*braceexpand(pattern)]
        except ValueError:
            raise ValueError(
                f"the braces of {pattern!r} do not match: write them as in train-{{000..012}}.tar"
            ) from None
        for path in paths:
            shards += _found(path)
    if not shards:
        raise ValueError(
            "no shards are given: name .tar files, or set data.train (or the setting that is empty) to them"
        )
    return shards


def _found(path: str) -> list[str]:
    wild = any(sign in path for sign in "*[") or ("?" in path and not is_url(path))
    if is_url(path):
        files, inside = filesystem(path)
        if not wild:
            return [path]
        with _reached(path):
            shards = sorted(str(files.unstrip_protocol(name)) for name in files.glob(inside))
    elif wild and not Path(path).exists():
        shards = sorted(glob.glob(path, recursive=True))
    else:
        shards = [path] if Path(path).is_file() else []
    if not shards and Path(path).is_dir():
        raise FileNotFoundError(
            f"{path} is a folder, not a shard: name its .tar files, such as '{Path(path) / '*.tar'}'"
        )
    if not shards:
        raise FileNotFoundError(f"shard {path} does not exist: make it first, or correct its path")
    return shards


def is_shard(file: str) -> bool:
    """Whether a file name has the ending of a shard."""
    return file.endswith((".tar", ".tar.gz", ".tgz", ".tar.zst"))


def name(shard: str) -> str:
    """The file name of a shard, which keys random draws and appears in messages; it does not depend on the folder."""
    return shard.rstrip("/").rsplit("/", 1)[-1].split("?", 1)[0]


def stamp(shard: str) -> str:
    """Size and version of a shard as its store reports them; a changed stamp means changed content.

    Raises:
        FileNotFoundError: the shard does not exist.
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
        raise FileNotFoundError(f"shard {shard} does not exist: make it first, or correct its URL") from None
    version = next((facts[k] for k in ("ETag", "etag", "md5", "mtime", "LastModified", "created") if facts.get(k)), "")
    return f"{facts.get('size')} {version}"


@contextmanager
def stream(shard: str, limits: LimitsConfig) -> Iterator[Any]:
    """A shard as a file that is read forward, decompressed if its name ends in .gz, .tgz or .zst.

    Reading raises `Damaged` if the shard cannot be decompressed or exceeds the limits.
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
    """A remote file that is read forward; every failure is an OSError that names the URL."""

    def __init__(self, file: Any, url: str) -> None:
        self.file, self.url = file, url

    def read(self, size: int, /) -> bytes:
        with _reached(self.url):
            return bytes(self.file.read(size))


class Unpacked:
    """A gzip or Zstandard file that is read forward, with a limit on its decompressed size."""

    def __init__(self, file: Readable, shard: str, limits: LimitsConfig) -> None:
        self.file, self.limits = file, limits
        self._zst = shard.endswith(".zst")
        self._engine = self._new()
        self._rest = b""
        self._ready = b""
        self.taken = self.returned = 0

    def _new(self) -> Any:
        if not self._zst:
            return zlib.decompressobj(wbits=31)
        try:
            import zstandard
        except ImportError:
            raise ImportError("a .zst shard needs zstandard (extra `data`): pip install zstandard") from None
        return zstandard.ZstdDecompressor(max_window_size=2**27).decompressobj()

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes; empty at the end."""
        while not self._ready:
            if not self._step(size):
                return b""
        part, self._ready = self._ready[:size], self._ready[size:]
        return part

    def _step(self, size: int) -> bool:
        if not self._rest:
            # Zstandard decompresses its whole input at once, to up to some ten thousand times its size.
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
        except Exception as error:  # zlib.error and ZstdError have no common base class
            raise Damaged(f"its compressed data is damaged: {error}") from None
        self.returned += len(self._ready)
        most = min(self.limits.shard_bytes, max(GRACE, self.limits.ratio * self.taken))
        if self.returned > most:
            raise Damaged(f"it unpacks to more than {most} bytes (data.limits.ratio, data.limits.shard_bytes)")
        return True


class Hashing:
    """A file that is read forward and hashed at the same time."""

    def __init__(self, file: Any) -> None:
        self.file, self.sha256 = file, hashlib.sha256()

    def read(self, size: int, /) -> bytes:
        """Read up to `size` bytes."""
        part: bytes = self.file.read(size)
        self.sha256.update(part)
        return part


def read(shard: str, start: int, end: int, cache_dir: Path, limits: LimitsConfig) -> bytes:
    """Bytes [start, end) of the decompressed shard; fewer if it is shorter."""
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
    """Turn errors of any other type, which file systems raise, into an OSError that names the URL."""
    try:
        yield
    except (OSError, NotImplementedError):
        raise
    except Exception as error:
        raise OSError(f"{url} cannot be reached: {error}") from None


def fetch(url: str) -> bytes | None:
    """The content of a small file, or None if it cannot be read."""
    files, path = filesystem(url)
    try:
        with _reached(url):
            return bytes(files.cat_file(path))
    except OSError:
        return None


def write(url: str, content: bytes) -> None:
    """Write a small file; raises OSError or NotImplementedError if that is not possible."""
    files, path = filesystem(url)
    with _reached(url):
        files.pipe_file(path, content)


class _Open:
    """A file descriptor that is closed when it is no longer referenced."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        os.close(self.number)


@lru_cache(maxsize=OPEN_FILES)
def _descriptor(path: str) -> _Open:
    return _Open(path)


@lru_cache(maxsize=4096)
def unpacked(shard: str, cache_dir: Path, limits: LimitsConfig) -> Path:
    """A compressed shard, decompressed once into the cache, so that samples are read by their offset."""
    folder = cache_dir.expanduser()
    path = folder / (hashlib.sha256(f"{shard}\0{stamp(shard)}".encode()).hexdigest()[:32] + ".tar")
    if path.exists():
        return path
    temporary = path.with_suffix(f".{os.getpid()}.part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"data.cache_dir {folder} cannot be created ({error.strerror}): set it to another folder"
        ) from None
    try:
        with (
            Progress(f"decompressing {name(shard)}", "MiB", quiet=True) as progress,
            stream(shard, limits) as source,
            temporary.open("wb") as out,
        ):
            size = 0
            try:
                while part := source.read(CHUNK):
                    size += out.write(part)
                    progress.done = size >> 20
            except Damaged:
                pass  # the index lists the loss; samples before the damage are still read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
