"""Makes one rank hang: it must report its rank, phase and stack and exit, and the other ranks must exit too.

`python -m tests.faults.hang [--json]`. The exit code is 1 if a rank had to be killed or took too long.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from mmgen.config import Config
from mmgen.train.guard import HUNG, Watchdog
from mmgen.train.loop import train
from mmgen.train.zero import ZeroEngine
from tests.faults.launch import run_ranks, small

TIMEOUT = 6


def stuck(config: Config, folder: Path, rank: int) -> int:
    forward, phase, now = ZeroEngine.forward, Watchdog.phase, [0]
    sys.stderr = (folder / f"rank-{rank}.txt").open("w", buffering=1)

    def record(self: Watchdog, name: str, step: int) -> None:
        now[0] = step
        phase(self, name, step)

    def hangs(self: ZeroEngine, batch: Any) -> Any:
        if rank == 1 and now[0] == 3:
            time.sleep(600)
        return forward(self, batch)

    ZeroEngine.forward, Watchdog.phase = hangs, record
    return train(config)


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        config = small(Path(folder), train={"zero_stage": 2, "steps": 6, "timeout": TIMEOUT})
        began = time.monotonic()
        codes = run_ranks(2, partial(stuck, config, Path(folder)), timeout=300, grace=60)
        seconds = time.monotonic() - began
        printed = (Path(folder) / "rank-1.txt").read_text()
    named = "rank 1 hangs in forward of step 3" in printed and "hang.py" in printed
    holds = codes[1] == HUNG and codes[0] > 0 and named
    print(json.dumps({"holds": holds, "codes": codes, "seconds": seconds, "named": named}))
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
