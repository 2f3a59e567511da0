"""Reading image-text pairs and texts out of WebDataset shards."""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from braceexpand import braceexpand
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander

FORMATS = ("PNG", "JPEG", "WEBP")
IMAGES = ("png", "jpg", "jpeg", "webp")
# What Pillow's decoders raise for damaged or oversized data.
UNDECODABLE = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


class BadSample(ValueError):
    """One sample that cannot be used; the run goes on without it."""


@dataclass(frozen=True)
class Sample:
    """One member group of a shard; its image is still encoded."""

    shard: str
    key: str
    image: bytes | None
    caption: str
    meta: dict[str, Any] = field(default_factory=dict)
    """The `.json` member, where there is one."""

    @property
    def name(self) -> str:
        """Shard and key, as messages name it."""
        return f"{self.shard}/{self.key}"


def expand(patterns: Sequence[str]) -> list[str]:
    """Shard paths of brace patterns.

    Raises:
        FileNotFoundError: a shard does not exist; the message names it.
        ValueError: no pattern was given.
    """
    shards = [shard for pattern in patterns for shard in braceexpand(pattern)]
    if not shards:
        raise ValueError("no shards are given: set data.train (or the setting that is empty) to one or more .tar files")
    for shard in shards:
        if not Path(shard).is_file():
            raise FileNotFoundError(f"shard {shard} does not exist: make it first or correct the path in the config")
    return shards


def read(patterns: Sequence[str], bad: list[dict[str, str]] | None = None) -> Iterator[Sample]:
    """Yield the samples of all shards in their order.

    A group with neither image nor text, or with unreadable JSON, is appended to `bad` (shard, key, reason)
    and skipped; with `bad` absent it raises.

    Raises:
        FileNotFoundError, ValueError: a shard is missing or is not a readable tar file.
    """
    for shard in expand(patterns):
        refuse_truncated(shard)
        try:
            # webdataset's tar reader on a file that we open: its own opener also runs shell commands.
            with open(shard, "rb") as file:
                for group in group_by_keys(tar_file_expander([{"url": shard, "stream": file}])):
                    try:
                        yield parse(Path(shard).name, group)
                    except BadSample as error:
                        if bad is None:
                            raise
                        bad.append({"shard": Path(shard).name, "key": str(group["__key__"]), "reason": str(error)})
        except (tarfile.TarError, EOFError, ValueError) as error:
            if isinstance(error, BadSample):
                raise
            raise ValueError(f"shard {shard} cannot be read to its end ({error}): fetch or write it again") from None


def refuse_truncated(shard: str) -> None:
    """Raise ValueError for an uncompressed tar without its end mark: readers would silently lose its tail."""
    if not shard.endswith(".tar"):
        return
    with open(shard, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1024))
        if size % 512 or file.read() != bytes(1024):
            raise ValueError(
                f"shard {shard} cannot be read to its end (no end mark at {size} bytes): fetch or write it again"
            )


def parse(shard: str, group: dict[str, Any]) -> Sample:
    """One webdataset group (extension to bytes) as a `Sample`; raises `BadSample`."""
    image = next((group[name] for name in IMAGES if group.get(name)), None)
    meta: dict[str, Any] = {}
    caption = None
    try:
        if "json" in group:
            loaded = json.loads(group["json"])
            meta = loaded if isinstance(loaded, dict) else {}
            caption = meta.get("caption")
        if "txt" in group:
            caption = group["txt"].decode("utf-8")
    except ValueError as error:
        raise BadSample(f"caption cannot be read: {error}") from None
    if caption is not None and not isinstance(caption, str):
        raise BadSample(f"caption is {type(caption).__name__}, not text")
    if image is None and not (caption or "").strip():
        raise BadSample(f"neither an image ({', '.join(IMAGES)}) nor text among members {sorted(group)}")
    return Sample(shard, str(group["__key__"]), image, (caption or "").strip(), meta)


def open_image(data: bytes) -> Image.Image:
    """Decode an image; raises `BadSample` with the reason."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        image.load()
        return image
    except UNDECODABLE as error:
        raise BadSample(f"image cannot be decoded: {error}") from None
