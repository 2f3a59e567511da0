"""The table of commands. To add one, write a file in this folder and a line in `COMMANDS`."""

from __future__ import annotations

from collections.abc import Callable

from mmgen.cli.ablate import ablate
from mmgen.cli.bench import data as bench_data
from mmgen.cli.bench import generation, samplers, speedrun, step
from mmgen.cli.caption import caption
from mmgen.cli.check import parity
from mmgen.cli.data import buckets, check, index, show_rows
from mmgen.cli.demo import demo
from mmgen.cli.edit import edit
from mmgen.cli.eval import evaluate
from mmgen.cli.export import export
from mmgen.cli.generate import generate
from mmgen.cli.init import init
from mmgen.cli.lab import list_experiments, run_experiments
from mmgen.cli.prep import prep
from mmgen.cli.sample import sample
from mmgen.cli.settings import settings
from mmgen.cli.train import train

COMMANDS: dict[str, Callable[..., int]] = {
    "init": init,
    "prep": prep,
    "train": train,
    "sample": sample,
    "edit": edit,
    "generate": generate,
    "caption": caption,
    "eval": evaluate,
    "demo": demo,
    "ablate": ablate,
    "export": export,
    "settings": settings,
    "bench step": step,
    "bench generation": generation,
    "bench data": bench_data,
    "bench samplers": samplers,
    "bench speedrun": speedrun,
    "check parity": parity,
    "data index": index,
    "data buckets": buckets,
    "data check": check,
    "data show": show_rows,
    "lab list": list_experiments,
    "lab run": run_experiments,
}
"""The name of each command and its function: parameters are arguments and flags, the result is the exit code."""

GROUPS = {
    "bench": "Measure speed: step, generation, data, solvers, a whole run.",
    "check": "Check that sampling computes what training computes.",
    "data": "Index, check and show shards, and propose image sizes.",
    "lab": "Run small flow experiments whose exact answers are known.",
}
"""The first word of commands of two words, and their purpose."""
