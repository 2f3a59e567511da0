"""Samples of WebDataset shards: grouping the members of an archive, and reading a group as a document."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from bisect import bisect
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from html import unescape
from itertools import accumulate
from pathlib import Path
from typing import Any

from mmgen.config import DataConfig, LimitsConfig
from mmgen.data.shards import store
from mmgen.data.shards.store import Patterns, expand
from mmgen.data.shards.tar import Damaged, Member, members
from mmgen.expression import Lacking, condition

IMAGES = ("png", "jpg", "jpeg", "webp")
ARRAYS = ("safetensors", "npy")
TXT = "txt"
TEXTS = (TXT, "json")
USED = (*IMAGES, *ARRAYS, *TEXTS)


@dataclass(frozen=True)
class BadRecord:
    """A sample that cannot be used, and the reason."""

    shard: str
    key: str
    reason: str

    @property
    def name(self) -> str:
        """Shard and key, as messages print them; a damaged shard may have no key."""
        return f"{self.shard}/{self.key}" if self.key else self.shard

    def as_dict(self) -> dict[str, str]:
        """The fields as a dictionary, for JSON."""
        return asdict(self)


class BadSample(ValueError):
    """Raised for one sample that cannot be used; the run continues without it."""


class Unwanted(BadSample):
    """Raised for a usable sample that `data.where` leaves out."""


@dataclass(frozen=True)
class Text:
    """A segment of text."""

    text: str
    learn: bool = True
    """Whether its tokens have a loss."""


@dataclass(frozen=True)
class Picture:
    """An image or a precomputed array, still encoded."""

    data: bytes
    stored: bool = False
    """Whether it is a precomputed array (`pictures.STORED`)."""
    learn: bool = True
    """Whether it has a loss; without one it is context for later segments."""


Segment = Text | Picture


@dataclass(frozen=True)
class Sample:
    """One sample of a shard; its images are still encoded."""

    shard: str
    key: str
    segments: tuple[Segment, ...]
    """Text and images in their order."""
    paired: bool = False
    """Whether it is an image and its caption, whose order the run chooses."""
    meta: dict[str, Any] = field(default_factory=dict)
    """The `.json` member, if it is an object."""

    @property
    def name(self) -> str:
        """Shard and key, as messages print them."""
        return f"{self.shard}/{self.key}"

    @property
    def caption(self) -> str:
        """All its text, segments joined by line breaks."""
        return "\n".join(segment.text for segment in self.segments if isinstance(segment, Text))

    @property
    def image(self) -> bytes | None:
        """The bytes of its first image, or None."""
        return next((s.data for s in self.segments if isinstance(s, Picture) and not s.stored), None)


@dataclass
class Group:
    """Adjacent members of one key."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    """Extension to member."""
    others: list[str] = field(default_factory=list)
    """Extensions that mmgen ignores."""
    reason: str = ""
    """Why the group cannot be used; empty if it can."""

    @property
    def data(self) -> dict[str, bytes]:
        """Extension to bytes."""
        return {name: member.data for name, member in self.members.items() if member.data is not None}


def split_name(path: str) -> tuple[str, str] | None:
    """Key and extension of a member, split at the first dot of the file name, as webdataset does."""
    folder, slash, file = path.rpartition("/")
    stem, dot, extension = file.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and dot else None


def is_used(path: str) -> bool:
    """Whether a member of this name can be part of a document."""
    parts = split_name(path)
    return parts is not None and parts[1].rsplit(".", 1)[-1] in USED


def groups(file: Any, limits: LimitsConfig) -> Iterator[Group]:
    """Groups of adjacent members in the order of the archive.

    Raises:
        Damaged: the archive cannot be read further. The group that was being read is lost; the error's `key` names it.
    """
    group: Group | None = None
    size = 0
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
            group, size = Group(parts[0]), 0
        if not is_used(member.name):
            group.others.append(parts[1])
            continue
        size += member.size
        if parts[1] in group.members:
            group.reason = group.reason or f"it has two members .{parts[1]}"
        elif member.reason:
            group.reason = group.reason or f".{parts[1]}: {member.reason}"
        elif size > limits.member_bytes:
            group.reason = (
                group.reason or f"its members hold more than {limits.member_bytes} bytes (data.limits.member_bytes)"
            )
        else:
            group.members[parts[1]] = member


def read(patterns: Patterns, bad: list[BadRecord] | None = None, data: DataConfig | None = None) -> Iterator[Sample]:
    """Yield the samples of all shards in their order.

    A group that cannot be used and the damage of a shard are appended to `bad` and skipped. Without `bad` they raise.

    Raises:
        FileNotFoundError: a shard does not exist.
        ValueError: without `bad`, a shard or a sample cannot be read.
    """
    data = data or DataConfig()
    for shard in expand(patterns):
        name = store.name(shard)
        try:
            with store.stream(shard, data.limits) as file:
                for group in groups(file, data.limits):
                    try:
                        yield parse(name, group, data)
                    except Unwanted:
                        continue
                    except BadSample as error:
                        if bad is None:
                            raise
                        bad.append(BadRecord(name, group.key, str(error)))
        except Damaged as error:
            if bad is None:
                raise ValueError(f"shard {shard} {damage(error)}") from None
            bad.append(BadRecord(name, error.key, damage(error)))


def worst_shards(quarantine: Path, most: int = 3) -> str:
    """The shards with the most bad samples and their counts, from a run's `quarantine.jsonl`."""
    counts = Counter(json.loads(line)["shard"] for line in quarantine.read_text().splitlines())
    return ", ".join(f"{shard}: {count}" for shard, count in counts.most_common(most))


def damage(error: Damaged) -> str:
    """The reason for a damaged shard, with the remedy."""
    return f"cannot be read to its end ({error}): fetch or write it again"


def parse(shard: str, group: Group, data: DataConfig) -> Sample:
    """The sample of a group; raises `BadSample`."""
    if group.reason:
        raise BadSample(group.reason)
    if not group.members:
        raise BadSample(f"neither an image ({', '.join(IMAGES)}) nor text among members {sorted(group.others)}")
    return assemble(shard, group.key, group.data, data)


def assemble(shard: str, key: str, contents: Mapping[str, bytes], data: DataConfig) -> Sample:
    """The sample of the members of a key (extension to bytes); raises `BadSample`."""
    loaded = _json(contents["json"]) if "json" in contents else {}
    if isinstance(loaded, list):
        if data.where is not None:
            _want({}, b"", data)
        return Sample(shard, key, _interleaved(loaded, key, contents, data))
    meta = loaded if isinstance(loaded, dict) else {}
    array = next((contents[name] for name in contents if name.rsplit(".", 1)[-1] in ARRAYS), None)
    image = next((contents[name] for name in IMAGES if name in contents), None)
    if data.where is not None:
        _want(meta, image or b"", data)
    caption = _caption(shard, key, contents, meta, data)
    if image is None and array is None:
        if not caption:
            raise BadSample(f"neither an image ({', '.join(IMAGES)}) nor text among members {sorted(contents)}")
        return Sample(shard, key, (Text(caption),), meta=meta)
    picture = Picture(image or b"") if array is None else Picture(array, stored=True)
    if not picture.data:
        raise BadSample("its image is empty")
    if not caption and data.captionless == "refuse":
        raise BadSample("an image without a caption (data.captionless: keep trains on the image alone)")
    return Sample(shard, key, (Text(caption), picture) if caption else (picture,), bool(caption), meta)


def _caption(shard: str, key: str, contents: Mapping[str, bytes], meta: Mapping[str, Any], data: DataConfig) -> str:
    """The caption of a sample: of `data.captions`, the field that its key draws; raises `BadSample`."""
    found = {name: meta[name] for name in data.captions if name != TXT and meta.get(name)}
    if TXT in contents and (TXT in data.captions or not data.captions):
        try:
            found[TXT] = contents[TXT].decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadSample(f"caption cannot be read: .txt is not UTF-8 ({position(error)})") from None
    if not data.captions:
        caption = found.get(TXT, meta.get("caption"))
        return "" if caption is None else _clean(caption, data)
    cleaned = {name: text for name, value in found.items() if (text := _clean(value, data))}
    names = [name for name in sorted(data.captions) if name in cleaned]  # the draw does not depend on their order
    if not names:
        return ""
    weights = [data.captions[name] for name in names]
    hashed = hashlib.blake2b(f"{shard}\0{key}\0caption".encode(), digest_size=8).digest()
    at = int.from_bytes(hashed, "little") / 2**64 * sum(weights)
    return cleaned[names[min(bisect(list(accumulate(weights)), at), len(names) - 1)]]


def _want(meta: Mapping[str, Any], image: bytes, data: DataConfig) -> None:
    """Raise `Unwanted` unless `data.where` is true for a sample."""
    wanted, fields = condition(data.where or ""), dict(meta)
    if image and wanted.names & {"width", "height"}:
        height, width = pixel_size(image, data.limits)
        fields |= {"width": width, "height": height}
    try:
        if not wanted(fields):
            raise Unwanted("data.where is false")
    except Lacking as error:
        raise Unwanted(f"data.where: {error}") from None


def pixel_size(image: bytes, limits: LimitsConfig) -> tuple[int, int]:
    """(height, width) from the header of an image; raises `BadSample`."""
    from mmgen.data.shards.pictures import image_size  # it imports this module

    return image_size(Picture(image), limits)


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except UnicodeDecodeError as error:
        raise BadSample(f"caption cannot be read: .json is not UTF-8 ({position(error)})") from None
    except (ValueError, RecursionError) as error:
        raise BadSample(f"caption cannot be read: .json is not valid JSON ({error})") from None


def position(error: UnicodeDecodeError) -> str:
    """The byte that cannot be decoded, and its position, for messages."""
    return f"byte {error.object[error.start]:#04x} at position {error.start}"


def _interleaved(listed: list[Any], key: str, contents: Mapping[str, bytes], data: DataConfig) -> tuple[Segment, ...]:
    """The segments of a `.json` list: a text, `{"text": ...}`, or `{"image": member}` with a member of the same key.

    With `"learn": false` in such an object, the segment has no loss.
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
            if extension.lower() not in contents or kind not in (*IMAGES, *ARRAYS):
                raise BadSample(f"segment {image!r} names no image among members {sorted(contents)}")
            segments.append(Picture(contents[extension.lower()], kind in ARRAYS, learn))
        elif text is not None:
            if cleaned := _clean(text, data):
                segments.append(Text(cleaned, learn))
        else:
            raise BadSample('a segment is neither text nor {"image": member}')
    if not segments:
        raise BadSample("its list of segments is empty")
    if not any(segment.learn for segment in segments):
        raise BadSample('nothing in it is learned: every segment has "learn": false')
    if sum(len(segment.text) for segment in segments if isinstance(segment, Text)) > data.limits.caption_chars:
        raise BadSample(f"its text is longer than {data.limits.caption_chars} characters (data.limits.caption_chars)")
    return tuple(segments)


def _clean(caption: object, data: DataConfig) -> str:
    if not isinstance(caption, str):
        raise BadSample(f"caption is {type(caption).__name__}, not text")
    if len(caption) > data.limits.caption_chars:
        raise BadSample(
            f"caption of {len(caption)} characters is longer than {data.limits.caption_chars} "
            "(data.limits.caption_chars)"
        )
    # JSON can contain a lone surrogate, which is not valid text for a tokenizer.
    caption = caption.encode("utf-8", "replace").decode("utf-8")
    return clean(caption) if data.clean_captions else caption.strip()


def clean(caption: str) -> str:
    """A caption without HTML, links, control characters and repeated white space."""
    caption = re.sub(r"<[^<>]{0,1000}>", " ", unescape(unescape(caption)))
    caption = re.sub(r"(?:https?://|www\.)\S+", " ", unicodedata.normalize("NFC", caption))
    letters = (letter if letter.isspace() or unicodedata.category(letter)[0] != "C" else "" for letter in caption)
    return " ".join("".join(letters).split())
