"""Samples out of WebDataset shards: grouping of members, and what a group means as a document."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from html import unescape
from pathlib import Path
from typing import Any

from mmgen.config import DataConfig, LimitsConfig
from mmgen.data.shards import store
from mmgen.data.shards.store import Patterns, expand
from mmgen.data.shards.tar import Damaged, Member, members

IMAGES = ("png", "jpg", "jpeg", "webp")
ARRAYS = ("safetensors", "npy")
TEXTS = ("txt", "json")
USED = (*IMAGES, *ARRAYS, *TEXTS)


@dataclass(frozen=True)
class BadRecord:
    """A sample that cannot be used, and why."""

    shard: str
    key: str
    reason: str

    def as_dict(self) -> dict[str, str]:
        """For JSON."""
        return asdict(self)


class BadSample(ValueError):
    """One sample that cannot be used; the run goes on without it."""


@dataclass(frozen=True)
class Text:
    """A stretch of text."""

    text: str
    learn: bool = True
    """Its tokens have a loss."""


@dataclass(frozen=True)
class Picture:
    """An image, or an array that stands for one, still encoded."""

    data: bytes
    stored: bool = False
    """It is a precomputed array (`pictures.STORED`)."""
    learn: bool = True
    """It has a loss; else it is context for what follows."""


Segment = Text | Picture


@dataclass(frozen=True)
class Sample:
    """One member group of a shard; its images are still encoded."""

    shard: str
    key: str
    segments: tuple[Segment, ...]
    """Text and images in their order."""
    paired: bool = False
    """An image and its caption, whose order the run chooses."""
    meta: dict[str, Any] = field(default_factory=dict)
    """The `.json` member, where it is an object."""

    @property
    def name(self) -> str:
        """Shard and key, as messages name it."""
        return f"{self.shard}/{self.key}"

    @property
    def caption(self) -> str:
        """All its text."""
        return "\n".join(segment.text for segment in self.segments if isinstance(segment, Text))

    @property
    def image(self) -> bytes | None:
        """Its first image."""
        return next((s.data for s in self.segments if isinstance(s, Picture) and not s.stored), None)


@dataclass
class Group:
    """Adjacent members of one key: extension to member."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    """Extensions that mean nothing here."""
    reason: str = ""
    """Why the group cannot be used."""

    @property
    def data(self) -> dict[str, bytes]:
        """Extension to bytes."""
        return {name: member.data for name, member in self.members.items() if member.data is not None}


def split_name(path: str) -> tuple[str, str] | None:
    """Key and extension of a member: cut at the first dot of the file name, as webdataset does."""
    folder, slash, file = path.rpartition("/")
    stem, dot, extension = file.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and dot else None


def is_used(path: str) -> bool:
    """Whether a member can be part of a document."""
    parts = split_name(path)
    return parts is not None and parts[1].rsplit(".", 1)[-1] in USED


def groups(file: Any, limits: LimitsConfig) -> Iterator[Group]:
    """Groups of adjacent members, in the order of the archive.

    Raises:
        Damaged: it cannot be read further; the group that was open is lost with it and named as the error's `key`.
    """
    group: Group | None = None
    held = 0
    source = members(file, is_used, limits.member_bytes)
    while True:
        try:
            member = next(source, None)
        except Damaged as error:
            error.key = group.key if group else ""
            raise
        parts = split_name(member.name) if member else None
        if member and parts is None:
            continue
        if group and (parts is None or parts[0] != group.key):
            yield group
            group = None
        if member is None or parts is None:
            return
        if group is None:
            group, held = Group(parts[0]), 0
        if not is_used(member.name):
            group.others.append(parts[1])
            continue
        held += member.size
        if parts[1] in group.members:
            group.reason = group.reason or f"it has two members .{parts[1]}"
        elif member.reason:
            group.reason = group.reason or f".{parts[1]}: {member.reason}"
        elif held > limits.member_bytes:
            group.reason = group.reason or f"its members hold more than {limits.member_bytes} bytes"
        else:
            group.members[parts[1]] = member


def read(patterns: Patterns, bad: list[BadRecord] | None = None, data: DataConfig | None = None) -> Iterator[Sample]:
    """Yield the samples of all shards in their order.

    A group that cannot be used, or what is lost of a damaged shard, is appended to `bad` and skipped; with `bad`
    absent it raises.

    Raises:
        FileNotFoundError, ValueError: a shard is missing or, without `bad`, is not a readable tar file.
    """
    data = data or DataConfig()
    for shard in expand(patterns):
        name = store.name(shard)
        try:
            with store.stream(shard, data.limits) as file:
                for group in groups(file, data.limits):
                    try:
                        yield parse(name, group, data)
                    except BadSample as error:
                        if bad is None:
                            raise
                        bad.append(BadRecord(name, group.key, str(error)))
        except Damaged as error:
            if bad is None:
                raise ValueError(f"shard {shard} {damage(error)}") from None
            bad.append(BadRecord(name, error.key, damage(error)))


def worst_shards(quarantine: Path, most: int = 3) -> str:
    """The shards that lost most samples, with their numbers, from a run's `quarantine.jsonl`."""
    counts = Counter(json.loads(line)["shard"] for line in quarantine.read_text().splitlines())
    return ", ".join(f"{shard}: {count}" for shard, count in counts.most_common(most))


def damage(error: Damaged) -> str:
    """What a damaged shard has lost, and the remedy."""
    return f"cannot be read to its end ({error}): fetch or write it again"


def parse(shard: str, group: Group, data: DataConfig) -> Sample:
    """One group as a `Sample`; raises `BadSample`."""
    if group.reason:
        raise BadSample(group.reason)
    if not group.members:
        raise BadSample(f"neither an image ({', '.join(IMAGES)}) nor text among members {sorted(group.others)}")
    return assemble(shard, group.key, group.data, data)


def assemble(shard: str, key: str, found: Mapping[str, bytes], data: DataConfig) -> Sample:
    """What the members of a key (extension to bytes) say as a document; raises `BadSample`."""
    loaded = _json(found["json"]) if "json" in found else {}
    if isinstance(loaded, list):
        return Sample(shard, key, _interleaved(loaded, key, found, data))
    meta = loaded if isinstance(loaded, dict) else {}
    caption = meta.get("caption")
    if "txt" in found:
        try:
            caption = found["txt"].decode("utf-8")
        except ValueError as error:
            raise BadSample(f"caption cannot be read: {error}") from None
    caption = "" if caption is None else _clean(caption, data)
    array = next((found[name] for name in found if name.rsplit(".", 1)[-1] in ARRAYS), None)
    image = next((found[name] for name in IMAGES if name in found), None)
    if image is None and array is None:
        if not caption:
            raise BadSample(f"neither an image ({', '.join(IMAGES)}) nor text among members {sorted(found)}")
        return Sample(shard, key, (Text(caption),), meta=meta)
    picture = Picture(image or b"") if array is None else Picture(array, stored=True)
    if not picture.data:
        raise BadSample("its image is empty")
    if not caption and data.captionless == "refuse":
        raise BadSample("an image without a caption (data.captionless: keep trains on the image alone)")
    return Sample(shard, key, (Text(caption), picture) if caption else (picture,), bool(caption), meta)


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample(f"caption cannot be read: {error}") from None


def _interleaved(listed: list[Any], key: str, found: Mapping[str, bytes], data: DataConfig) -> tuple[Segment, ...]:
    """Segments of a `.json` list: a text, `{"text": ...}`, or `{"image": member}` with a member of the same key.

    An object may say `"learn": false`: the segment is given, and has no loss.
    """
    segments: list[Segment] = []
    for item in listed:
        fields = item if isinstance(item, dict) else {"text": item}
        text, image, learn = fields.get("text"), fields.get("image"), fields.get("learn", True)
        if not isinstance(learn, bool):
            raise BadSample(f'"learn" of a segment is {learn!r}, not true or false')
        if isinstance(image, str):
            extension = (split_name(image) or ("", image))[1] if image.startswith(key + ".") else image
            kind = extension.lower().rsplit(".", 1)[-1]
            if extension.lower() not in found or kind not in (*IMAGES, *ARRAYS):
                raise BadSample(f"segment {image!r} is no image among members {sorted(found)}")
            segments.append(Picture(found[extension.lower()], kind in ARRAYS, learn))
        elif text is not None:
            if cleaned := _clean(text, data):
                segments.append(Text(cleaned, learn))
        else:
            raise BadSample('a segment is neither text nor {"image": member}')
    if not segments:
        raise BadSample("a list of no segments")
    if not any(segment.learn for segment in segments):
        raise BadSample('nothing in it is learned: every segment has "learn": false')
    if sum(len(segment.text) for segment in segments if isinstance(segment, Text)) > data.limits.caption_chars:
        raise BadSample(f"its text is longer than {data.limits.caption_chars} characters (data.limits.caption_chars)")
    return tuple(segments)


def _clean(caption: object, data: DataConfig) -> str:
    if not isinstance(caption, str):
        raise BadSample(f"caption is {type(caption).__name__}, not text")
    if len(caption) > data.limits.caption_chars:
        raise BadSample(f"caption of {len(caption)} characters (data.limits.caption_chars)")
    # A lone surrogate, which JSON can spell, is no text: no tokenizer takes it.
    caption = caption.encode("utf-8", "replace").decode("utf-8")
    return clean(caption) if data.clean_captions else caption.strip()


def clean(caption: str) -> str:
    """A caption from the web without HTML, links, control characters and repeated white space."""
    caption = re.sub(r"<[^<>]{0,1000}>", " ", unescape(unescape(caption)))
    caption = re.sub(r"(?:https?://|www\.)\S+", " ", unicodedata.normalize("NFC", caption))
    letters = (letter if letter.isspace() or unicodedata.category(letter)[0] != "C" else "" for letter in caption)
    return " ".join("".join(letters).split())
