"""`mmgen bench samplers`: measures the time that each solver adds to the calls of its network."""

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
    """Medians over alternating rounds."""

    overhead: dict[str, float]
    """Time that each solver adds, divided by the time of its network calls."""
    network_call_seconds: float
    threads: int
    rounds: int

    def as_dict(self) -> dict[str, float]:
        """Return the times as `mmgen bench samplers --json` prints them."""
        result: dict[str, float] = {f"overhead_{name}": share for name, share in self.overhead.items()}
        return result | {
            "network_call_seconds": self.network_call_seconds,
            "threads": self.threads,
            "rounds": self.rounds,
        }


def bench_samplers(rounds: int) -> SamplerTimes:
    """Time each solver with a network of 24 matrix products, which takes some milliseconds per call.

    The state is 64 vectors of 64 numbers; the width of the network is 512. The clock runs around each network call and
    around the whole solution, so that other load on the machine affects both equally.
    """
    sizes = [64, *[512] * 23, 64]
    weights = [torch.randn(into, out) / into**0.5 for into, out in pairwise(sizes)]
    z, times = torch.randn(64, 64), uniform_grid(20)
    names = [name for name in SOLVERS if name not in ("langevin", "annealed_langevin")]
    calls: list[float] = []

    def network(z: Tensor, t: Tensor) -> Tensor:
        began = time.perf_counter()
        for weight in weights:
            z = torch.tanh(z @ weight + t)
        calls.append(time.perf_counter() - began)
        return z

    shares: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds + 1):
        for name in names:
            first, began = len(calls), time.perf_counter()
            solve(build_solver(name, z, times, LinearPath()), network)
            shares[name].append((time.perf_counter() - began) / sum(calls[first:]) - 1)
    overhead = {name: statistics.median(values[1:]) for name, values in shares.items()}
    return SamplerTimes(overhead, statistics.median(calls), torch.get_num_threads(), rounds)
