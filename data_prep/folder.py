"""A folder of images with captions beside them as shards: `python -m data_prep.folder PICTURES --out data/mine`.

The caption of `a/b.jpg` is in `a/b.txt`, `a/b.caption` or `a/b.json` (`{"caption": ...}`, which is kept whole).
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import cyclopts

from data_prep import run
from data_prep.shards import LeftOut, Sample, identity, image_member, write

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
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    images = [path for path in found if path.suffix.lower() in IMAGES]
    captions = [path for path in found if path.suffix.lower() in CAPTIONS]
    made = {"files": identity([*images, *captions], folder), "captionless": captionless}
    write(out, name, images, partial(sample, folder, captionless), per_shard, made)


def sample(folder: Path, captionless: bool, image: Path) -> Sample:
    """The image, and as JSON its caption and where it came from."""
    source = str(image.relative_to(folder))
    meta = caption(image)
    if not meta.get("caption") and not captionless:
        raise LeftOut(f"{source}: no caption beside it ({', '.join(CAPTIONS)}); --captionless keeps it")
    return {**image_member(image.read_bytes(), source), "json": {**meta, "source": source}}


def caption(image: Path) -> dict[str, Any]:
    """What the first sidecar says; raises `LeftOut` where it cannot be read."""
    for suffix in CAPTIONS:
        sidecar = image.with_suffix(suffix)
        if not sidecar.exists():
            continue
        try:
            text = sidecar.read_text("utf-8")
            meta = json.loads(text) if suffix == ".json" else {"caption": text.strip()}
        except (ValueError, RecursionError) as error:
            raise LeftOut(f"{sidecar}: cannot be read: {error}") from None
        if not isinstance(meta, dict) or not isinstance(meta.get("caption", ""), str):
            raise LeftOut(f'{sidecar}: is not {{"caption": "..."}}')
        return meta
    return {}


if __name__ == "__main__":
    run(main)
