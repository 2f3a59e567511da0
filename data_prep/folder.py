"""A folder of images with caption files as shards: `python -m data_prep.folder PICTURES --out data/mine`.

The caption of `a/b.jpg` is in `a/b.txt`, `a/b.caption` or `a/b.json` (`{"caption": ...}`; its other fields are kept).
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import cyclopts

from data_prep import log, reason, run
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
    shown,
    walk,
    write,
)
from data_prep.table import READERS
from mmgen.cli.pictures import SUFFIXES
from mmgen.data.progress import Progress

CAPTIONS = (".txt", ".caption", ".json")


def main(
    folder: Annotated[Path, cyclopts.Parameter(help="Folder of images; its subfolders are searched too.")],
    *,
    out: Annotated[Path, cyclopts.Parameter(help="Folder to write.")],
    name: Annotated[str | None, cyclopts.Parameter(help=NAME)] = None,
    per_shard: Annotated[int, cyclopts.Parameter(help="Images per shard.")] = 1000,
    val: Annotated[float, cyclopts.Parameter(help=VAL)] = 0.0,
    test: Annotated[float, cyclopts.Parameter(help=TEST)] = 0.0,
    captionless: Annotated[bool, cyclopts.Parameter(help="Keep images without a caption.", negative="")] = False,
) -> None:
    """Write a folder of images with caption files as shards; repeat the command to resume."""
    found = source(folder, out, captionless)
    write(Target(out, name, per_shard, found.made, Shares(val, test)), found.items, found.sample, found.total)


def source(folder: Path, out: Path, captionless: bool = False) -> Source[Path]:
    """The images of a folder and its subfolders, except those below `out`; raises ValueError if there is no folder."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: name the folder of the images")
    files = list(Progress("listing files", "files", quiet=True).over(walk(folder, without=out)))
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    captions = {path.with_suffix(path.suffix.lower()): path for path in files if path.suffix.lower() in CAPTIONS}
    for table in (path for path in files if path.stem == "metadata" and path.suffix in READERS):
        log(f"{table} is a table of captions, which this script does not read. To read it:")
        log(f"    python -m data_prep.table {table} --image file_name --caption text")
    made = {"files": identity([*images, *captions.values()], folder), "captionless": captionless}
    return Source(images, partial(sample, folder, captions, captionless), made, len(images))


def sample(folder: Path, captions: dict[Path, Path], captionless: bool, image: Path) -> Sample:
    """The members of a sample: the image, and a JSON with its caption and its source; raises `LeftOut`."""
    source = shown(image, folder)
    try:
        meta = caption(image, captions)
        if not meta["caption"] and not captionless:
            written = any(image.with_suffix(suffix) in captions for suffix in CAPTIONS)
            which = "an empty caption file" if written else f"no caption file ({', '.join(CAPTIONS)})"
            raise LeftOut(source, f"{which} of the same name; --captionless keeps it")
        return {**image_member(image.read_bytes(), source), "json": as_json({**meta, "source": source})}
    except OSError as error:
        raise LeftOut(source, reason(error)) from None


def caption(image: Path, captions: dict[Path, Path]) -> dict[str, Any]:
    """The fields of an image's caption file, with an empty caption if there is none; raises `LeftOut`."""
    for suffix in CAPTIONS:
        sidecar = captions.get(image.with_suffix(suffix))
        if sidecar is None:
            continue
        try:
            text = sidecar.read_text("utf-8-sig")
            meta = json.loads(text) if suffix == ".json" else {"caption": text}
        except (ValueError, RecursionError) as error:
            raise LeftOut(str(sidecar), f"cannot be read: {error}") from None
        text = meta.get("caption") or "" if isinstance(meta, dict) else None
        if not isinstance(text, str):
            raise LeftOut(str(sidecar), 'is not {"caption": "..."}')
        return {**meta, "caption": text.strip()}
    return {"caption": ""}


if __name__ == "__main__":
    run(main)
