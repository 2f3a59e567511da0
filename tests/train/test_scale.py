"""Training in several processes: results equal those of a plain loop, every layout resumes, and faults are detected."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
import yaml

from mmgen.config import Config
from mmgen.config_io import override
from mmgen.train import guard
from mmgen.train import metrics as meter
from mmgen.train.checkpoint import read as checkpoint
from mmgen.train.ranks import Ranks
from tests.train.test_loop import losses

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def command(module: str, *words: object) -> tuple[int, dict]:
    """Exit code and JSON of a fault suite that runs in its own process."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.faults.{module}", *map(str, words), "--json"],
        env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert lines, done.stderr[-2000:]
    return done.returncode, json.loads(lines[-1])


@pytest.mark.slow
def test_all_stages_in_two_processes_equal_a_plain_loop() -> None:
    code, found = command("oracle", "--cells", 4)
    assert {cell["cell"].split("-")[0] for cell in found["cells"]} == {"stage0", "stage1", "stage2", "stage3"}
    assert code == 0, found


@pytest.mark.slow
def test_every_layout_equals_a_plain_loop() -> None:
    code, found = command("oracle")
    assert (code, len(found["cells"])) == (0, 16), found


@pytest.mark.slow
def test_settings_that_must_not_change_the_result() -> None:
    """Offloading, activation checkpointing, small buckets, samples; a NaN step is skipped in all stages."""
    code, found = command("oracle", "--variants")
    assert code == 0, found


@pytest.mark.slow
def test_muon_in_two_processes_equals_one(config: Config, tmp_path: Path) -> None:
    found = {}
    for processes in (1, 2):
        change = {"run": {"dir": str(tmp_path / str(processes))}, "train": {"optimizer": "muon"}}
        run, file = override(config, change), tmp_path / f"{processes}.yaml"
        file.write_text(yaml.safe_dump(run.model_dump(mode="json")))
        launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
        words = [sys.executable, *launcher, "-m", "mmgen.cli", "train", "--config", str(file)]
        subprocess.run(words, env=ENVIRONMENT, check=True, capture_output=True)
        found[processes] = losses(run)
    np.testing.assert_allclose(found[2], found[1], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["doubled", "no_sync"])
def test_the_plain_loop_detects_wrong_gradients(fault: str) -> None:
    code, found = command("oracle", "--inject", fault, "--cells", 3)
    assert code == 1
    assert not any(cell["holds"] for cell in found["cells"]), found
    assert not any(code for cell in found["cells"] for code in cell["codes"]), (
        "the runs must finish, with wrong results"
    )


@pytest.mark.slow
def test_every_layout_resumes() -> None:
    code, found = command("resume")
    assert code == 0, found
    assert sum(case["bit_equal"] for case in found["cases"]) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["moments", "ema", "rng"])
def test_an_incomplete_resume_is_detected(fault: str) -> None:
    code, found = command("resume", "--inject", fault)
    assert code == 1
    assert not any(case["holds"] for case in found["cases"]), found


@pytest.mark.slow
def test_killed_runs_resume_bit_for_bit() -> None:
    code, found = command("kill_matrix")
    assert code == 0, found
    assert found["points"] == found["resumed"] == found["bit_equal"] == 40


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["moments", "early_prune"])
def test_killed_runs_that_lose_state_are_detected(fault: str) -> None:
    code, found = command("kill_matrix", "--points", 9, "--inject", fault)
    assert code == 1
    kept = found["resumed"] if fault == "early_prune" else found["bit_equal"]
    assert kept < found["points"] == 9, found


@pytest.mark.slow
def test_bytes_of_state_and_messages_equal_theory() -> None:
    code, found = command("accounts")
    assert (code, len(found["cells"])) == (0, 24), found


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["whole_averages", "sent_twice"])
def test_too_many_bytes_are_detected(fault: str) -> None:
    code, found = command("accounts", "--world", 2, "--inject", fault)
    assert code == 1
    assert not any(cell["holds"] for cell in found["cells"]), found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "to"), [(signal.SIGUSR1, "rank"), (signal.SIGTERM, "rank"), (signal.SIGINT, "rank"),
                       (signal.SIGTERM, "launcher")], ids=str,
)  # fmt: skip
def test_a_signal_to_one_process_saves_and_stops_all_ranks(
    config: Config, tmp_path: Path, number: int, to: str
) -> None:
    """Start torchrun, send a signal to one process only, and repeat the command."""
    settings = {"steps": 30, "save_every": 100, "zero_stage": 2, "timeout": 60}
    run = override(config, {"train": settings, "run": {"dir": str(tmp_path / "signalled")}})
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(run.model_dump(mode="json")))
    words = [
        Path(sys.executable).parent / "torchrun",
        "--nproc-per-node",
        "2",
        "--master-port",
        "29617",
        "-m",
        "mmgen.cli",
    ]
    process = subprocess.Popen([*words, "train", "--config", file], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while not (run.run.dir / "metrics.jsonl").exists() or len(losses(run)) < 3:
        time.sleep(0.05)
        assert process.poll() is None
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]) if to == "rank" else process.pid, number)
    printed = process.communicate(timeout=120)[1]
    assert "the same command continues" in printed
    if to == "rank":  # a launcher that receives the signal itself prints no exit codes
        assert f"exitcode  : {guard.INTERRUPTED}" in printed
    stopped = len(losses(run))
    assert stopped < 30
    assert checkpoint.read_trainer(checkpoint.latest(run.run.dir)).step == stopped
    subprocess.run([*words, "train", "--config", file], env=ENVIRONMENT, check=True, capture_output=True)
    assert [step for step, *_ in losses(run)] == list(range(1, 31))


@pytest.mark.slow
def test_a_hanging_rank_ends_all_ranks() -> None:
    code, found = command("hang")
    assert code == 0, found


def among(world: int, function: Callable[[Ranks], Any]) -> list[Any]:
    """What a function returns on every rank; the ranks are threads with a real process group."""
    store, results = dist.HashStore(), [None] * world

    def one(rank: int) -> None:
        side = dist.ProcessGroupGloo(store, rank, world, timedelta(seconds=30))
        results[rank] = function(Ranks(rank, world, side))

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("busy", [[0.3], [0.3, 0.1], [0.1, 0.2, 0.3, 0.9, 0.25], [2.0, 1e-6, 1e-6, 50.0]], ids=str)
def test_ranks_agree_on_sums_and_on_the_slowest(busy: list[float]) -> None:
    def exchange(ranks: Ranks) -> tuple:
        mine = busy[ranks.rank]
        return ranks.sums([mine, 1.0]), ranks.maxima([mine, -mine]), meter.slowest(ranks, mine)

    found = among(len(busy), exchange)
    assert all(one == found[0] for one in found)
    sums, maxima, (rank, over) = found[0]
    assert sums == pytest.approx([sum(busy), len(busy)])
    assert maxima == [max(busy), -min(busy)]
    assert busy[rank] == max(busy)
    median = max(sorted(busy)[(len(busy) - 1) // 2], 1e-4)  # the lower end of the histogram
    assert over == pytest.approx(max(busy) / median, rel=0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"offload_optimizer": "cpu"}, "offload_optimizer cpu needs train.zero_stage 1"),
        ({"offload_weights": "cpu", "zero_stage": 2}, "offload_weights cpu needs train.zero_stage 3"),
        ({"offload_weights": "nvme", "zero_stage": 3}, "needs a GPU: use cpu or none"),
    ],
)
def test_impossible_offloading_is_refused(config: Config, settings: dict, message: str) -> None:
    from mmgen.train.zero import deepspeed_config

    with pytest.raises(ValueError, match=message):
        deepspeed_config(override(config, {"train": settings}), world=2, bf16=False)


def test_settings_of_deepspeed_override_ours(config: Config) -> None:
    from mmgen.train.zero import deepspeed_config

    ours = {"zero_optimization": {"zero_hpz_partition_size": 8, "reduce_bucket_size": 7}, "prescale_gradients": True}
    found = deepspeed_config(override(config, {"train": {"zero_stage": 3, "deepspeed": ours}}), world=2, bf16=True)
    assert found["prescale_gradients"]
    assert found["zero_optimization"] | ours["zero_optimization"] == found["zero_optimization"]
    assert found["zero_optimization"]["stage"] == 3
