"""Kills a run with SIGKILL in every phase of a step and of a save, and checks that the same command continues it.

`python -m tests.faults.kill_matrix [--points 40] [--inject moments|early_prune] [--json]`. Each point kills one or both
of two processes, verifies the checkpoint that `latest` points to, and starts the run again. The losses of all steps,
and weights, moments and averaged weights after the last one, must equal those of an uninterrupted run bit for bit.
Points use ZeRO stages 0 to 3 in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmgen.config import Config
from mmgen.config_io import override
from mmgen.train.checkpoint import read as checkpoint
from mmgen.train.checkpoint import write as saver
from mmgen.train.checkpoint.fragments import Store
from mmgen.train.guard import Watchdog
from mmgen.train.loop import train
from mmgen.train.state import TrainerState
from tests.faults.launch import run_ranks, small
from tests.faults.resume import run

STEP_PHASES = ("data", "forward", "backward", "step", "sample")
SAVE_PHASES = (
    "save",
    "copied",
    "writing",
    "written",
    "publish",
    "rename",
    "renamed",
    "link",
    "linked",
    "prune",
    "pruned",
)
OF_EVERY_RANK = ("save", "copied", "writing", "written")
FAULTS = ("moments", "early_prune")
KILLED_STEP, KILLED_SAVE = 8, 6
ALL = -1
Point = tuple[str, int]


def points() -> list[Point]:
    """All points (phase, rank to kill): rank 0, rank 1, and both; only rank 0 publishes a save."""
    step = [(phase, rank) for phase in STEP_PHASES for rank in (0, 1, ALL)]
    save = [(phase, rank) for phase in SAVE_PHASES for rank in (0, ALL)]
    return [*step, *save, *((phase, 1) for phase in OF_EVERY_RANK)]


def configure(folder: Path, stage: int) -> Config:
    settings = {"steps": 10, "save_every": 3, "keep_last": 1, "zero_stage": stage, "timeout": 60, "micro_rows": 1}
    return small(folder, train=settings)


def victim(config: Config, point: Point, fault: str | None, rank: int) -> int:
    """Train, and kill this process at the point."""
    phase, who = point

    def reach(name: str, here: bool = True) -> None:
        publishing = name in SAVE_PHASES and name not in OF_EVERY_RANK
        if name == phase and here and (who in (ALL, rank) or publishing):
            if who == ALL and publishing:
                os.kill(int((config.run.dir / "pid-1").read_text()), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

    config.run.dir.mkdir(parents=True, exist_ok=True)
    (config.run.dir / f"pid-{rank}").write_text(str(os.getpid()))
    due = KILLED_SAVE
    take, write, publish, replace = saver.HostCopy.take, saver.write, saver.publish, os.replace

    def publishes(save: saver.Save, *rest: Any) -> None:
        reach("publish", save.name == f"step-{due}")
        publish(save, *rest)

    def copied(self: saver.HostCopy) -> Any:
        found = take(self)
        reach("copied", saving() == due)
        return found

    def wrote(path: Path, tensors: Any) -> str:
        here = f"step-{due}" in path.parent.name
        if here and phase == "writing" and who in (ALL, rank):
            path.write_bytes(b"incomplete")
        reach("writing", here)
        digest = write(path, tensors)
        reach("written", here)
        return digest

    def renamed(source: Path, target: Path) -> None:
        name = Path(target).name
        here = saving() == due
        reach("rename", here and name == f"step-{due}")
        reach("link", here and name == "latest")
        reach("prune", here and name.endswith(".gone.tmp"))
        replace(source, target)
        reach("renamed", here and name == f"step-{due}")
        reach("linked", here and name == "latest")
        reach("pruned", here and name.endswith(".gone.tmp"))

    def saving() -> int:
        return now[0]

    now = [0]
    begin = saver.Saver.begin

    def begins(self: saver.Saver, state: TrainerState) -> None:
        now[0] = state.step
        if fault == "early_prune" and rank == 0:
            for old in self.folder.glob("step-*"):
                shutil.rmtree(old)
        begin(self, state)

    watch = Watchdog.phase

    def phased(self: Watchdog, name: str, step: int) -> None:
        reach(name, step == (due if name == "save" else KILLED_STEP))
        watch(self, name, step)

    Watchdog.phase, saver.HostCopy.take, saver.Saver.begin = phased, copied, begins
    saver.write, saver.publish, saver.os.replace = wrote, publishes, renamed
    return train(config)


def judge(config: Config, whole: Config, out: Path, rank: int) -> int:
    """Write to `out` whether two finished runs are equal bit for bit."""
    stores = [Store(c.run.dir / "checkpoints" / "latest") for c in (config, whole)]
    equal = all(
        torch.equal(*(store.whole(kind, name) for store in stores))
        for kind in ("weight", "exp_avg", "exp_avg_sq", "ema")
        for name in dict.fromkeys(stores[0].names(kind))
    )
    curves = [
        [(line["step"], line["loss"], line["grad_norm"]) for line in map(json.loads, text.splitlines())]
        for text in ((c.run.dir / "metrics.jsonl").read_text() for c in (config, whole))
    ]
    out.write_text(json.dumps(equal and curves[0] == curves[1]))
    return 0


def inspect(config: Config, out: Path, rank: int) -> int:
    """Write to `out` the step of the checkpoint that the run would continue from; it must be complete."""
    found = checkpoint.candidates(config.run.dir)
    out.write_text(json.dumps(checkpoint.read_trainer(found[0]).step if found else 0))
    return 0


def check(chosen: list[Point], fault: str | None, folder: Path) -> list[dict[str, Any]]:
    results = []
    for i, point in enumerate(chosen):
        stage = i % 4
        whole = configure(folder / f"whole-{stage}", stage)
        if not (whole.run.dir / "metrics.jsonl").exists():
            assert run_ranks(2, partial(run, whole, None)) == [0, 0]
        config = override(whole, {"run": {"dir": str(folder / f"point-{i}")}})
        killed = run_ranks(2, partial(victim, config, point, fault), grace=120)
        out = folder / "answer.json"
        verified = run_ranks(1, partial(inspect, config, out)) == [0]
        left = json.loads(out.read_text()) if verified else -1
        # A save that was killed, or was still being written, may be lost; an earlier one may not.
        enough = left >= (KILLED_SAVE if point[0] in ("linked", "prune", "pruned") else 3)
        codes = run_ranks(2, partial(run, config, fault)) if verified else [1]
        # The other rank must exit with an error before `run_ranks` would kill it.
        ended = point[1] == ALL or -signal.SIGKILL not in [c for r, c in enumerate(killed) if r != point[1]]
        resumed = -signal.SIGKILL in killed and ended and verified and enough and codes == [0, 0]
        equal = False
        if resumed and run_ranks(1, partial(judge, config, whole, out)) == [0]:
            equal = json.loads(out.read_text())
        phase, who = point
        results.append({
            "phase": phase, "killed": "all" if who == ALL else f"rank {who}", "stage": stage, "codes": killed,
            "resumed_from": left, "resumed": resumed, "bit_equal": equal,
        })  # fmt: skip
        print(*results[-1].values(), file=sys.stderr, flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=40, help="number of points, spread evenly over all")
    parser.add_argument("--inject", choices=FAULTS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    known = points()
    number = min(options.points, len(known))
    chosen = [known[i * len(known) // number] for i in range(number)]
    with tempfile.TemporaryDirectory() as folder:
        results = check(chosen, options.inject, Path(folder))
    summary = {
        "points": len(results),
        "resumed": sum(result["resumed"] for result in results),
        "bit_equal": sum(result["bit_equal"] for result in results),
    }
    if options.json:
        print(json.dumps({**summary, "results": results}))
    else:
        for result in results:
            print(*result.values())
        print(summary)
    return 0 if summary["bit_equal"] == summary["points"] else 1


if __name__ == "__main__":
    sys.exit(main())
