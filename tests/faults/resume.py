"""Resumes runs in the same and in other layouts, and compares them with runs that were not interrupted.

`python -m tests.faults.resume [--inject moments|ema|rng] [--json]`. A run of 12 steps is stopped after 6 and continued.
In the same layout (ZeRO stage and number of processes) the results must be equal bit for bit; dropout in the backbone
makes them depend on the random state. In another layout they must agree within a limit. The exit code is 1 if a case
fails.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmgen.config import Config
from mmgen.config_io import override
from mmgen.train.checkpoint import read as checkpoint
from mmgen.train.checkpoint.fragments import Store
from mmgen.train.engine import Engine
from mmgen.train.loop import train
from tests.faults.launch import report, run_ranks, small
from tests.faults.oracle import distance

FAULTS = ("moments", "ema", "rng")
Layout = tuple[int, int]
LAYOUTS: list[tuple[Layout, Layout]] = [  # (stage, world) before and after
    ((2, 2), (2, 2)), ((3, 2), (3, 2)), ((2, 2), (3, 3)), ((3, 3), (1, 2)), ((0, 1), (3, 2)), ((1, 2), (0, 1)),
    ((0, 2), (2, 4)),
]  # fmt: skip
LIMITS = {"losses": 1e-5, "weight": 1e-4, "ema": 1e-4}


def configure(folder: Path, layout: Layout, dropout: bool, steps: int = 12) -> Config:
    # 7 short rows on 2, 3 and 4 processes: some processes get fewer rows than others.
    settings = {
        "steps": steps, "batch_rows": 7, "micro_rows": 2, "zero_stage": layout[0], "save_every": 6, "timeout": 60,
        "ema_decay": 0.9, "ema_power": [0.1],
    }  # fmt: skip
    extra = {"resid_pdrop": 0.2} if dropout else {}
    kind = {"model_type": "phi", "num_key_value_heads": 2, "extra": extra} if dropout else {}
    return small(folder, data={"row_length": 24}, train=settings, model={"backbone": kind})


def run(config: Config, fault: str | None, rank: int) -> int:
    restore = checkpoint.restore

    def lose(found: checkpoint.Checkpoint, engine: Engine) -> None:
        restore(found, engine)
        for state in engine.optimizer.state.values():
            if fault == "moments":
                state["exp_avg"].zero_()
                state["exp_avg_sq"].zero_()
            elif fault == "ema":
                state["ema"].zero_()

    checkpoint.restore = lose
    if fault == "rng":
        checkpoint.restore_random = lambda *_: torch.manual_seed(0)
    return train(config)


def compare(one: Path, other: Path, out: Path, rank: int) -> int:
    """Write to `out` the distances of the last six losses, the weights and the averaged weights of two runs."""
    a, b = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-6:] for run in (one, other)
    )
    stores = [Store(run / "checkpoints" / "latest") for run in (one, other)]
    far: dict[str, float] = {
        "losses": max(abs(x["loss"] - y["loss"]) / abs(y["loss"]) for x, y in zip(a, b, strict=True))
    }
    for kind in ("weight", "ema"):
        names = stores[0].names(kind)
        far[kind] = max(distance(*(store.whole(kind, name) for store in stores)) for name in dict.fromkeys(names))
    out.write_text(json.dumps(far))
    return 0


def check(pairs: list[tuple[Layout, Layout]], fault: str | None, folder: Path) -> list[dict[str, Any]]:
    results = []
    for before, after in pairs:
        same = before == after
        name = f"stage{before[0]}-world{before[1]}-to-stage{after[0]}-world{after[1]}"
        whole = configure(folder / f"{name}-whole", before, dropout=same)
        parts = [
            override(whole, {"run": {"dir": str(folder / name)}, "train": {"zero_stage": s}})
            for s in (before[0], after[0])
        ]
        codes = run_ranks(before[1], partial(run, whole, None))
        # The state after a crash past step 6.
        shutil.copytree(whole.run.dir, parts[1].run.dir, symlinks=True)
        checkpoints = parts[1].run.dir / "checkpoints"
        shutil.rmtree(checkpoints / "step-12")
        (checkpoints / "latest").unlink()
        (checkpoints / "latest").symlink_to("step-6")
        codes += run_ranks(after[1], partial(run, parts[1], fault))
        far: dict[str, float] = {}
        if not any(codes):
            out = folder / f"{name}.json"
            assert run_ranks(1, partial(compare, parts[1].run.dir, whole.run.dir, out)) == [0]
            far = json.loads(out.read_text())
        holds = bool(far) and all(value <= (0 if same else LIMITS[kind]) for kind, value in far.items())
        results.append({"case": name, "holds": holds, "bit_equal": bool(far) and not any(far.values()), **far})
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inject", choices=FAULTS)
    parser.add_argument("--cases", type=int, default=len(LAYOUTS))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # Another number of processes has other random numbers by design; only the first cases, with dropout, can
        # detect the fault.
        results = check(LAYOUTS[: 2 if options.inject else options.cases], options.inject, Path(folder))
    return report(results, "case", options.json)


if __name__ == "__main__":
    sys.exit(main())
