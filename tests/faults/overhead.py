"""Measures the time that the trainer adds to a bare loop over the same engine, and the time that saving adds to steps.

`python -m tests.faults.overhead [--world 2] [--stage 2] [--json]`. After every step of the trainer, a bare step runs
forward, backward and optimiser on the same batches, so that both are timed alternately. `overhead` uses batches that
were prepared before; for `overhead_with_loader` the loader prepares them at the same time on the same cores (`mmgen
bench data` measures the loader alone). Windows of 50 steps with one asynchronous save alternate with windows without.
Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmgen.config import Config
from mmgen.sequence.batch import prepare
from mmgen.train import run
from mmgen.train.loop import train
from mmgen.train.report import Outcome, Reporter
from mmgen.train.validate import Probe
from tests.conftest import pairs, write_tar
from tests.faults.launch import run_ranks, small

WINDOW = 50


def configure(folder: Path, stage: int, steps: int, width: int, save_every: int) -> Config:
    backbone = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": 4, "num_attention_heads": 4}
    settings = {
        "steps": steps, "batch_rows": 16, "zero_stage": stage, "precision": "fp32", "log_every": 20, "timeout": 300,
        "save_every": save_every, "peak_tflops": 1.0,
    }  # fmt: skip
    folder.mkdir()
    # An epoch of a few samples would be planned again at every step.
    shard = str(write_tar(folder / "many-000.tar", pairs(2000)))
    data = {"row_length": 64, "workers": 1, "window": 1024, "train": [shard]}
    return small(folder, data=data, train=settings, model={"backbone": backbone})


def timed(config: Config, bare: bool, prepared: bool, out: Path, rank: int) -> int:
    """Write to `out` the seconds of every step of the trainer, and of a bare step after each."""
    ours: list[float] = []
    theirs: list[float] = []
    now = [0.0]
    batches: list[Any] = []
    report, show, steps = Reporter.step, Probe.show, run.steps

    def record(self: Reporter, outcome: Outcome) -> None:
        batches[:] = [outcome.data]
        report(self, outcome)

    def measured(self: Probe, step: int) -> None:
        show(self, step)
        ours.append(time.perf_counter() - now[0])
        if bare:
            patcher = self.engine.model.build_patcher()
            began = time.perf_counter()
            for i, raw in enumerate(batches[0].micro):
                found = self.engine.forward(prepare(raw, patcher, self.engine.device))
                self.engine.backward((found.text + found.image) / 100, last=i + 1 == len(batches[0].micro))
            self.engine.step(allow=True)
            theirs.append(time.perf_counter() - began)
        now[0] = time.perf_counter()

    Reporter.step, Probe.show = record, measured
    if prepared:
        run.steps = lambda *where: iter([*steps(*where)])
    code = train(config)
    if rank == 0:
        out.write_text(json.dumps({"ours": ours, "bare": theirs}))
    return code


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result: dict[str, Any] = {"world": options.world, "stage": options.stage, "width": options.width}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "times.json"
        for name, prepared in (("", True), ("_with_loader", False)):
            config = configure(Path(folder) / f"bare{name}", options.stage, options.steps, options.width, 10**6)
            assert not any(run_ranks(options.world, partial(timed, config, True, prepared, out), timeout=3000))
            times = json.loads(out.read_text())
            ours, bare = times["ours"][5:-1], times["bare"][5:-1]
            result |= {
                f"bare_seconds{name}": statistics.median(bare),
                f"trainer_seconds{name}": statistics.median(ours),
                f"overhead{name}": statistics.median(a / b for a, b in zip(ours, bare, strict=True)) - 1,
            }
        steps = 2 * WINDOW * options.windows + WINDOW
        config = configure(Path(folder) / "saving", options.stage, steps + 1, options.width, 2 * WINDOW)
        assert not any(run_ranks(options.world, partial(timed, config, False, True, out), timeout=3000))
        times = json.loads(out.read_text())["ours"]
        # Steps 51 to 99 save nothing. The save of step 100 is copied at its end and written during the next steps.
        plain = [sum(times[i + WINDOW : i + 2 * WINDOW - 1]) for i in range(0, steps - WINDOW, 2 * WINDOW)]
        saving = [sum(times[i + 2 * WINDOW - 1 : i + 3 * WINDOW - 2]) for i in range(0, steps - WINDOW, 2 * WINDOW)]
        stalls = [b / a - 1 for a, b in zip(plain, saving, strict=True)]
        result |= {"stall": statistics.median(stalls), "stalls": stalls, "threads": torch.get_num_threads()}
    print(json.dumps(result) if options.json else "\n".join(f"{k}: {v}" for k, v in result.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
