"""The processes of a run: how they start, and how they exchange small messages."""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mmgen.config import Config


@dataclass
class Ranks:
    """This process among all of a run. The side group is gloo on CPUs: it works while a device is busy."""

    rank: int = 0
    world: int = 1
    side: Any = None

    def sums(self, values: Sequence[float]) -> list[float]:
        """Sums over ranks in float64: one message, which does not grow with their number."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def maxima(self, values: Sequence[float]) -> list[float]:
        """Largest values over ranks, as `sums`."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def _reduced(self, values: Sequence[float], how: Any) -> list[float]:
        found = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(found, how, group=self.side)
        reduced: list[float] = found.tolist()
        return reduced

    def gather_objects(self, value: Any) -> list[Any]:
        """A small object of every rank; rare, as it is pickled between our own processes."""
        if self.world == 1:
            return [value]
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, value, group=self.side)
        return everyone

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks of a tensor on the training device, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def say(self, message: str) -> None:
        """One line for people, from one process only."""
        if self.rank == 0:
            print(message, flush=True)


def shard(config: Config) -> bool:
    """Whether DeepSpeed runs the step: several processes, a ZeRO stage, or settings of its own."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 or config.train.zero_stage > 0 or bool(config.train.deepspeed)


def start(config: Config) -> Ranks:
    """Join the processes of this run, as torchrun or an equal launcher describes them in the environment.

    Raises:
        ValueError: settings that need sharding where it cannot be had.
    """
    if not shard(config):
        return Ranks()
    try:
        import deepspeed
    except ImportError:
        raise ValueError("train.zero_stage and several processes need the package deepspeed (Linux only)") from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # of names that DeepSpeed calls
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        # Compiling this extension takes minutes, and a stale lock of it hangs every start; gloo gives the same sums.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("WORLD_SIZE", "1")
    alone = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    # Else accelerate counts every process as a run of its own.
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    timeout = timedelta(seconds=config.train.timeout)
    if not dist.is_initialized():
        deepspeed.init_distributed("gloo" if on_cpu else "nccl", auto_mpi_discovery=False, timeout=timeout)
    side = dist.new_group(backend="gloo", timeout=timeout)
    return Ranks(dist.get_rank(), dist.get_world_size(), side)


def finish() -> None:
    """Leave the group: ZeRO-3 may abort at exit where this is forgotten."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
