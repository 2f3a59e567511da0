"""Writing shards so that the same command resumes after an interruption; shared by folder, table, text and pages."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image, ImageOps
from tokenizers import Tokenizer
from webdataset import TarWriter

from data_prep import log, reason, writable
from mmgen.config import DataConfig
from mmgen.data.progress import Progress
from mmgen.data.shards.pictures import UNDECODABLE, image_size, undecodable
from mmgen.data.shards.samples import BadSample, Picture, assemble
from mmgen.data.tools.findings import EXAMPLES, kind_of

T = TypeVar("T")
Sample = dict[str, bytes]
"""Extension to content."""
# MPO, which phones write, is a JPEG with a second picture after the first.
EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp"}
KEEP = DataConfig(captionless="keep")


class LeftOut(ValueError):
    """Raised for one item of the source that cannot become a sample; the other items are written without it."""

    def __init__(self, item: str, why: str) -> None:
        super().__init__(f"{item}: {why}")
        self.why = why


class Losses:
    """Reports the items that are left out: the first of each kind as lines, then counts, and all of them in a file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.counts: Counter[str] = Counter()
        """Kind of reason to the number of items."""
        self._pending: list[str] = []

    def add(self, error: LeftOut, label: str = "left out") -> None:
        """Report one item."""
        kind = f"{label}: {kind_of(error.why)}"
        self.counts[kind] += 1
        self._pending.append(f"{label}: {error}")
        if self.counts[kind] <= EXAMPLES:
            log(f"{label}: {error}")
        elif self.counts[kind] == EXAMPLES + 1:
            log(f"{label}: further items for this reason are listed in {self.file}")

    def save(self) -> None:
        """Append the reported items to the file. Called once a shard is complete, so that no item is listed twice."""
        if self._pending:
            with self.file.open("a", encoding="utf-8", errors="replace") as file:
                file.writelines(" ".join(line.splitlines()) + "\n" for line in self._pending)
            self._pending.clear()

    def close(self) -> None:
        """Save, and print the count of each kind that was not printed in full."""
        self.save()
        for kind, count in self.counts.items():
            if count > EXAMPLES:
                log(f"{count:,} {kind}; all are listed in {self.file}")


@dataclass(frozen=True)
class Target:
    """Shards to write: `NAME-000000.tar`, ... in the folder `out`."""

    out: Path
    name: str
    per_shard: int
    """Number of items of the source for each shard."""
    made: dict[str, Any]
    """The source and the options, as JSON; stored next to the shards to detect a changed source."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w-]+", self.name):
            raise ValueError(
                f"--name {self.name!r} may contain letters, digits, _ and - only, because a key ends at its first dot"
            )
        if self.per_shard < 1:
            raise ValueError(f"--per-shard must be at least 1, not {self.per_shard}")

    @property
    def losses(self) -> Losses:
        """A new report of the items that are left out."""
        return Losses(self.out / f"{self.name}.left-out.txt")


def write(
    target: Target,
    items: Iterable[T],
    sample: Callable[[T], Sample],
    total: int | None = None,
    losses: Losses | None = None,
) -> None:
    """Write each shard from the next `per_shard` items; existing shards stay as they are.

    A shard gets its name only when it is complete. The order of `items` and the contents of `target` must be the same
    in every call. `total` is the number of items, if it is known.

    Raises:
        ValueError: the folder holds shards of this name from another source, or there is nothing to write.
    """
    out, name, per_shard = target.out, target.name, target.per_shard
    _same_as_before(target)
    losses = losses or target.losses
    shards = written = left_out = 0
    with Progress(f"writing {name} shards", "items of the source", total) as progress:
        source = progress.each(items)
        while (first := next(source, None)) is not None:
            chunk = chain([first], islice(source, per_shard - 1))
            shard = out / f"{name}-{shards:06d}.tar"
            shards += 1
            if shard.exists():
                log(f"{shard}: exists, with {sum(1 for _ in chunk)} items of the source")
                continue
            done, left = _write_shard(shard, f"{name}-{shards - 1:06d}", chunk, sample, losses)
            log(f"{shard}: {done} samples" if done else f"{shard}: not written, because all its items were left out")
            written, left_out = written + done, left_out + left
    losses.close()
    if not any(out.glob(f"{name}-*.tar")):
        raise ValueError(
            f"all {left_out} items were left out, for the reasons above"
            if left_out
            else "the source holds nothing to write: name files of the kinds that this script reads (see --help)"
        )
    print(f"{shards} shards in {out}; {written} samples written now" + (f", {left_out} left out" if left_out else ""))


def _same_as_before(target: Target) -> None:
    """Store the source of the shards next to them; raises ValueError if existing shards have another source."""
    out, name, made = writable(target.out), target.name, {**target.made, "per_shard": target.per_shard}
    note = out / f"{name}.source.json"
    if note.exists() and any(out.glob(f"{name}-*.tar")):
        from mmgen.train.checkpoint.read import differences  # it imports torch, which takes seconds

        before = read_note(note)
        changed = differences({**made, "files": ""}, {**before, "files": ""})
        if made.get("files") != before.get("files"):
            changed.insert(0, "files were added, removed or changed")
        if changed:
            raise ValueError(
                f"{out} holds {name} shards that were made from something else: {'; '.join(changed)}. "
                f"Choose another --out or --name, or remove them (or {note}, if you are sure that nothing has changed)"
            )
    part = note.with_suffix(".part")
    part.write_text(json.dumps(made, indent=1) + "\n")
    part.replace(note)


def read_note(note: Path) -> dict[str, Any]:
    """The contents of a note that a script stored next to its shards; raises ValueError if it is damaged."""
    try:
        before = json.loads(note.read_text())
    except ValueError:
        before = None
    if not isinstance(before, dict):
        raise ValueError(f"{note} is damaged, so the source of these shards is unknown: choose another --out")
    return before


def _write_shard(
    target: Path, prefix: str, chunk: Iterable[T], sample: Callable[[T], Sample], losses: Losses
) -> tuple[int, int]:
    """Write one shard; returns the numbers of samples and of items that were left out."""
    part, done, left = target.with_name(target.name + ".part"), 0, 0
    with part.open("wb") as file:
        with TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT") as sink:
            for number, item in enumerate(chunk):
                key = f"{prefix}-{number:06d}"
                try:
                    members = sample(item)
                    _check(key, members)
                except LeftOut as error:
                    losses.add(error)
                    left += 1
                else:
                    sink.write({"__key__": key, **members})
                    done += 1
        file.flush()
        os.fsync(file.fileno())
    part.replace(target) if done else part.unlink()
    losses.save()
    return done, left


def _check(key: str, members: Sample) -> None:
    """Raise `LeftOut` if mmgen, with its default limits, does not accept the sample."""
    try:
        if sum(map(len, members.values())) > KEEP.limits.member_bytes:
            raise BadSample(f"its members hold more than {KEEP.limits.member_bytes} bytes")
        for segment in assemble("", key, members, KEEP).segments:
            if isinstance(segment, Picture):
                image_size(segment, KEEP.limits)
    except BadSample as error:
        source = json.loads(members["json"]) if "json" in members else {}
        where = source.get("source", key) if isinstance(source, dict) else key
        raise LeftOut(where, str(error)) from None


def as_json(value: Any) -> bytes:
    """The bytes of a `.json` member."""
    return json.dumps(value).encode()


def walk(root: Path, without: Path) -> Iterator[Path]:
    """All files below a folder in the order of their names, links followed; the folder `without` is skipped."""
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
    """A path relative to `root` as text, also if its name is not valid UTF-8."""
    return os.fsencode(path.relative_to(root)).decode("utf-8", "replace")


def identity(files: Iterable[Path], root: Path) -> str:
    """A hash of the names (relative to `root`), sizes and modification times of files."""
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        digest.update(os.fsencode(file.relative_to(root)) + b"\0%d %d\n" % (stat.st_size, stat.st_mtime_ns))
    return digest.hexdigest()


def image_member(data: bytes, name: str) -> Sample:
    """An image as a member: PNG, JPEG and WebP unchanged, other formats that Pillow reads as PNG.

    Raises:
        LeftOut: the image cannot be decoded, or the range of its pixel values is not known.
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
                raise LeftOut(name, f"32 bits with values from {low} to {high}: convert it to 8 or 16 bits")
            image = image.convert("I;16")
        elif image.mode == "F":
            raise LeftOut(name, "floating point: convert it to 8 or 16 bits")
        elif image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
    except LeftOut:
        raise
    except UNDECODABLE as error:
        raise LeftOut(name, undecodable(error, ())) from None
    return {"png": buffer.getvalue()}


def measure(tokenizer: Path | None) -> tuple[Callable[[str], int], str]:
    """A function from a text to its length, in tokens of a tokenizer.json or in characters, and its fingerprint."""
    if tokenizer is None:
        return len, "characters"
    try:
        text = tokenizer.read_text()
        loaded = Tokenizer.from_str(text)
    except OSError as error:
        raise ValueError(f"--tokenizer {reason(error)}") from None
    except Exception as error:  # tokenizers raises a bare Exception
        raise ValueError(f"{tokenizer} is not a tokenizer.json: {error}") from None
    return lambda text: len(loaded.encode(text, add_special_tokens=False).ids), hashlib.sha256(
        text.encode()
    ).hexdigest()


def pieces(text: str, length: int, size: Callable[[str], int]) -> Iterator[str]:
    """Consecutive pieces of at most `length`, cut at white space; a single longer word is cut inside."""
    words, used, gap = list[str](), 0, ""
    for match in re.finditer(r"\S+|\s+", text.strip()):
        part = match[0]
        if part.isspace():
            gap = part
            continue
        for word in _cut(part, length, size):
            need = size(gap + word)
            if words and used + need > length:
                yield "".join(words)
                words, used, gap = [], 0, ""
            elif not words:
                gap = ""
            words.append(gap + word)
            used, gap = used + (need if len(words) > 1 else size(word)), ""
    if words:
        yield "".join(words)


def _cut(word: str, length: int, size: Callable[[str], int]) -> Iterator[str]:
    """Parts of a word, halved until each is short enough."""
    if size(word) <= length or len(word) == 1:
        yield word
        return
    middle = len(word) // 2
    yield from _cut(word[:middle], length, size)
    yield from _cut(word[middle:], length, size)
