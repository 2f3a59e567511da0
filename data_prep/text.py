"""Plain text as shards of documents: `python -m data_prep.text BOOKS notes.jsonl --out data/text --length 2000`.

Files `.txt` and `.md`, and `.jsonl` whose lines have a field `text`; folders are searched. What is longer than a row is
cut at white space, so give `--length` (and `--tokenizer`, to count its tokens) a little less than `data.row_length`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Literal

import cyclopts

from data_prep import run
from data_prep.shards import Sample, Target, identity, measure, pieces, walk, write

SUFFIXES = (".txt", ".md", ".jsonl")


def main(
    *sources: Annotated[Path, cyclopts.Parameter(help=f"Files ({', '.join(SUFFIXES)}) or folders of them.")],
    out: Annotated[Path, cyclopts.Parameter(help="Folder to write.")],
    split: Annotated[Literal["file", "paragraph", "line"], cyclopts.Parameter(help="What a document is.")] = "file",
    length: Annotated[int, cyclopts.Parameter(help="Most characters, or tokens, of a document.")] = 2000,
    tokenizer: Annotated[Path | None, cyclopts.Parameter(help="Count its tokens, not characters.")] = None,
    field: Annotated[str, cyclopts.Parameter(help="Where the text is in lines of .jsonl.")] = "text",
    name: Annotated[str, cyclopts.Parameter(help="What shards are called.")] = "text",
    per_shard: Annotated[int, cyclopts.Parameter(help="Documents per shard.")] = 10_000,
) -> None:
    """Write text as shards of documents; repeat the command to go on."""
    if length < 1:
        raise ValueError(f"--length must be at least 1, not {length}")
    listed = dict(files(sources, out))
    size, counted = measure(tokenizer)
    cut = (piece for text in documents([*listed], split, field) for piece in pieces(text, length, size))
    seen = "".join(identity([path], root) for path, root in listed.items())
    made = {
        "files": sha256(seen.encode()).hexdigest(),
        "split": split,
        "length": length,
        "tokenizer": counted,
        "field": field,
    }
    write(Target(out, name, per_shard, made), cut, as_sample)


def as_sample(text: str) -> Sample:
    """A document of text alone."""
    return {"txt": text.encode("utf-8", "replace")}


def files(sources: tuple[Path, ...], out: Path) -> Iterator[tuple[Path, Path]]:
    """The files named, and those of folders, each with the folder that it was found from."""
    if not sources:
        raise ValueError(f"name files that end in {', '.join(SUFFIXES)}, or folders of them")
    for source in sources:
        if source.is_dir():
            yield from ((path, source) for path in walk(source, without=out) if path.suffix.lower() in SUFFIXES)
        elif source.is_file() and source.suffix.lower() in SUFFIXES:
            yield source, source.parent
        else:
            raise ValueError(f"{source} is neither a folder nor a file that ends in {', '.join(SUFFIXES)}")


def documents(listed: list[Path], split: str, field: str) -> Iterator[str]:
    """The texts of files, one file in memory at a time (of .jsonl, one line)."""
    for path in listed:
        if path.suffix.lower() == ".jsonl":
            with path.open(encoding="utf-8-sig") as lines:
                for number, line in enumerate(lines, 1):
                    yield from parts(_field(line, field, f"{path}, line {number}"), split) if line.strip() else ()
            continue
        try:
            text = path.read_text("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8: {error}. Convert it, or leave it out") from None
        yield from parts(text, split)


def parts(text: str, split: str) -> Iterator[str]:
    """A text whole, by blank lines or by lines, without empty ones."""
    cut = iter([text])
    if split == "paragraph":
        cut = iter(re.split(r"\n\s*\n", text))
    elif split == "line":
        cut = iter(text.splitlines())
    yield from (part.strip() for part in cut if part.strip())


def _field(line: str, field: str, where: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        raise ValueError(f"{where}: no text in the field {field!r} (--field)")
    text: str = row[field]
    return text


if __name__ == "__main__":
    run(main)
