"""The processes of a run: joining them, and exchanging small messages between them."""

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
    """This process among all processes of a run.

    `side` is a gloo process group on CPUs, so that messages can be exchanged while a GPU computes.
    """

    rank: int = 0
    world: int = 1
    side: Any = None

    def sums(self, values: Sequence[float]) -> list[float]:
        """Sums of each value over ranks in float64, in one message whose size does not depend on their number."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def maxima(self, values: Sequence[float]) -> list[float]:
        """The largest of each value over ranks, in the same way as `sums`."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def _reduced(self, values: Sequence[float], how: Any) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(tensor, how, group=self.side)
        reduced: list[float] = tensor.tolist()
        return reduced

    def gather_objects(self, value: Any) -> list[Any]:
        """A list of one small object per rank. Call it rarely: objects are pickled between the processes."""
        if self.world == 1:
            return [value]
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, value, group=self.side)
        return everyone

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace a tensor on the training device by its sum over ranks, and return it."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def print(self, message: str) -> None:
        """Print one line on standard output, from rank 0 only."""
        if self.rank == 0:
            print(message, flush=True)


def shard(config: Config) -> bool:
    """Whether DeepSpeed takes the steps: with several processes, a ZeRO stage above 0, or `train.deepspeed`."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 or config.train.zero_stage > 0 or bool(config.train.deepspeed)


def start(config: Config) -> Ranks:
    """Join the processes of this run, which torchrun or another launcher describes in the environment.

    Raises:
        ValueError: the settings need DeepSpeed, and it is not installed.
    """
    if not shard(config):
        return Ranks()
    try:
        import deepspeed
    except ImportError:
        raise ValueError(
            "train.zero_stage and several processes need the package deepspeed (Linux only): pip install deepspeed"
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # DeepSpeed calls old names
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        # Compiling this extension takes minutes, and a stale lock file hangs every start; gloo gives the same sums.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("WORLD_SIZE", "1")
    alone = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    # Without it, accelerate treats every process as a run of its own.
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    timeout = timedelta(seconds=config.train.timeout)
    if not dist.is_initialized():
        deepspeed.init_distributed("gloo" if on_cpu else "nccl", auto_mpi_discovery=False, timeout=timeout)
    side = dist.new_group(backend="gloo", timeout=timeout)
    return Ranks(dist.get_rank(), dist.get_world_size(), side)


def finish() -> None:
    """Leave the process group; without this call, ZeRO-3 may abort at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
