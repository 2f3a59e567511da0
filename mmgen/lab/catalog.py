"""The catalogue of all experiments, and running several of them in parallel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from mmgen.lab import exact, images, plane
from mmgen.lab.core import EXPERIMENTS, Experiment, Options, Result, check, execute

__all__ = ["EXPERIMENTS", "Experiment", "Options", "Result", "check", "exact", "execute", "images", "plane", "run_all"]


def run_all(names: Sequence[str], jobs: int, options: Options = Options()) -> Iterator[Result]:
    """Run experiments, `jobs` at a time, and yield the results of `execute(name, options)` in the order of the names.

    Each experiment uses one thread. The networks are too small to gain from two, and the figures then do not depend on
    the number of cores.

    Raises:
        ValueError: `jobs` below 1.
    """
    if jobs < 1:
        raise ValueError(f"at least one experiment runs at a time, got jobs {jobs}")
    jobs = min(jobs, len(names))
    if jobs == 1:
        torch.set_num_threads(1)
        yield from (execute(name, options) for name in names)
        return
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,))
    try:
        yield from (future.result() for future in [pool.submit(_one, name, options) for name in names])
    finally:
        pool.shutdown(cancel_futures=True)


def _one(name: str, options: Options) -> Result:
    """Call `execute` from this module, so that a new process imports all experiments."""
    return execute(name, options)
