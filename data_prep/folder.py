"""A folder of images with captions beside them as shards: `python -m data_prep.folder PICTURES --out data/mine`.

The caption of `a/b.jpg` is in `a/b.txt`, `a/b.caption` or `a/b.json` (`{"caption": ...}`, which is kept whole).
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import cyclopts

from data_prep import run, tell
from data_prep.shards import LeftOut, Sample, Target, as_json, identity, image_member, shown, walk, write
from data_prep.table import READERS

IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
CAPTIONS = (".txt", ".caption", ".json")


def main(
    folder: Annotated[Path, cyclopts.Parameter(help="Searched with all its folders.")],
    *,
    out: Annotated[Path, cyclopts.Parameter(help="Folder to write.")],
    name: Annotated[str, cyclopts.Parameter(help="What shards are called.")] = "train",
    per_shard: Annotated[int, cyclopts.Parameter(help="Images per shard.")] = 1000,
    captionless: Annotated[bool, cyclopts.Parameter(help="Keep images without a caption.", negative="")] = False,
) -> None:
    """Write a folder of images with sidecar captions as shards; repeat the command to go on."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder")
    found = list(walk(folder, without=out))
    images = [path for path in found if path.suffix.lower() in IMAGES]
    captions = {path.with_suffix(path.suffix.lower()): path for path in found if path.suffix.lower() in CAPTIONS}
    for table in (path for path in found if path.stem == "metadata" and path.suffix in READERS):
        tell(f"{table} is a table of captions: python -m data_prep.table {table} --image file_name --caption text")
    made = {"files": identity([*images, *captions.values()], folder), "captionless": captionless}
    write(Target(out, name, per_shard, made), images, partial(sample, folder, captions, captionless))


def sample(folder: Path, captions: dict[Path, Path], captionless: bool, image: Path) -> Sample:
    """The image, and as JSON its caption and where it came from."""
    source = shown(image, folder)
    try:
        meta = caption(image, captions)
        if not meta["caption"] and not captionless:
            raise LeftOut(f"{source}: no caption beside it ({', '.join(CAPTIONS)}); --captionless keeps it")
        return {**image_member(image.read_bytes(), source), "json": as_json({**meta, "source": source})}
    except OSError as error:
        raise LeftOut(f"{source}: {error}") from None


def caption(image: Path, captions: dict[Path, Path]) -> dict[str, Any]:
    """What the first sidecar says, its caption empty where there is none; raises `LeftOut` where it cannot be read."""
    for suffix in CAPTIONS:
        sidecar = captions.get(image.with_suffix(suffix))
        if sidecar is None:
            continue
        try:
            text = sidecar.read_text("utf-8-sig")
            meta = json.loads(text) if suffix == ".json" else {"caption": text}
        except (ValueError, RecursionError) as error:
            raise LeftOut(f"{sidecar}: cannot be read: {error}") from None
        told = meta.get("caption") or "" if isinstance(meta, dict) else None
        if not isinstance(told, str):
            raise LeftOut(f'{sidecar}: is not {{"caption": "..."}}')
        return {**meta, "caption": told.strip()}
    return {"caption": ""}


if __name__ == "__main__":
    run(main)
