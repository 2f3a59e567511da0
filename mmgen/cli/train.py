"""The command `mmgen train`: trains or continues a run, or prints its plan."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from mmgen.cli.flags import Json, Uses
from mmgen.cli.show import show
from mmgen.config import Config

TrainSettings = Annotated[Config, Uses(("run", "data", "model", "objective", "train", "sample"))]


def train(
    *,
    config: TrainSettings = Config(),
    dry_run: Annotated[bool, Parameter(help="Print sizes and memory, and do not train.", negative="")] = False,
    as_json: Json = False,
) -> int:
    """Train a run, or continue it from its last checkpoint.

    Ctrl-C or SIGTERM saves a checkpoint and ends with code 75; the same command then continues the run.

    Example:
        mmgen train --config configs/scenes.yaml --train.steps 2000
    """
    if dry_run:
        from mmgen.plan import plan

        show(plan(config).as_json(), as_json)
        return 0
    from mmgen.train.loop import train as run

    return run(config)
