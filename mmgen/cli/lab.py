"""The commands `mmgen lab ...`: lists and runs the experiments of the flow laboratory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.table import Table

from mmgen.cli.flags import Json, at_least
from mmgen.cli.show import log, print_json, print_table
from mmgen.config import choose


def list_experiments(*, as_json: Json = False) -> int:
    """List the experiments with the faults that each must detect.

    Example:
        mmgen lab list
    """
    from mmgen.lab.catalog import EXPERIMENTS

    if as_json:
        print_json([{"name": e.name, "title": e.title, "faults": list(e.faults)} for e in EXPERIMENTS.values()])
        return 0
    table = Table("name", "what it shows", "faults", box=None)
    for experiment in EXPERIMENTS.values():
        table.add_row(experiment.name, experiment.title, " ".join(experiment.faults))
    print_table(table)
    return 0


def run_experiments(
    *names: Annotated[str, Parameter(help="Experiments, as listed by `mmgen lab list`.")],
    everything: Annotated[bool, Parameter(name="--all", help="Run all experiments.", negative="")] = False,
    fast: Annotated[bool, Parameter(help="Use small sizes: all experiments take minutes.", negative="")] = False,
    out: Annotated[Path, Parameter(help="Folder for a JSON file and a picture of each experiment.")] = Path("runs/lab"),
    seed: Annotated[int, Parameter(help="Seed of all random numbers.")] = 0,
    inject: Annotated[
        str | None, Parameter(help="Inject a fault: sign, half, minus_s2, shifted_t, shared_t, blind or lost_start.")
    ] = None,
    jobs: Annotated[
        int, Parameter(help="Experiments that run at a time, each with one thread.", validator=at_least(1))
    ] = os.cpu_count() or 1,
    as_json: Json = False,
) -> int:
    """Run experiments; code 1 if a result is outside its bound.

    Example:
        mmgen lab run --all --fast
    """
    from mmgen.lab.catalog import EXPERIMENTS, Options, check, run_all
    from mmgen.lab.faults import FAULTS

    if inject is not None:
        choose(FAULTS, inject, "fault")
    everyone = [e.name for e in EXPERIMENTS.values() if inject is None or inject in e.faults]
    chosen = everyone if everything else list(names)
    for name in chosen:
        check(name, inject)
    if not chosen:
        raise ValueError("no experiment is given: name one, or add --all (`mmgen lab list` shows them)")
    results = []
    for result in run_all(chosen, jobs, Options(fast, seed, out, inject)):
        results.append(result)
        log(f"{'holds' if result.holds else 'FAILS'}  {result.name}  {result.seconds} s  {result.picture}")
        for bound in result.bounds:
            log(f"    {'  ' if bound.holds else '! '}{bound.figure}: {bound.value:.4g} ({bound.wanted})")
        for known in result.differences:
            log(f"    ~ {known.figure}: {known.measured:.4g} (known difference, wanted {known.wanted}: {known.reason})")
    if as_json:
        print_json([result.as_json() for result in results])
    return 0 if all(result.holds for result in results) else 1
