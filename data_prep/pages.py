"""HTML pages with pictures as interleaved documents: `python -m data_prep.pages SITE --out data/pages`.

Text and pictures keep their order (as in OBELICS, Laurencon et al. 2023); scripts, forms and navigation are dropped.
Pictures are files of the same folder or `data:` URLs; nothing is downloaded. A long page becomes several documents.
The parser is beautifulsoup4 (extra `prep`).
"""

from __future__ import annotations

import base64
import io
import os
import re
from binascii import Error as NotBase64
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import unquote, unquote_to_bytes, urljoin, urlsplit

import cyclopts
from PIL import Image

from data_prep import reason, run
from data_prep.shards import (
    NAME,
    LeftOut,
    Losses,
    Sample,
    Target,
    as_json,
    identity,
    image_member,
    measure,
    pieces,
    shown,
    walk,
    write,
)
from mmgen.data.progress import Progress

SUFFIXES = (".html", ".htm", ".xhtml")
# Tags without text of the page. A form is kept, because it may contain the whole page; so is the header of an article.
DROPPED = ("script", "style", "noscript", "template", "title", "nav", "aside", "button", "select", "textarea", "svg")
OUTER = ("header", "footer")
LAZY = ("data-src", "data-lazy-src", "data-original", "src")
"""Attributes with the address of a picture. On pages with lazy loading, `src` is a placeholder image."""
SPACER = 2
"""Largest side in pixels of a spacer or tracking pixel."""
# Tags that do not end a line of text.
INLINE = {
    "a", "abbr", "b", "bdi", "bdo", "cite", "code", "data", "del", "dfn", "em", "font", "i", "ins", "kbd", "label",
    "mark", "q", "s", "samp", "small", "span", "strike", "strong", "sub", "sup", "time", "tt", "u", "var", "wbr",
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """A picture of a page: its address, and its file or its bytes."""

    address: str
    content: Path | bytes = b""


Segment = str | Picture
Document = tuple[Path, tuple[Segment, ...]]


def main(
    folder: Annotated[
        Path, cyclopts.Parameter(help="Folder of pages and their pictures; its subfolders are searched too.")
    ],
    *,
    out: Annotated[Path, cyclopts.Parameter(help="Folder to write.")],
    length: Annotated[int, cyclopts.Parameter(help="Largest number of characters, or tokens, of a document.")] = 2000,
    images: Annotated[int, cyclopts.Parameter(help="Largest number of pictures of a document.")] = 4,
    tokenizer: Annotated[Path | None, cyclopts.Parameter(help="Count its tokens instead of characters.")] = None,
    name: Annotated[str | None, cyclopts.Parameter(help=NAME)] = None,
    per_shard: Annotated[int, cyclopts.Parameter(help="Documents per shard.")] = 1000,
) -> None:
    """Write HTML pages with pictures as shards of interleaved documents; repeat the command to resume."""
    if length < 1 or images < 1:
        raise ValueError("--length and --images must be at least 1")
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: name the folder of the pages")
    root = folder.absolute()
    files = list(Progress("listing files", "files", quiet=True).over(walk(root, without=out)))
    pages = [path for path in files if path.suffix.lower() in SUFFIXES]
    (size, counted), parse = measure(tokenizer), parser()
    made = {"files": identity(files, root), "length": length, "images": images, "tokenizer": counted}
    target = Target(out, name, per_shard, made)
    losses = target.losses
    cut = ((page, part) for page in pages for part in documents(read(page, root, parse, losses), length, images, size))
    write(target, cut, partial(sample, root, losses), losses=losses)


def parser() -> Callable[[bytes], Any]:
    """BeautifulSoup with Python's own parser, which accepts any page."""
    try:
        from bs4 import BeautifulSoup
    except ImportError:
        raise ValueError("pages need beautifulsoup4 (extra `prep`): pip install beautifulsoup4") from None
    return partial(BeautifulSoup, features="html.parser")


def read(page: Path, root: Path, parse: Callable[[bytes], Any], losses: Losses) -> list[Segment]:
    """Text and pictures of a page in their order; the text between two pictures is one segment.

    Pictures that cannot be found are reported in `losses` and left out.
    """
    try:
        soup = parse(page.read_bytes())
    except (OSError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else reason(error)
        losses.add(LeftOut(shown(page, root), why))
        return []
    base = next((str(tag["href"]) for tag in soup("base", href=True)), "")
    # If a page omits the end of its head, the parser puts the body inside the head.
    top = soup.body.extract() if soup.body else soup
    for tag in top(DROPPED):
        tag.decompose()
    for tag in top(OUTER):
        if not tag.find_parent(("article", "main")):
            tag.decompose()
    segments: list[Segment] = []
    strings: list[str] = []

    def flush() -> None:
        lines = (" ".join(line.split()) for line in "".join(strings).split("\n"))
        if text := "\n".join(line for line in lines if line):
            segments.append(text)
        strings.clear()

    for node in _walk(top):
        if isinstance(node, str):
            strings.append(node)
            continue
        try:
            content = find(node.address, base, page, root)
        except LeftOut as error:
            losses.add(error, "a picture left out")
            continue
        flush()
        segments.append(Picture(node.address, content))
    flush()
    if not segments:
        losses.add(LeftOut(shown(page, root), "no text and no pictures"))
    return segments


def is_elsewhere(address: str) -> bool:
    """Whether an address has a scheme or a host; raises ValueError if it is not a valid address."""
    parts = urlsplit(address)
    return bool(parts.scheme or parts.netloc)


def _walk(top: Any) -> Iterator[Segment]:
    """Strings and pictures below a tag, with line breaks around blocks; iterative, because pages may nest deeply."""
    stack: list[Any] = list(reversed(top.contents))
    while stack:
        node = stack.pop()
        if type(node) is str:
            yield node
        elif isinstance(node, str):
            if type(node).__name__ == "NavigableString":  # its subclasses are comments, doctypes and so on
                yield re.sub(r"\s+", " ", node)
        elif node.name == "img":
            address = next(
                (str(node[name]) for name in LAZY if node.get(name)), str(node.get("srcset", "")).split(",")[0]
            )
            if address.split():
                yield Picture(address.strip() if address.startswith("data:") else address.split()[0])
        elif node.name == "br":
            yield "\n"
        else:
            around = [] if node.name in INLINE else ["\n"]
            stack += [*around, *reversed(node.contents), *around]


def documents(
    segments: list[Segment], length: int, images: int, size: Callable[[str], int]
) -> Iterator[tuple[Segment, ...]]:
    """Consecutive documents, each as long as the limits allow; a document without a picture is kept as text."""
    current: list[Segment] = []
    used = pictured = 0
    for segment in segments:
        parts: list[Segment] = [segment] if isinstance(segment, Picture) else [*pieces(segment, length, size)]
        for part in parts:
            need, picture = (0, 1) if isinstance(part, Picture) else (size(part), 0)
            if current and (used + need > length or pictured + picture > images):
                yield tuple(current)
                current, used, pictured = [], 0, 0
            current.append(part)
            used, pictured = used + need, pictured + picture
    if current:
        yield tuple(current)


def sample(root: Path, losses: Losses, document: Document) -> Sample:
    """A list of segments and its pictures; raises `LeftOut` if it has no text and no picture can be read."""
    page, segments = document
    source, members = shown(page, root), Sample()
    listed: list[dict[str, str]] = []
    for segment in segments:
        if isinstance(segment, str):
            listed.append({"text": segment})
            continue
        where = f"{source}: {segment.address[:80]}"
        try:
            data = segment.content if isinstance(segment.content, bytes) else segment.content.read_bytes()
            ((kind, data),) = image_member(data, where).items()
            if min(Image.open(io.BytesIO(data)).size) <= SPACER:
                raise LeftOut(where, "a spacer")
        except (LeftOut, OSError) as error:
            losses.add(error if isinstance(error, LeftOut) else LeftOut(where, reason(error)), "a picture left out")
            continue
        member = f"{len(members)}.{kind}"
        members[member] = data
        listed.append({"image": member})
    if not listed:
        raise LeftOut(source, "it has no text, and none of its pictures can be read")
    return {"json": as_json(listed), **members}


def find(address: str, base: str, page: Path, root: Path) -> Path | bytes:
    """The bytes of a `data:` URL, or a file inside `root`; raises `LeftOut`.

    `base` is the page's `<base href>`. It is ignored if it is a URL, as on saved pages.
    """
    where = f"{shown(page, root)}: {address[:80]}"
    if address.startswith("data:"):
        head, _, body = address.partition(",")
        try:
            return (
                base64.b64decode(re.sub(r"\s", "", unquote(body)), validate=True)
                if head.endswith(";base64")
                else unquote_to_bytes(body)
            )
        except (NotBase64, ValueError) as error:
            raise LeftOut(where, f"not a valid data: URL ({error})") from None
    try:
        address = address if is_elsewhere(base) else urljoin(base, address)
        if is_elsewhere(address):
            raise LeftOut(where, "not in the folder, and nothing is downloaded")
        path = unquote(urlsplit(address).path)
        start = root if path.startswith("/") else page.parent
        file = Path(os.path.normpath(start / path.lstrip("/")))
        if not file.is_relative_to(root):
            raise LeftOut(where, "outside the folder")
        if not file.is_file():
            raise LeftOut(where, "not found")
    except LeftOut:
        raise
    except (OSError, ValueError) as error:
        raise LeftOut(where, reason(error)) from None
    return file


if __name__ == "__main__":
    run(main)
