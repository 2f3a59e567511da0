"""The command `mmgen export`: writes a trained run as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from mmgen.cli.flags import Json, RunSettings
from mmgen.cli.run import newest
from mmgen.cli.show import show
from mmgen.config import Config


def export(
    *,
    config: RunSettings = Config(),
    out: Annotated[Path, Parameter(help="Folder that the model is written to.")] = Path("export"),
    as_json: Json = False,
) -> int:
    """Write a trained run as a Hugging Face folder.

    `sample.weights` chooses which weights are written: averaged ones (EMA) by default.

    Example:
        mmgen export --config configs/scenes.yaml --out exported
    """
    from mmgen.train.checkpoint.export import export as write

    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file where a folder is needed: choose another path")
    found = newest(config)
    write(config.run.dir, found.folder, out, config.sample.weights)
    show({"folder": str(out), "step": found.state.step, "weights": config.sample.weights}, as_json)
    return 0
