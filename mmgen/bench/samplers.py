"""`mmgen bench samplers`: what each solver adds to the calls of its network."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mmgen.flow.schedule import LinearPath
from mmgen.flow.solvers import SOLVERS, build_solver, solve
from mmgen.flow.time import uniform_grid


@dataclass(frozen=True)
class SamplerTimes:
    """Medians of interleaved rounds."""

    overhead: dict[str, float]
    """Of each solver: what it adds, as a share of the time of its network's calls."""
    network_call_seconds: float
    threads: int
    rounds: int

    def as_dict(self) -> dict[str, float]:
        """The times in `mmgen bench samplers --json`."""
        result: dict[str, float] = {f"overhead_{name}": share for name, share in self.overhead.items()}
        return result | {
            "network_call_seconds": self.network_call_seconds,
            "threads": self.threads,
            "rounds": self.rounds,
        }


def bench_samplers(rounds: int) -> SamplerTimes:
    """Time each solver around a network.

    The network is two dozen products that take some milliseconds, on rows of 64 numbers, an eighth of its width. The
    clock runs around its calls and around the whole solution, so that what else the machine does disturbs both alike.
    """
    sizes = [64, *[512] * 23, 64]
    weights = [torch.randn(into, out) / into**0.5 for into, out in pairwise(sizes)]
    z, times = torch.randn(64, 64), uniform_grid(20)
    samplers = [name for name in SOLVERS if name not in ("langevin", "annealed_langevin")]
    calls: list[float] = []

    def network(z: Tensor, t: Tensor) -> Tensor:
        began = time.perf_counter()
        for weight in weights:
            z = torch.tanh(z @ weight + t)
        calls.append(time.perf_counter() - began)
        return z

    shares: dict[str, list[float]] = {name: [] for name in samplers}
    for _ in range(rounds + 1):
        for name in samplers:
            first, began = len(calls), time.perf_counter()
            solve(build_solver(name, z, times, LinearPath()), network)
            shares[name].append((time.perf_counter() - began) / sum(calls[first:]) - 1)
    overhead = {name: statistics.median(values[1:]) for name, values in shares.items()}
    return SamplerTimes(overhead, statistics.median(calls), torch.get_num_threads(), rounds)
