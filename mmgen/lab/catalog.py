"""All experiments, in the order of the list, and how several are run at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from mmgen.lab import exact, images, plane
from mmgen.lab.core import EXPERIMENTS, Experiment, Options, Result, check, execute

__all__ = ["EXPERIMENTS", "Experiment", "Options", "Result", "check", "exact", "execute", "images", "plane", "run_all"]


def run_all(names: Sequence[str], jobs: int, options: Options = Options()) -> Iterator[Result]:
    """The results of `execute(name, options)` in the order of the names, `jobs` at a time.

    Each experiment has one thread: the networks are so small that two would wait for each other, and figures do not
    depend on the machine's cores.

    Raises:
        ValueError: jobs < 1.
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
    """`execute` by way of this module, which a new process imports with all experiments."""
    return execute(name, options)
