"""Metrics of a training step: loss per range of t, model FLOPs and MFU, memory, and the slowest rank."""

from __future__ import annotations

import math
import os
import time
from bisect import bisect_left
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from mmgen.data.documents import Step
from mmgen.model import Losses
from mmgen.sequence.batch import Batch
from mmgen.train.engine import Engine
from mmgen.train.flops import Arithmetic
from mmgen.train.ranks import Ranks

BUCKETS = 5
"""Number of equal ranges of t for which the image loss is reported."""


def by_time(batch: Batch, losses: Losses) -> Tensor:
    """Sums and counts [2, BUCKETS] of the losses of learned patches per range of t; zero if a patch has several t.

    Each patch counts by its weight in the image loss, so the means are per patch or per image as that loss is.
    """
    sums = torch.zeros(2, BUCKETS, device=losses.image_J.device)
    t_I = batch.draws.get("t")
    if t_I is not None and t_I.numel() == len(t_I) > 0:  # one draw per patch
        bucket = (t_I.flatten()[batch.loss_at_J] * BUCKETS).long().clamp(0, BUCKETS - 1)
        sums[0].index_add_(0, bucket, (losses.image_J * losses.weight_J).float())
        sums[1].index_add_(0, bucket, losses.weight_J.float())
    return sums


def time_losses(sums_and_counts: Tensor, prefix: str = "loss") -> dict[str, float]:
    """Mean image loss of each range of t that occurred; the argument is a sum of results of `by_time`."""
    sums, counts = sums_and_counts.tolist()
    edges = [i / BUCKETS for i in range(BUCKETS + 1)]
    return {
        f"{prefix}/image_t{edges[i]:.1f}-{edges[i + 1]:.1f}": sums[i] / counts[i]
        for i in range(BUCKETS)
        if counts[i] > 0
    }


class Meter:
    """Measures MFU: model FLOPs of a run's steps over the peak of all its devices."""

    def __init__(self, engine: Engine, first: int) -> None:
        peak = engine.config.train.peak_tflops
        self.ranks = engine.ranks
        self.peak = peak * 1e12 if peak else measured_peak(engine.device, engine.bf16)
        self.arithmetic = Arithmetic(engine.model)
        self._last = (first, time.monotonic())
        """Step and time of the previous reading."""

    def read(self, step: int, data: Step, working: float) -> dict[str, float]:
        """`mfu` over the step's `working` seconds, `mfu_wall` over all time since the previous reading."""
        (flops,) = self.ranks.sums([self.arithmetic.of(data.micro)])
        peak = self.peak * self.ranks.world
        last, then = self._last
        self._last = (step, time.monotonic())
        return {"mfu": flops / working / peak, "mfu_wall": flops * (step - last) / (self._last[1] - then) / peak}


def measured_peak(device: torch.device, bf16: bool, seconds: float = 0.3) -> float:
    """Highest FLOP/s of a product of two square matrices, measured during `seconds`."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    best, until = 0.0, time.perf_counter() + seconds
    for i in range(1000):
        began = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        if i:
            best = max(best, 2 * n**3 / (time.perf_counter() - began))
        if i > 1 and time.perf_counter() > until:
            break
    return best


def memory(device: torch.device) -> int:
    """Bytes: the peak of allocated memory on a GPU, the present memory of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def slowest(ranks: Ranks, seconds: float) -> tuple[int, float]:
    """The rank with the longest work, and its time divided by the median of all ranks, to 2%.

    `seconds` is the time of this rank. The median is read from a histogram over 1e-4 to 1e4 s, so that the size of the
    message does not grow with the number of ranks.
    """
    decade, lowest = 64, -4
    shares = [0.0] * (8 * decade)
    shares[min(max(int((math.log10(max(seconds, 1e-9)) - lowest) * decade), 0), len(shares) - 1)] = 1.0
    below = list(accumulate(ranks.sums(shares)))
    median = 10 ** ((bisect_left(below, ranks.world / 2) + 0.5) / decade + lowest)
    # One number holds the longest time in microseconds and its rank; float64 represents it exactly.
    (longest,) = ranks.maxima([round(seconds * 1e6) * ranks.world + ranks.rank])
    micro, rank = divmod(int(longest), ranks.world)
    return rank, micro / 1e6 / median
