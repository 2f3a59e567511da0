"""The command `mmgen init`: from a folder, a table or shards of pictures to shards, a tokenizer and settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from mmgen.cli.flags import Json
from mmgen.cli.show import print_json


def init(
    *,
    images: Annotated[Path | None, Parameter(help="Folder of pictures with caption files.")] = None,
    table: Annotated[Path | None, Parameter(help="CSV, TSV, JSON lines or Parquet.")] = None,
    shards: Annotated[list[str] | None, Parameter(help="Existing shards; they are copied.", negative="")] = None,
    image: Annotated[str, Parameter(help="Column of images in the table.")] = "image",
    caption: Annotated[str, Parameter(help="Column of captions in the table.")] = "caption",
    captionless: Annotated[bool, Parameter(help="Keep pictures without a caption.", negative="")] = False,
    out: Annotated[Path, Parameter(help="Settings file to write; its data go into the same folder.")] = Path("my.yaml"),
    minutes: Annotated[float, Parameter(help="How long `mmgen train` may take.")] = 30.0,
    backbone: Annotated[str | None, Parameter(help="Pretrained decoder to start from: a hub name or folder.")] = None,
    size: Annotated[str | None, Parameter(help="Size of the model: tiny, small, base or large.")] = None,
    dry_run: Annotated[bool, Parameter(help="Show what would be written, and write nothing.", negative="")] = False,
    as_json: Json = False,
) -> int:
    """Prepare a run on your own pictures: shards, tokenizer and settings.

    It looks at the data, writes training, validation and test shards, trains a tokenizer, measures the pace of a few
    real steps and writes a commented settings file. It asks nothing.

    Example:
        mmgen init --images pictures --minutes 15 --out my.yaml
    """
    from mmgen.propose.prepare import Inputs, prepare  # it imports torch

    inputs = Inputs(images, table, tuple(shards or ()), image, caption, captionless, backbone)
    made = prepare(inputs, out, minutes, size, dry_run)
    if as_json:
        print_json(made.as_dict())
    else:
        print(made.text if dry_run else f"Next: mmgen train --config {made.file}\n", end="")
    return 0
