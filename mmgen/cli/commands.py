"""Every command. To add one, write a file beside this one and a line into `COMMANDS`."""

from __future__ import annotations

from collections.abc import Callable

from mmgen.cli.ablate import ablate
from mmgen.cli.bench import data as bench_data
from mmgen.cli.bench import generation, samplers, step
from mmgen.cli.caption import caption
from mmgen.cli.check import parity
from mmgen.cli.data import buckets, check, index, show_rows
from mmgen.cli.eval import evaluate
from mmgen.cli.export import export
from mmgen.cli.lab import list_experiments, run_experiments
from mmgen.cli.sample import sample
from mmgen.cli.settings import settings
from mmgen.cli.train import train

COMMANDS: dict[str, Callable[..., int]] = {
    "train": train,
    "sample": sample,
    "caption": caption,
    "eval": evaluate,
    "ablate": ablate,
    "export": export,
    "settings": settings,
    "bench step": step,
    "bench generation": generation,
    "bench data": bench_data,
    "bench samplers": samplers,
    "check parity": parity,
    "data index": index,
    "data buckets": buckets,
    "data check": check,
    "data show": show_rows,
    "lab list": list_experiments,
    "lab run": run_experiments,
}
"""The words of a command to its function, whose parameters are the flags and whose result is the exit code."""

GROUPS = {
    "bench": "Measure speed against a floor, in one interleaved run.",
    "check": "Checks that a configuration's parts fit each other.",
    "data": "Index, check and show shards.",
    "lab": "Small experiments with known answers that prove the flow toolbox.",
}
"""The first word of commands of two words, and what they have in common."""
