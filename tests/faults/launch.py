"""Starts the processes of a run by forking this one, which has imported all packages, so that a start is fast.

The forking process must not compute with torch.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mmgen.config import Config
from mmgen.config_io import override
from mmgen.train import zero  # noqa: F401 - imported before the fork
from tests.conftest import pairs, tiny, write_tar

torch.set_num_threads(1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def small(folder: Path, **changes: dict) -> Config:
    """A tiny run on pairs, pictures without text and text without pictures, in irregular order."""
    folder.mkdir(parents=True, exist_ok=True)
    members: dict[str, bytes] = {}
    for name, data in pairs(24).items():
        number = int(name.split(".")[0])
        if name.endswith(".png") and number % 4 == 1:
            continue  # text without a picture
        if name.endswith(".json") and number % 4 == 2:
            continue  # a picture without text
        members[name] = data
    shard = str(write_tar(folder / "train-000.tar", members))
    config = tiny(folder, data={"train": [shard], "val": []})
    return override(config, changes) if changes else config


def run_ranks(world: int, function: Callable[[int], int], timeout: float = 600, grace: float = 5) -> list[int]:
    """Run a function on every rank; returns the exit codes, where a negative code is the signal that killed the rank.

    All ranks are killed after `timeout` seconds. When one fails, the others are killed after `grace` seconds.
    """
    port, children = str(free_port()), {}
    sys.stdout.flush()
    sys.stderr.flush()
    for rank in range(world):
        child = os.fork()
        if child == 0:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world,
                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
            os.environ |= {name: str(value) for name, value in names.items()}
            code = 1
            try:
                code = function(rank)
            except SystemExit as stop:
                code = int(stop.code or 0)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        children[child] = rank
    codes = [0] * world
    until = time.monotonic() + timeout
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child in children:
            rank = children.pop(child)
            codes[rank] = os.waitstatus_to_exitcode(status)
            if codes[rank]:
                until = min(until, time.monotonic() + grace)
        elif time.monotonic() > until:
            for child in children:
                os.kill(child, signal.SIGKILL)
            until = time.monotonic() + timeout
        else:
            time.sleep(0.01)
    return codes


def report(results: list[dict[str, Any]], one: str, as_json: bool) -> int:
    """Print the results of a suite, each with its name under the key `one`; returns the exit code."""
    holds = all(result["holds"] for result in results)
    if as_json:
        print(json.dumps({"holds": holds, f"{one}s": results}))
        return 0 if holds else 1
    for result in results:
        figures = "  ".join(f"{k} {v:.1e}" for k, v in result.items() if isinstance(v, float))
        print("holds" if result["holds"] else "FAILS", result[one], figures)
    return 0 if holds else 1
