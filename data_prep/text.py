"""Plain text as shards of documents: `python -m data_prep.text BOOKS notes.jsonl --out data/text --length 2000`.

It reads `.txt` and `.md` files, and `.jsonl` files whose lines have a field `text`; folders are searched. Longer text
is cut at white space, so set `--length` (in tokens, with `--tokenizer`) a little below `data.row_length`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Literal

import cyclopts

from data_prep import reason, run
from data_prep.shards import NAME, Sample, Target, identity, measure, pieces, walk, write
from mmgen.data.shards.samples import position

SUFFIXES = (".txt", ".md", ".jsonl")


def main(
    *sources: Annotated[Path, cyclopts.Parameter(help=f"Files ({', '.join(SUFFIXES)}) or folders of them.")],
    out: Annotated[Path, cyclopts.Parameter(help="Folder to write.")],
    split: Annotated[
        Literal["file", "paragraph", "line"], cyclopts.Parameter(help="What becomes a document.")
    ] = "file",
    length: Annotated[int, cyclopts.Parameter(help="Largest number of characters, or tokens, of a document.")] = 2000,
    tokenizer: Annotated[Path | None, cyclopts.Parameter(help="Count its tokens instead of characters.")] = None,
    field: Annotated[str, cyclopts.Parameter(help="Field of the text in lines of .jsonl.")] = "text",
    name: Annotated[str | None, cyclopts.Parameter(help=NAME)] = None,
    per_shard: Annotated[int, cyclopts.Parameter(help="Documents per shard.")] = 10_000,
) -> None:
    """Write text as shards of documents; repeat the command to resume."""
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
    """The members of a sample of text alone."""
    return {"txt": text.encode("utf-8", "replace")}


def files(sources: tuple[Path, ...], out: Path) -> Iterator[tuple[Path, Path]]:
    """The named files and the files of named folders, each with the folder that its name is relative to."""
    if not sources:
        raise ValueError(f"no source is given: name files that end in {', '.join(SUFFIXES)}, or folders of them")
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
            for number, line in enumerate(_lines(path), 1):
                yield from parts(_field(line, field, f"{path}, line {number}"), split) if line.strip() else ()
        else:
            yield from parts("".join(_lines(path)), split)


def _lines(path: Path) -> Iterator[str]:
    """The lines of a file; raises ValueError if it cannot be read."""
    try:
        with path.open(encoding="utf-8-sig") as lines:
            yield from lines
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({position(error)}): convert it, or leave it out") from None
    except OSError as error:
        raise ValueError(f"{reason(error)}. Make it readable, or leave it out") from None


def parts(text: str, split: str) -> Iterator[str]:
    """A whole text, or its parts between blank lines or between line breaks; empty parts are dropped."""
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
        raise ValueError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        raise ValueError(f"{where} has no text in the field {field!r}: name the field with --field")
    text: str = row[field]
    return text


if __name__ == "__main__":
    run(main)
