"""Shards written so that the same command goes on where it stopped; what folder, table, text and pages share."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image, ImageOps
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from tokenizers import Tokenizer
from webdataset import TarWriter

from data_prep import tell
from mmgen.config import DataConfig
from mmgen.data.shards.pictures import UNDECODABLE, image_size
from mmgen.data.shards.samples import BadSample, Picture, assemble
from mmgen.train.checkpoint.read import differences

T = TypeVar("T")
Sample = dict[str, bytes]
"""Extension to content."""
# What a phone calls MPO is a JPEG with a second picture behind the first.
EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp"}
KEEP = DataConfig(captionless="keep")


class LeftOut(ValueError):
    """One item of the source that cannot become a sample; the rest is written without it."""


@dataclass(frozen=True)
class Target:
    """Shards to write: `NAME-000000.tar`, ... in the folder `out`."""

    out: Path
    name: str
    per_shard: int
    """Items of the source for each shard."""
    made: dict[str, Any]
    """What the items are and how they become samples, as JSON; it is kept beside the shards."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w-]+", self.name):
            raise ValueError(f"--name {self.name!r}: letters, digits, _ and - only, as a key ends at its first dot")
        if self.per_shard < 1:
            raise ValueError(f"--per-shard must be at least 1, not {self.per_shard}")


def write(target: Target, items: Iterable[T], sample: Callable[[T], Sample]) -> None:
    """Write each shard from the next `per_shard` items; shards that are there stay.

    A shard has its name only when it is complete. The order of `items`, and what `target` says of them, must be the
    same in every call.

    Raises:
        ValueError: the folder holds shards of this name that were made from something else, or there is nothing to
            write.
    """
    out, name, per_shard = target.out, target.name, target.per_shard
    _same_as_before(target)
    source, shards, written, lost = iter(items), 0, 0, 0
    while (first := next(source, None)) is not None:
        chunk = chain([first], islice(source, per_shard - 1))
        shard = out / f"{name}-{shards:06d}.tar"
        shards += 1
        if shard.exists():
            tell(f"{shard}: is there, with {sum(1 for _ in chunk)} items of the source")
            continue
        done, left = _write_shard(shard, f"{name}-{shards - 1:06d}", chunk, per_shard, sample)
        tell(f"{shard}: {done} samples" if done else f"{shard}: not written, as all its items were left out")
        written, lost = written + done, lost + left
    if not any(out.glob(f"{name}-*.tar")):
        raise ValueError(
            f"all {lost} items were left out, for the reasons above" if lost else "the source holds nothing to write"
        )
    print(f"{shards} shards in {out}; {written} samples written now" + (f", {lost} left out" if lost else ""))


def _same_as_before(target: Target) -> None:
    """Note beside the shards what they are made from; raises ValueError where some were made from something else."""
    out, name, made = target.out, target.name, {**target.made, "per_shard": target.per_shard}
    note = out / f"{name}.source.json"
    if note.exists() and any(out.glob(f"{name}-*.tar")):
        before = json.loads(note.read_text())
        changed = differences({**made, "files": ""}, {**before, "files": ""})
        if made.get("files") != before.get("files"):
            changed.insert(0, "files were added, removed or changed")
        if changed:
            raise ValueError(
                f"{out} holds {name} shards that were made from something else: {'; '.join(changed)}. "
                f"Choose another --out or --name, or remove them (or {note}, if you know that nothing has changed)"
            )
    out.mkdir(parents=True, exist_ok=True)
    part = note.with_suffix(".part")
    part.write_text(json.dumps(made, indent=1) + "\n")
    part.replace(note)


def _write_shard(
    target: Path, prefix: str, chunk: Iterable[T], per_shard: int, sample: Callable[[T], Sample]
) -> tuple[int, int]:
    """How many samples were written, and how many items left out."""
    part, done, left = target.with_name(target.name + ".part"), 0, 0
    console = Console(stderr=True)
    bar = track(
        chunk, escape(target.name), total=per_shard, console=console, transient=True, disable=not console.is_terminal
    )
    with part.open("wb") as file:
        with TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT") as sink:
            for place, item in enumerate(bar):
                key = f"{prefix}-{place:06d}"
                try:
                    members = sample(item)
                    _check(key, members)
                except LeftOut as error:
                    tell(f"left out: {error}")
                    left += 1
                else:
                    sink.write({"__key__": key, **members})
                    done += 1
        file.flush()
        os.fsync(file.fileno())
    part.replace(target) if done else part.unlink()
    return done, left


def _check(key: str, members: Sample) -> None:
    """Raise `LeftOut` where mmgen, with its usual limits, would not take the sample."""
    try:
        if sum(map(len, members.values())) > KEEP.limits.member_bytes:
            raise BadSample(f"its members hold more than {KEEP.limits.member_bytes} bytes")
        for segment in assemble("", key, members, KEEP).segments:
            if isinstance(segment, Picture):
                image_size(segment, KEEP.limits)
    except BadSample as error:
        source = json.loads(members["json"]) if "json" in members else {}
        where = source.get("source", key) if isinstance(source, dict) else key
        raise LeftOut(f"{where}: {error}") from None


def as_json(value: Any) -> bytes:
    """A `.json` member."""
    return json.dumps(value).encode()


def walk(root: Path, without: Path) -> Iterator[Path]:
    """All files below a folder in the order of their names, through links too; `without` is a folder left out."""
    seen: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen or real == os.path.realpath(without):
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (path for path in (Path(folder, file) for file in sorted(files)) if path.is_file())


def shown(path: Path, root: Path) -> str:
    """A path below `root` as text, also where its name is no UTF-8."""
    return os.fsencode(path.relative_to(root)).decode("utf-8", "replace")


def identity(files: Iterable[Path], root: Path) -> str:
    """Fingerprint of the names (below `root`), sizes and times of files."""
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        digest.update(os.fsencode(file.relative_to(root)) + b"\0%d %d\n" % (stat.st_size, stat.st_mtime_ns))
    return digest.hexdigest()


def image_member(data: bytes, name: str) -> Sample:
    """An image as a member: PNG, JPEG and WebP as they are, other formats that Pillow reads as PNG.

    Raises:
        LeftOut: it cannot be decoded, or has a mode whose range is not known.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        image.load()
        if image.format in EXTENSIONS:
            return {EXTENSIONS[image.format]: data}
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            image = image.convert("I")
        if image.mode == "I":
            low, high = image.getextrema()
            if not 0 <= low <= high < 2**16:
                raise LeftOut(f"{name}: 32 bits from {low} to {high}: convert it to 8 or 16 bits")
            image = image.convert("I;16")
        elif image.mode == "F":
            raise LeftOut(f"{name}: floating point: convert it to 8 or 16 bits")
        elif image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
    except LeftOut:
        raise
    except UNDECODABLE as error:
        raise LeftOut(f"{name}: image cannot be decoded: {error}") from None
    return {"png": buffer.getvalue()}


def measure(tokenizer: Path | None) -> tuple[Callable[[str], int], str]:
    """The length of a text, in tokens of a tokenizer.json or in characters, and a fingerprint of that."""
    if tokenizer is None:
        return len, "characters"
    try:
        text = tokenizer.read_text()
        loaded = Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"{tokenizer} is no tokenizer.json: {error}") from None
    return lambda text: len(loaded.encode(text, add_special_tokens=False).ids), hashlib.sha256(
        text.encode()
    ).hexdigest()


def pieces(text: str, length: int, size: Callable[[str], int]) -> Iterator[str]:
    """Consecutive pieces of at most `length`, cut at white space; a word that is longer alone is cut inside."""
    held, used, gap = list[str](), 0, ""
    for found in re.finditer(r"\S+|\s+", text.strip()):
        part = found[0]
        if part.isspace():
            gap = part
            continue
        for word in _cut(part, length, size):
            need = size(gap + word)
            if held and used + need > length:
                yield "".join(held)
                held, used, gap = [], 0, ""
            elif not held:
                gap = ""
            held.append(gap + word)
            used, gap = used + (need if len(held) > 1 else size(word)), ""
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
