"""HTML pages with pictures as interleaved documents: `python -m data_prep.pages SITE --out data/pages`.

Text and pictures stay in their order (as in OBELICS, Laurencon et al. 2023); scripts, forms and navigation go. Pictures
are files of the same folder or `data:` addresses: nothing is fetched. A long page becomes several documents.
`pip install "mmgen[prep]"` brings the parser.
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

from data_prep import run, tell
from data_prep.shards import (
    LeftOut,
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

SUFFIXES = (".html", ".htm", ".xhtml")
# What readers of a page do not read. A form may hold the whole page, an article's header its title.
DROPPED = ("script", "style", "noscript", "template", "title", "nav", "aside", "button", "select", "textarea", "svg")
OUTER = ("header", "footer")
LAZY = ("data-src", "data-lazy-src", "data-original", "src")
"""Where the address of a picture may stand; until it is seen, `src` names a spacer."""
SPACER = 2
"""Pixels a side of what only moves text or counts readers."""
# What does not end a line of text.
INLINE = {
    "a", "abbr", "b", "bdi", "bdo", "cite", "code", "data", "del", "dfn", "em", "font", "i", "ins", "kbd", "label",
    "mark", "q", "s", "samp", "small", "span", "strike", "strong", "sub", "sup", "time", "tt", "u", "var", "wbr",
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """A picture of a page: its address, and once it is found a file or the bytes themselves."""

    address: str
    found: Path | bytes = b""


Segment = str | Picture
Document = tuple[Path, tuple[Segment, ...]]


def main(
    folder: Annotated[Path, cyclopts.Parameter(help="Pages and their pictures; searched with all its folders.")],
    *,
    out: Annotated[Path, cyclopts.Parameter(help="Folder to write.")],
    length: Annotated[int, cyclopts.Parameter(help="Most characters, or tokens, of a document's text.")] = 2000,
    images: Annotated[int, cyclopts.Parameter(help="Most pictures of a document.")] = 4,
    tokenizer: Annotated[Path | None, cyclopts.Parameter(help="Count its tokens, not characters.")] = None,
    name: Annotated[str, cyclopts.Parameter(help="What shards are called.")] = "pages",
    per_shard: Annotated[int, cyclopts.Parameter(help="Documents per shard.")] = 1000,
) -> None:
    """Write HTML pages with pictures as shards of interleaved documents; repeat the command to go on."""
    if length < 1 or images < 1:
        raise ValueError("--length and --images must be at least 1")
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder")
    root = folder.absolute()
    files = list(walk(root, without=out))
    pages = [path for path in files if path.suffix.lower() in SUFFIXES]
    (size, counted), parse = measure(tokenizer), parser()
    cut = ((page, part) for page in pages for part in documents(read(page, root, parse), length, images, size))
    made = {"files": identity(files, root), "length": length, "images": images, "tokenizer": counted}
    write(Target(out, name, per_shard, made), cut, partial(sample, root))


def parser() -> Callable[[bytes], Any]:
    """BeautifulSoup over Python's own parser, which takes any page."""
    try:
        from bs4 import BeautifulSoup
    except ImportError:
        raise ValueError('pages need beautifulsoup4: pip install "mmgen[prep]"') from None
    return partial(BeautifulSoup, features="html.parser")


def read(page: Path, root: Path, parse: Callable[[bytes], Any]) -> list[Segment]:
    """Text and pictures of a page in their order; lines of text that no picture parts are one segment.

    Pictures that cannot be found are named and left out.
    """
    try:
        soup = parse(page.read_bytes())
    except RecursionError:
        tell(f"left out: {page}: nested too deeply")
        return []
    base = next((str(tag["href"]) for tag in soup("base", href=True)), "")
    # Where a page leaves out the end of its head, the body stands inside.
    top = soup.body.extract() if soup.body else soup
    for tag in top(DROPPED):
        tag.decompose()
    for tag in top(OUTER):
        if not tag.find_parent(("article", "main")):
            tag.decompose()
    segments: list[Segment] = []
    said: list[str] = []

    def flush() -> None:
        lines = (" ".join(line.split()) for line in "".join(said).split("\n"))
        if text := "\n".join(line for line in lines if line):
            segments.append(text)
        said.clear()

    for node in _walk(top):
        if isinstance(node, str):
            said.append(node)
            continue
        try:
            found = find(node.address, base, page, root)
        except LeftOut as error:
            tell(f"a picture left out: {error}")
            continue
        flush()
        segments.append(Picture(node.address, found))
    flush()
    if not segments:
        tell(f"left out: {page}: no text and no pictures")
    return segments


def is_elsewhere(address: str) -> bool:
    """Whether an address names a scheme or a host; raises ValueError where it is none at all."""
    parts = urlsplit(address)
    return bool(parts.scheme or parts.netloc)


def _walk(top: Any) -> Iterator[Segment]:
    """Strings and pictures below a tag, with line breaks where a block begins and ends; no recursion."""
    stack: list[Any] = list(reversed(top.contents))
    while stack:
        node = stack.pop()
        if type(node) is str:
            yield node
        elif isinstance(node, str):
            if type(node).__name__ == "NavigableString":  # comments, doctypes and the like are its subclasses
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
    """Consecutive documents, as long as the limits allow; a document without a picture stays, as text."""
    held: list[Segment] = []
    used = pictured = 0
    for segment in segments:
        parts: list[Segment] = [segment] if isinstance(segment, Picture) else [*pieces(segment, length, size)]
        for part in parts:
            need, picture = (0, 1) if isinstance(part, Picture) else (size(part), 0)
            if held and (used + need > length or pictured + picture > images):
                yield tuple(held)
                held, used, pictured = [], 0, 0
            held.append(part)
            used, pictured = used + need, pictured + picture
    if held:
        yield tuple(held)


def sample(root: Path, document: Document) -> Sample:
    """A list of segments, and the pictures that it names; raises `LeftOut` where none of them can be had."""
    page, segments = document
    source, members = shown(page, root), Sample()
    listed: list[dict[str, str]] = []
    for segment in segments:
        if isinstance(segment, str):
            listed.append({"text": segment})
            continue
        where = f"{source}: {segment.address[:80]}"
        try:
            data = segment.found if isinstance(segment.found, bytes) else segment.found.read_bytes()
            ((kind, data),) = image_member(data, where).items()
            if min(Image.open(io.BytesIO(data)).size) <= SPACER:
                raise LeftOut(f"{where}: a spacer")
        except (LeftOut, OSError) as error:
            tell(f"a picture left out: {error}")
            continue
        member = f"{len(members)}.{kind}"
        members[member] = data
        listed.append({"image": member})
    if not listed:
        raise LeftOut(f"{source}: none of its pictures can be had, and there is no text")
    return {"json": as_json(listed), **members}


def find(address: str, base: str, page: Path, root: Path) -> Path | bytes:
    """The bytes of a `data:` address, or a file inside `root`; raises `LeftOut`.

    `base` is the page's own, which counts where it names a folder: of a saved page it names the site that it came from.
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
            raise LeftOut(f"{where}: {error}") from None
    try:
        address = address if is_elsewhere(base) else urljoin(base, address)
        if is_elsewhere(address):
            raise LeftOut(f"{where}: not in the folder, and nothing is fetched")
        path = unquote(urlsplit(address).path)
        start = root if path.startswith("/") else page.parent
        file = Path(os.path.normpath(start / path.lstrip("/")))
        if not file.is_relative_to(root):
            raise LeftOut(f"{where}: outside the folder")
        if not file.is_file():
            raise LeftOut(f"{where}: not found")
    except LeftOut:
        raise
    except (OSError, ValueError) as error:
        raise LeftOut(f"{where}: {error}") from None
    return file


if __name__ == "__main__":
    run(main)
