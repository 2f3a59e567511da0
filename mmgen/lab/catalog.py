"""The catalogue of all experiments, and running several of them in parallel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import torch

from mmgen.lab import documents, exact, images, plane, starts
from mmgen.lab.core import EXPERIMENTS, Experiment, Options, Result, check, execute

__all__ = [
    "EXPERIMENTS", "Experiment", "Options", "Result", "check", "documents", "exact", "execute", "images", "plane",
    "run_all", "starts",
]  # fmt: skip


def run_all(names: Sequence[str], jobs: int, options: Options = Options()) -> Iterator[Result]:
    """Run experiments, `jobs` at a time, and yield the results of `execute(name, options)` in the order of the names.

    Each experiment uses one thread. The networks are too small to gain from two, and the figures then do not depend on
    the number of cores. Experiments that share trained models run in one process.

    Raises:
        ValueError: `jobs` below 1.
    """
    if jobs < 1:
        raise ValueError(f"at least one experiment runs at a time, got jobs {jobs}")
    groups = list(dict.fromkeys(_group(name) for name in names))
    options = replace(options, jobs=max(1, jobs // len(groups)))
    jobs = min(jobs, len(groups))
    if jobs == 1:
        torch.set_num_threads(1)
        yield from (execute(name, options) for name in names)
        return
    together = {group: [name for name in names if _group(name) == group] for group in groups}
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,))
    try:
        futures = {group: pool.submit(_several, members, options) for group, members in together.items()}
        for name in names:
            yield futures[_group(name)].result()[name]
    finally:
        pool.shutdown(cancel_futures=True)


def _group(name: str) -> str:
    """What experiments of one process have in common: the name of their shared models, or the experiment itself."""
    return EXPERIMENTS[name].shared or name


def _several(names: Sequence[str], options: Options) -> dict[str, Result]:
    """Call `execute` from this module, so that a new process imports all experiments."""
    return {name: execute(name, options) for name in names}
