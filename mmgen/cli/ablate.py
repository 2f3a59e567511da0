"""The command `mmgen ablate`: trains and scores a grid of settings and seeds."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.table import Table

from mmgen.cli.flags import Json
from mmgen.cli.show import log, plus_minus, print_json, print_table, rounded

if TYPE_CHECKING:
    from mmgen.ablate import Comparison, Difference, Interval, Intervals


def ablate(
    file: Annotated[Path, Parameter(help="YAML file of arms and seeds, such as configs/ablations/objectives.yaml.")],
    *,
    as_json: Json = False,
) -> int:
    """Train and score a grid of settings and seeds, and compare them.

    The same command continues an ablation that was stopped: runs that are finished are not repeated.

    Example:
        mmgen ablate configs/ablations/objectives.yaml
    """
    from mmgen.ablate import ablate as run

    found = run(file, log)
    if as_json:
        print_json(asdict(found))
        return 0
    print_table(table(found))
    if found.differences:
        print_table(table_of_differences(found))
    return 0


def table(found: Comparison) -> Table:
    """One column per arm; scores that no arm has are left out."""
    from mmgen.ablate import SCORES, VAL_BY_CELL

    shown = Table("", *found.arms, title=f"equal {found.equal}, seeds {found.seeds}: mean ± 95% interval")
    for score in SCORES:
        if any(score in arm for arm in found.arms.values()):
            shown.add_row(score, *(_cell(arm.get(score)) for arm in found.arms.values()))
    if any(VAL_BY_CELL in arm for arm in found.arms.values()):
        for index, label in ((0, "first"), (-1, "last")):
            cells = [_cell(arm.get(VAL_BY_CELL), index) for arm in found.arms.values()]
            shown.add_row(f"val_loss_image, {label} cell", *cells)
    return shown


def table_of_differences(found: Comparison) -> Table:
    """One column per arm that has a baseline: the difference, its interval, and the smallest detectable one."""
    from mmgen.ablate import SCORES

    shown = Table(
        "",
        *(f"{name} - {arm.baseline}" for name, arm in found.differences.items()),
        title="difference, paired by seed: mean ± 95% interval (smallest difference found with a probability of 80%)",
    )
    for score in SCORES:
        if any(score in arm.scores for arm in found.differences.values()):
            shown.add_row(score, *(_difference(arm.scores.get(score)) for arm in found.differences.values()))
    return shown


def _cell(value: Interval | Intervals | None, index: int = 0) -> str:
    """An interval, or that of one number of a list, as text; empty where the arm does not report the score."""
    from mmgen.ablate import Intervals

    if value is None:
        return ""
    each = value.at(index) if isinstance(value, Intervals) else value
    return f"{rounded(each.mean, 4)}{plus_minus(each.half_width)}"


def _difference(value: Difference | None) -> str:
    """A difference as text, with its sign; empty where an arm does not report the score."""
    if value is None:
        return ""
    detectable = "" if value.detectable is None else f" ({value.detectable:.2g})"
    return f"{value.mean:+.4g}{plus_minus(value.half_width)}{detectable}"
