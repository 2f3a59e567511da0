"""Faults in a run: changed shards, hangs, values that are not finite, loss spikes, too little space."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from mmgen.config import Config
from mmgen.config_io import override
from mmgen.data.order import Position
from mmgen.model import Losses
from mmgen.sequence.batch import Batch
from mmgen.train import guard
from mmgen.train.checkpoint import read as checkpoint
from mmgen.train.checkpoint.fragments import Store
from mmgen.train.engine import Engine
from mmgen.train.loop import train
from tests.conftest import pairs, write_tar
from tests.train.test_loop import metrics


def test_changed_shards_are_refused_on_resume(config: Config, tmp_path: Path) -> None:
    train(override(config, {"train": {"steps": 3}}))
    write_tar(Path(config.data.train[0]), pairs(80))
    with pytest.raises(ValueError, match="the training shards are not those of the checkpoint"):
        train(config)


def test_a_hang_is_reported_and_ends_the_process(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(guard.faulthandler, "dump_traceback", lambda *_, **__: None)
    watchdog = guard.Watchdog(timeout=0.2, rank=3, end=ended.append)
    watchdog.phase("backward", 12)
    time.sleep(0.1)
    assert not ended
    time.sleep(0.4)
    watchdog.close()
    assert set(ended) == {guard.HUNG}
    assert "rank 3 hangs in backward of step 12" in capsys.readouterr().err


@pytest.fixture
def poisoned(config: Config, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A run of 6 steps in which the loss of step 5 is NaN."""
    forward, phase, now = Engine.forward, guard.Watchdog.phase, [0]

    def record(self: guard.Watchdog, name: str, step: int) -> None:
        now[0] = step
        phase(self, name, step)

    def poison(self: Engine, batch: Batch) -> Losses:
        found = forward(self, batch)
        if now[0] == 5:
            found.text = found.text * float("nan")
        return found

    monkeypatch.setattr(Engine, "forward", poison)
    monkeypatch.setattr(guard.Watchdog, "phase", record)
    return config


def state(config: Config) -> dict[str, torch.Tensor]:
    store = Store(checkpoint.latest(config.run.dir))
    return {
        f"{kind} {name}": store.whole(kind, name) for kind in ("weight", "exp_avg", "ema") for name in store.names(kind)
    }


def test_a_loss_that_is_not_finite_stops_the_run(poisoned: Config) -> None:
    with pytest.raises(FloatingPointError, match="step 5: loss = nan"):
        train(poisoned)
    assert checkpoint.read_trainer(checkpoint.latest(poisoned.run.dir)).step == 3


def test_a_skipped_step_changes_no_state(poisoned: Config) -> None:
    skipping = override(poisoned, {"train": {"non_finite": "skip", "save_every": 1, "keep_last": 9}})
    assert train(skipping) == 0
    folders = [skipping.run.dir / "checkpoints" / f"step-{n}" for n in (4, 5)]
    before, after = (Store(folder) for folder in folders)
    for kind in ("weight", "exp_avg", "exp_avg_sq", "ema"):
        assert all(torch.equal(before.whole(kind, n), after.whole(kind, n)) for n in before.names(kind))
    records = [checkpoint.read_trainer(folder) for folder in folders]
    assert [record.optimizer_steps for record in records] == [4, 4]
    assert records[0].position != records[1].position
    (event,) = [json.loads(line) for line in (skipping.run.dir / "skipped.jsonl").read_text().splitlines()]
    assert (event["step"], event["policy"]) == (5, "skip")
    none_left = override(skipping, {"train": {"max_skips": 0}, "run": {"dir": str(skipping.run.dir) + "-none"}})
    with pytest.raises(FloatingPointError, match="max_skips 0 is reached"):
        train(none_left)


def test_a_rollback_skips_the_step(poisoned: Config) -> None:
    """Going back to step 3 and skipping step 5 gives the same state as a run that skipped it at once."""
    back = override(poisoned, {"train": {"non_finite": "rollback"}})
    assert train(back) == 0
    assert [line["step"] for line in metrics(back) if "loss" in line] == [1, 2, 3, 4, 5, 6]
    skipping = override(poisoned, {"train": {"non_finite": "skip"}, "run": {"dir": str(back.run.dir) + "-skip"}})
    assert train(skipping) == 0
    one, other = state(back), state(skipping)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_spike_is_recorded_with_its_data_range(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = guard.Spikes(factor=2.0, memory=8)
    assert [seen.seen(loss) for loss in (1.0, 9.0, 1.0, 1.0, 1.1, 4.0, 1.0)] == [
        None,
        None,
        None,
        None,
        None,
        1.0,
        None,
    ]
    monkeypatch.setattr(guard.Spikes, "seen", lambda self, loss: 1.5)
    train(override(config, {"train": {"steps": 2}}))
    lines = [json.loads(line) for line in (config.run.dir / "spikes.jsonl").read_text().splitlines()]
    assert lines[0]["from"] == Position().as_dict()
    assert lines[1]["from"] == lines[0]["to"]


def test_too_little_disk_space_is_refused(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(ValueError, match="two checkpoints need"):
        train(config)
    with pytest.raises(ValueError, match="but 2 loader workers need about"):
        guard.check_space(override(config, {"data": {"workers": 2}}), 0, 10**6)
