"""The command `mmgen check parity`: compares sampling with training."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from mmgen.cli.flags import Json, Settings
from mmgen.cli.show import log, print_json
from mmgen.config import Config


def parity(
    *,
    config: Settings = Config(),
    inject: Annotated[
        str | None,
        Parameter(
            help="Break the decoder on purpose: noisy-context, shifted-t, causal-mask, stale-cache, wrong-position or "
            "wrong-settings."
        ),
    ] = None,
    as_json: Json = False,
) -> int:
    """Compare what sampling and training compute; code 1 if they differ.

    Images are drawn with the settings `sample` of the configuration. The check proves that the decoder computes what
    training computes at equal z, t and context. Which z, t and contexts training covers is not checked.

    Example:
        mmgen check parity --config configs/scenes.yaml
    """
    from mmgen.parity import check_parity

    results = [report.as_dict() for report in check_parity(config, inject)]
    holds = all(result["holds"] for result in results)
    if as_json:
        print_json({"holds": holds, "variants": results})
        return 0 if holds else 1
    for result in results:
        largest = max(value for name, value in result.items() if name.startswith("largest"))
        log(
            f"{'holds' if result['holds'] else 'FAILS'}  {result['variant']}: {result['positions']} positions, "
            f"largest relative difference {largest:.1e}{'; ' + result['first'] if result['first'] else ''}"
        )
    return 0 if holds else 1
