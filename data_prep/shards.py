"""Shards written so that the same command goes on where it stopped; what folder, table, text and pages share."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer
from webdataset import TarWriter

from data_prep import tell
from mmgen.config import differences
from mmgen.data.shards import UNDECODABLE

T = TypeVar("T")
Sample = dict[str, Any]
"""Extension to content, as webdataset's writer takes it."""
EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}


class LeftOut(ValueError):
    """One item of the source that cannot become a sample; the rest is written without it."""


def write(
    out: Path, name: str, items: Iterable[T], sample: Callable[[T], Sample], per_shard: int, made: dict[str, Any]
) -> None:
    """Write `NAME-000000.tar`, ..., each from the next `per_shard` items; shards that are there stay.

    A shard has its name only when it is complete. The order of `items` must be the same in every call, and so must
    `made`, which says what they are and how they become samples: it is kept beside the shards.

    Raises:
        ValueError: the folder holds shards of this name that were made from something else, or nothing was written.
    """
    if per_shard < 1:
        raise ValueError(f"--per-shard must be at least 1, not {per_shard}")
    out.mkdir(parents=True, exist_ok=True)
    note, made = out / f"{name}.source.json", {**made, "per_shard": per_shard}
    changed = differences(made, json.loads(note.read_text())) if note.exists() else []
    if changed:
        raise ValueError(
            f"{out} holds {name} shards that were made from something else: {'; '.join(changed)}. "
            "Choose another --out or --name, or remove them"
        )
    note.write_text(json.dumps(made, indent=1) + "\n")
    source, shards, written, lost = iter(items), 0, 0, 0
    while chunk := list(islice(source, per_shard)):
        target = out / f"{name}-{shards:06d}.tar"
        shards += 1
        if target.exists():
            tell(f"{target}: is there")
            continue
        made_here = _write_shard(target, f"{name}-{shards - 1:06d}", chunk, sample)
        tell(f"{target}: {made_here} samples")
        written, lost = written + made_here, lost + len(chunk) - made_here
    if not shards:
        note.unlink()
        raise ValueError("the source holds nothing to write")
    print(f"{shards} shards in {out}; {written} samples written now" + (f", {lost} left out" if lost else ""))


def _write_shard(target: Path, prefix: str, chunk: list[T], sample: Callable[[T], Sample]) -> int:
    part, count = target.with_name(target.name + ".part"), 0
    shown = Console(stderr=True)
    with part.open("wb") as file, TarWriter(file, encoder=True, mtime=0, format="PAX_FORMAT") as sink:
        for place, item in enumerate(
            track(chunk, target.name, console=shown, transient=True, disable=not shown.is_terminal)
        ):
            try:
                sink.write({"__key__": f"{prefix}-{place:06d}", **sample(item)})
                count += 1
            except LeftOut as error:
                tell(f"left out: {error}")
    part.rename(target)
    return count


def identity(files: Iterable[Path], root: Path) -> str:
    """Fingerprint of the names (below `root`) and sizes of files."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(root)}\0{file.stat().st_size}\n".encode())
    return digest.hexdigest()


def image_member(data: bytes, name: str) -> Sample:
    """An image as a member: PNG, JPEG and WebP as they are, other formats that Pillow reads as PNG.

    Raises:
        LeftOut: it cannot be decoded.
    """
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        if image.format in EXTENSIONS:
            return {EXTENSIONS[image.format]: data}
        buffer = io.BytesIO()
        if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
            image = image.convert("RGB")
        image.save(buffer, format="PNG")
    except UNDECODABLE as error:
        raise LeftOut(f"{name}: image cannot be decoded: {error}") from None
    return {"png": buffer.getvalue()}


def measure(tokenizer: Path | None) -> Callable[[str], int]:
    """The length of a text: in tokens of a tokenizer.json, or in characters."""
    if tokenizer is None:
        return len
    try:
        loaded = Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"{tokenizer} is no tokenizer.json: {error}") from None
    return lambda text: len(loaded.encode(text, add_special_tokens=False).ids)


def pieces(text: str, length: int, size: Callable[[str], int]) -> Iterator[str]:
    """Consecutive pieces of at most `length`, cut at white space; a word that is longer alone is cut inside."""
    held, used, gap = list[str](), 0, ""
    for part in re.findall(r"\S+|\s+", text.strip()):
        if part.isspace():
            gap = part
            continue
        for word in _cut(part, length, size):
            if held and used + size(gap + word) > length:
                yield "".join(held)
                held, used, gap = [], 0, ""
            elif not held:
                gap = ""
            held.append(gap + word)
            used, gap = used + size(gap + word), ""
    if held:
        yield "".join(held)


def _cut(word: str, length: int, size: Callable[[str], int]) -> Iterator[str]:
    """Halve until each part is short enough."""
    if size(word) <= length or len(word) == 1:
        yield word
        return
    middle = len(word) // 2
    yield from _cut(word[:middle], length, size)
    yield from _cut(word[middle:], length, size)
