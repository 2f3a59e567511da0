"""A table of images and captions as shards: `python -m data_prep.table list.csv --out data/mine`.

CSV, TSV, JSON lines or Parquet (needs pyarrow, extra `prep`). A cell of the image column is a path relative to the
folder of the table or to `--images`. In Parquet it may also be the bytes of an image, or the `{"bytes", "path"}` of
Hugging Face datasets.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import cyclopts

from data_prep import reason, run
from data_prep.shards import (
    NAME,
    TEST,
    VAL,
    LeftOut,
    Sample,
    Shares,
    Source,
    Target,
    as_json,
    identity,
    image_member,
    write,
)
from mmgen.data.shards.samples import position

Row = Mapping[str, Any]
READERS = (".csv", ".tsv", ".jsonl", ".parquet")


def main(
    table: Annotated[Path, cyclopts.Parameter(help=f"Table of images and captions ({', '.join(READERS)}).")],
    *,
    out: Annotated[Path, cyclopts.Parameter(help="Folder to write.")],
    image: Annotated[str, cyclopts.Parameter(help="Column of images.")] = "image",
    caption: Annotated[str, cyclopts.Parameter(help="Column of captions.")] = "caption",
    images: Annotated[Path | None, cyclopts.Parameter(help="Folder that relative paths start from.")] = None,
    name: Annotated[str | None, cyclopts.Parameter(help=NAME)] = None,
    per_shard: Annotated[int, cyclopts.Parameter(help="Rows per shard.")] = 1000,
    val: Annotated[float, cyclopts.Parameter(help=VAL)] = 0.0,
    test: Annotated[float, cyclopts.Parameter(help=TEST)] = 0.0,
) -> None:
    """Write the images and captions of a table as shards; repeat the command to resume."""
    found = source(table, image, caption, images)
    write(Target(out, name, per_shard, found.made, Shares(val, test)), found.items, found.sample)


def source(table: Path, image: str = "image", caption: str = "caption", images: Path | None = None) -> Source[Any]:
    """The rows of a table; raises ValueError if it is no table, or lacks a column."""
    if table.suffix.lower() not in READERS or not table.is_file():
        raise ValueError(f"{table} is not a table: name a file that ends in {', '.join(READERS)}")
    columns = dict.fromkeys(column for row in islice(rows(table), 100) for column in row)
    for column in (image, caption):
        if columns and column not in columns:
            known = [name for name in columns if name is not None]  # None collects surplus cells
            raise ValueError(f"{table} has no column {column!r}, but {known}: name it with --image or --caption")
    root = images or table.parent
    made = {"files": identity([table], table.parent), "image": image, "caption": caption, "images": str(root)}
    return Source(enumerate(rows(table)), partial(sample, root, image, caption), made)


def rows(table: Path) -> Iterator[Row]:
    """The rows of a table, a few in memory at a time; raises ValueError if it cannot be read."""
    if table.suffix.lower() == ".parquet":
        yield from _parquet(table)
        return
    csv.field_size_limit(2**31 - 1)
    with table.open(encoding="utf-8-sig", newline="") as file:
        try:
            if table.suffix.lower() == ".jsonl":
                yield from _lines(file, table)
            else:
                yield from csv.DictReader(file, delimiter="\t" if table.suffix.lower() == ".tsv" else ",")
        except csv.Error as error:
            raise ValueError(f"{table} is not a valid table: {error}") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{table} is not UTF-8 ({position(error)}): convert it") from None


def _lines(file: Iterable[str], table: Path) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        try:
            row = json.loads(line) if line.strip() else {}
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{table}, line {number} is not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f'{table}, line {number} is not a JSON object such as {{"image": ..., "caption": ...}}')
        if row:
            yield row


def _parquet(table: Path) -> Iterator[Row]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError("Parquet needs pyarrow (extra `prep`): pip install pyarrow") from None
    try:
        for batch in ParquetFile(table).iter_batches(batch_size=64):
            yield from batch.to_pylist()
    except (ValueError, OSError, LookupError, TypeError, RuntimeError) as error:  # the bases of pyarrow's errors
        raise ValueError(f"{table} cannot be read as Parquet: {error}. Write it again") from None


def sample(root: Path, image: str, caption: str, numbered: tuple[int, Row]) -> Sample:
    """The members of a sample: the image of a row, and a JSON with its caption and its source; raises `LeftOut`."""
    number, row = numbered
    name, cell, text = f"row {number + 1}", row.get(image), row.get(caption)
    if not isinstance(text, str) or not text.strip():
        raise LeftOut(name, "no caption")
    path = cell.get("path") if isinstance(cell, dict) else cell if isinstance(cell, str) else None
    data = cell.get("bytes") if isinstance(cell, dict) else cell if isinstance(cell, bytes) else None
    if data is None:
        if not path:
            raise LeftOut(name, "no image")
        try:
            data = (root / path).read_bytes()
        except (OSError, ValueError) as error:  # a path with a null character is a ValueError
            raise LeftOut(name, f"no image: {reason(error)}") from None
    return {**image_member(data, name), "json": as_json({"caption": text.strip(), "source": path or name})}


if __name__ == "__main__":
    run(main)
