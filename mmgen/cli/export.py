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
    text_only: Annotated[bool, Parameter(help="Write the language model alone.", negative="")] = False,
    as_json: Json = False,
) -> int:
    """Write a trained run as a Hugging Face folder.

    `MMGenPipeline.from_pretrained` and the commands on a trained model read it. With `--text-only`, transformers'
    `AutoModelForCausalLM` does. `sample.weights` chooses which weights are written: averaged ones (EMA) by default.

    Example:
        mmgen export runs/scenes --out exported
    """
    from mmgen.train.checkpoint.export import export as write
    from mmgen.train.checkpoint.export import is_export

    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file where a folder is needed: choose another path")
    if is_export(config.run.dir):
        raise ValueError(f"{config.run.dir} is an exported folder already: copy it, or export a run")
    found = newest(config)
    write(found.folder.resolve().parents[1], found.folder, out, config.sample.weights, text_only)
    show({"folder": str(out), "step": found.state.step, "weights": config.sample.weights}, as_json)
    return 0
