"""`mmgen train`."""

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
    dry_run: Annotated[bool, Parameter(help="Print the plan and run nothing.", negative="")] = False,
    as_json: Json = False,
) -> int:
    """Train a run, or continue it: the same command resumes from the last checkpoint.

    Ends with code 75 when Ctrl-C or SIGTERM stopped it after saving.
    """
    if dry_run:
        from mmgen.plan import plan

        show(plan(config).as_json(), as_json)
        return 0
    from mmgen.train.loop import train as run

    return run(config)
