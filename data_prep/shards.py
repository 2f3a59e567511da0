"""Writing shards so that the same command resumes after an interruption; shared by folder, table, text and pages."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Generic, TypeVar

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

NAME = "Name of the shards: NAME-000000.tar, ...; by default that of the folder. Keys begin with it."
VAL = "Share of the samples for shards NAME-val-000000.tar, ..., chosen by content."
TEST = "Share of the samples for shards NAME-test-000000.tar, ..., chosen by content."


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


TRAIN = "train"


@dataclass(frozen=True)
class Source(Generic[T]):
    """What is turned into shards: items in a fixed order, and how each becomes a sample."""

    items: Iterable[T]
    sample: Callable[[T], Sample]
    """The members of the sample of an item; raises `LeftOut`."""
    made: dict[str, Any]
    """The source and its options, as JSON."""
    total: int | None = None
    """Number of items, if it is known."""


@dataclass(frozen=True)
class Shares:
    """Shares of the samples that go to validation and test shards; equal content always goes to the same split."""

    val: float = 0.0
    test: float = 0.0

    def __post_init__(self) -> None:
        if min(self.val, self.test) < 0 or self.val + self.test >= 1:
            raise ValueError(f"--val {self.val:g} and --test {self.test:g} must be shares that add up to less than 1")

    @property
    def splits(self) -> list[str]:
        """The splits that are written; training is the last, since it completes the shards of a part of the source."""
        return [name for name, share in (("val", self.val), ("test", self.test)) if share] + [TRAIN]

    def split(self, members: Sample) -> str:
        """The split of a sample, from a hash of its images, or of its text where it has no images."""
        images = [members[name] for name in sorted(members) if name not in ("json", "txt")]
        digest = hashlib.sha256(b"".join(images) or members.get("txt") or members.get("json", b"")).digest()
        at = int.from_bytes(digest[:8], "big") / 2**64
        return "val" if at < self.val else "test" if at < self.val + self.test else TRAIN


@dataclass(frozen=True)
class Target:
    """Shards to write in the folder `out`: `NAME-000000.tar`, ..., or `NAME-train-000000.tar`, ... with `shares`."""

    out: Path
    name: str | None
    """The first part of the names of shards and keys; None takes the name of the folder."""
    per_shard: int
    """Number of items of the source for each shard."""
    made: dict[str, Any]
    """The source and the options, as JSON; stored next to the shards to detect a changed source."""
    shares: Shares = Shares()

    def __post_init__(self) -> None:
        if self.name is not None and not re.fullmatch(r"[\w-]+", self.name):
            raise ValueError(
                f"--name {self.name!r} may contain letters, digits, _ and - only, because a key ends at its first dot"
            )
        if self.per_shard < 1:
            raise ValueError(f"--per-shard must be at least 1, not {self.per_shard}")

    @property
    def stem(self) -> str:
        """The first part of the names of shards and keys."""
        return self.name or re.sub(r"[^\w-]+", "-", self.out.resolve().name) or "data"

    def shard(self, split: str, number: int) -> Path:
        """The path of a shard; its name without suffix is the first part of its keys."""
        stem = self.stem if self.shares == Shares() else f"{self.stem}-{split}"
        return self.out / f"{stem}-{number:06d}.tar"

    @property
    def losses(self) -> Losses:
        """A new report of the items that are left out."""
        return Losses(self.out / f"{self.stem}.left-out.txt")


def write(
    target: Target,
    items: Iterable[T],
    sample: Callable[[T], Sample],
    total: int | None = None,
    losses: Losses | None = None,
) -> None:
    """Write each shard from the next `per_shard` items; existing shards stay as they are.

    A shard gets its name only when it is complete. The order of `items` and the contents of `target` must be the same
    in every call. `total` is the number of items, if it is known. With shares, `per_shard` items go to one shard of
    each split.

    Raises:
        ValueError: the folder holds shards of this name from another source, or there is nothing to write.
    """
    out, name, per_shard = target.out, target.stem, target.per_shard
    _same_as_before(target)
    losses = losses or target.losses
    shards = written = left_out = 0
    with Progress(f"writing {name} shards", "items of the source", total) as progress:
        source = progress.each(items)
        while (first := next(source, None)) is not None:
            chunk = chain([first], islice(source, per_shard - 1))
            number, shard = shards, target.shard(TRAIN, shards)
            shards += 1
            if shard.exists():
                log(f"{shard}: exists, with {sum(1 for _ in chunk)} items of the source")
                continue
            done, left = _write_shards(target, number, chunk, sample, losses)
            for split, count in done.items():
                log(f"{target.shard(split, number)}: {count} samples")
            if not done:
                log(f"{shard}: not written, because all its items were left out")
            written, left_out = written + sum(done.values()), left_out + left
    losses.close()
    if not any(out.glob(f"{name}-*.tar")):
        raise ValueError(
            f"all {left_out} items were left out, for the reasons above"
            if left_out
            else "the source holds nothing to write: name files of the kinds that this script reads (see --help)"
        )
    found = len(list(out.glob(f"{name}-*.tar")))
    print(f"{found} shards in {out}; {written} samples written now" + (f", {left_out} left out" if left_out else ""))


def _same_as_before(target: Target) -> None:
    """Store the source of the shards next to them; raises ValueError if existing shards have another source."""
    out, name, made = writable(target.out), target.stem, {**target.made, "per_shard": target.per_shard}
    if target.shares != Shares():
        made |= asdict(target.shares)
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


def _write_shards(
    target: Target, number: int, chunk: Iterable[T], sample: Callable[[T], Sample], losses: Losses
) -> tuple[dict[str, int], int]:
    """Write the shards of one part of the source; returns the samples of each split and the items left out."""
    paths, done, left = {split: target.shard(split, number) for split in target.shares.splits}, Counter[str](), 0
    parts = {split: path.with_name(path.name + ".part") for split, path in paths.items()}
    with ExitStack() as files:
        sinks = {}
        for split, part in parts.items():
            file = files.enter_context(part.open("wb"))
            files.callback(os.fsync, file.fileno())
            files.callback(file.flush)
            sinks[split] = files.enter_context(TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT"))
        for item_number, item in enumerate(chunk):
            try:
                members = sample(item)
                split = target.shares.split(members)
                key = f"{paths[split].stem}-{item_number:06d}"
                _check(key, members)
            except LeftOut as error:
                losses.add(error)
                left += 1
            else:
                sinks[split].write({"__key__": key, **members})
                done[split] += 1
    for split, part in parts.items():  # training last: its shard marks the part of the source as complete
        part.replace(paths[split]) if done[split] else part.unlink()
    losses.save()
    return dict(done), left


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
