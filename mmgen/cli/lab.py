"""`mmgen lab`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.table import Table

from mmgen.cli.flags import Json
from mmgen.cli.show import print_json, print_table, tell


def list_experiments(*, as_json: Json = False) -> int:
    """Every experiment, its title, and the faults that turn it red."""
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
    *names: Annotated[str, Parameter(help="Experiments, as `mmgen lab list` names them.")],
    everything: Annotated[bool, Parameter(name="--all", help="Run all of them.", negative="")] = False,
    fast: Annotated[bool, Parameter(help="Small sizes: minutes for all.", negative="")] = False,
    out: Annotated[Path, Parameter(help="Folder for a JSON and a PNG per experiment.")] = Path("runs/lab"),
    seed: int = 0,
    inject: Annotated[str | None, Parameter(help="Make the toolbox wrong: sign, half, minus_s2 or shifted_t.")] = None,
    jobs: Annotated[int, Parameter(help="Experiments at a time, one thread each.")] = os.cpu_count() or 1,
    as_json: Json = False,
) -> int:
    """Run experiments; ends with code 1 where a bound does not hold."""
    from mmgen.lab.catalog import EXPERIMENTS, check, run_all

    everyone = [e.name for e in EXPERIMENTS.values() if inject is None or inject in e.faults]
    chosen = everyone if everything else list(names)
    for name in chosen:
        check(name, inject)
    if not chosen:
        raise ValueError("name an experiment, or say --all (`mmgen lab list` shows them)")
    results, began = [], time.perf_counter()
    for result in run_all(chosen, jobs, fast=fast, seed=seed, out=out, inject=inject):
        results.append(result)
        verdict = "holds" if result["holds"] else "FAILS"
        tell(f"{verdict}  {result['name']}  {result['seconds']} s  {result['picture']}")
        for bound in result["bounds"]:
            limits = " ".join(f"{k.replace('_', ' ')} {bound[k]:g}" for k in ("at_least", "at_most") if k in bound)
            mark = "  " if bound["holds"] else "! "
            value = "not finite" if bound["value"] is None else f"{bound['value']:.4g}"
            tell(f"    {mark}{bound['figure']}: {value} ({limits})")
    holds = all(result["holds"] for result in results)
    if as_json:
        seconds = round(time.perf_counter() - began, 1)
        print_json({"holds": holds, "seconds": seconds, "experiments": results})
    return 0 if holds else 1
