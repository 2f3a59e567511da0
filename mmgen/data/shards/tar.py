"""A tar reader for untrusted archives.

It reads forward, checks every length, follows no link and returns bytes: no path of an archive is written to disk. It
reads ustar, GNU and pax archives. Links, devices and sparse members are reported and left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

BLOCK = 512
CHUNK = 1 << 20
HEADER_BYTES = 1 << 20
"""Largest size of an extended header; a legitimate one holds a path."""
REGULAR = b"0\x007"
KINDS = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe"}


class Damaged(ValueError):
    """Raised for an archive that cannot be read further; earlier members are intact."""

    key = ""
    """The key of the sample that was being read, if any."""


class Readable(Protocol):
    """A file that can be read forward."""

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes; empty at the end."""


@dataclass(frozen=True)
class Member:
    """One entry of an archive."""

    name: str
    offset: int
    """Offset of its first byte in the decompressed archive."""
    size: int
    data: bytes | None = None
    """Its bytes, if they were requested."""
    reason: str = ""
    """Why it has no bytes although they were requested."""


class _Forward:
    """A file that is read forward, with its offset."""

    def __init__(self, file: Readable) -> None:
        self.file, self.offset = file, 0

    def take(self, size: int) -> bytes:
        """Exactly `size` bytes; fewer at the end."""
        parts = []
        while size > 0:
            part = self.file.read(min(size, CHUNK))
            if not part:
                break
            parts.append(part)
            size -= len(part)
            self.offset += len(part)
        return b"".join(parts)

    def whole(self, size: int, what: str) -> bytes:
        """`size` bytes of content; the padding after them is read and dropped."""
        data = self.take(size)
        if len(data) < size:
            raise Damaged(f"it ends inside {what}")
        self.skip(-size % BLOCK, what)
        return data

    def skip(self, size: int, what: str) -> None:
        while size > 0:
            part = self.file.read(min(size, CHUNK))
            if not part:
                raise Damaged(f"it ends inside {what}")
            size -= len(part)
            self.offset += len(part)


def members(file: Readable, wanted: Callable[[str], bool], most: int) -> Iterator[Member]:
    """The regular members of an archive in their order; other members whose name is `wanted` have a `reason`.

    Bytes are read only for members whose name is `wanted` and that have at most `most` bytes, so memory is limited to
    `most`. The file is read to its end.

    Raises:
        Damaged: a header is wrong, the archive ends early, or there is data after its end mark.
    """
    source = _Forward(file)
    fixed: dict[str, str] = {}
    once: dict[str, str] = {}
    while True:
        header = source.take(BLOCK)
        if not header:
            raise Damaged(f"no end mark at byte {source.offset}")
        if len(header) < BLOCK:
            raise Damaged("it ends inside a header")
        if not any(header):
            _expect_zeros(source)
            return
        _check_sum(header, source.offset - BLOCK)
        kind, size = header[156:157], _number(header[124:136])
        if kind in b"LKxgX":
            if size > HEADER_BYTES:
                raise Damaged(f"an extended header of {size} bytes")
            records = _extended(kind, source.whole(size, "an extended header"))
            (fixed if kind == b"g" else once).update(records)
            continue
        fields = {**fixed, **once}
        once = {}
        name = fields.get("path") or _name(header, kind)
        if "size" in fields:
            size = _decimal(fields["size"])
        sparse = kind == b"S" or any(field.startswith("GNU.sparse.") for field in fields)
        if kind == b"S":
            extended = header[482]
            while extended:
                extended = source.whole(BLOCK, "a sparse header")[504]
        if kind in KINDS or kind == b"5":
            if kind in KINDS and wanted(name):
                yield Member(name, source.offset, 0, reason=f"it is {KINDS[kind]}, not a file")
            continue
        offset = source.offset
        folder = name.endswith("/")
        reason = "it is sparse" if sparse else "" if size <= most else f"its {size} bytes are more than {most}"
        if kind not in REGULAR and not sparse:
            reason = f"its type {kind!r} is unknown"
        if folder or reason or not wanted(name):
            source.skip(size + -size % BLOCK, name)
            if not folder:
                yield Member(name, offset, size, reason=reason if wanted(name) else "")
        else:
            yield Member(name, offset, size, source.whole(size, name))


def _expect_zeros(source: _Forward) -> None:
    """Read the rest of the file after the end mark; a second archive there would be lost silently."""
    while part := source.take(CHUNK):
        if part.count(0) != len(part):
            raise Damaged(f"there is data after the end mark, before byte {source.offset}")


def _check_sum(header: bytes, offset: int) -> None:
    blank = header[:148] + b" " * 8 + header[156:]
    total = sum(blank)
    signed = total - 256 * sum(byte > 127 for byte in blank)
    digits = header[148:156].split(b"\0", 1)[0].strip()
    octal = all(byte in b"01234567" for byte in digits)
    if not octal or int(digits or b"0", 8) not in (total, signed):
        raise Damaged(f"no tar header at byte {offset}")


def _number(field: bytes) -> int:
    """The value of a numeric field: octal text, or binary if the first bit is set."""
    if field[0] & 0x80:
        value = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
        if field[0] & 0x40:
            raise Damaged("a negative number in a header")
        return value
    text = field.split(b"\0", 1)[0].strip()
    if not text:
        return 0
    if not all(byte in b"01234567" for byte in text):
        raise Damaged("a number in a header is not octal")
    return int(text, 8)


def _decimal(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise Damaged("a size in an extended header is not a number")
    return int(text)


def _text(data: bytes) -> str:
    return data.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def _name(header: bytes, kind: bytes) -> str:
    name, prefix = _text(header[:100]), _text(header[345:500])
    return f"{prefix}/{name}" if prefix and header[257:263] == b"ustar\0" else name


def _extended(kind: bytes, data: bytes) -> dict[str, str]:
    if kind == b"L":
        return {"path": _text(data)}
    if kind == b"K":  # the target of a link
        return {}
    fields = {}
    while data.strip(b"\0"):
        digits = data.split(b" ", 1)[0][:8]
        length = _decimal(digits.decode("latin-1"))
        record, data = data[len(digits) + 1 : length], data[length:]
        key, equals, value = record.partition(b"=")
        if length <= len(digits) + 1 or not equals or not value.endswith(b"\n"):
            raise Damaged("an extended header is not made of records")
        fields[_text(key)] = value[:-1].decode("utf-8", "backslashreplace")
    return fields
