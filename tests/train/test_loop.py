"""Training: the result does not depend on micro-steps or interruptions, and faults are reported."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from mmgen.config import Config
from mmgen.config_io import override
from mmgen.data.loader import Corpus
from mmgen.data.order import Position
from mmgen.data.shards.samples import BadRecord
from mmgen.model import build_model
from mmgen.sequence.tokenizer import Tokenizer
from mmgen.train import loop
from mmgen.train.checkpoint import read as checkpoint
from mmgen.train.checkpoint import write as saver
from mmgen.train.engine import Engine
from mmgen.train.guard import INTERRUPTED
from mmgen.train.log import Log
from mmgen.train.loop import train
from mmgen.train.optimizer import EMA, averaged_weights, build_optimizer, learning_rate
from mmgen.train.report import count
from tests.conftest import pairs, ready, write_tar


def metrics(config: Config) -> list[dict]:
    return [json.loads(line) for line in (config.run.dir / "metrics.jsonl").read_text().splitlines()]


def losses(config: Config) -> list[tuple[int, float, float]]:
    return [(m["step"], m["loss"], m["grad_norm"]) for m in metrics(config) if "loss" in m]


def gradients(config: Config, micro_rows: int | None, factor: float = 1.0) -> list[torch.Tensor]:
    """Gradients of one global step in float64, computed in micro-steps of `micro_rows` rows."""
    config = override(config, {"train": {"micro_rows": micro_rows}})
    torch.manual_seed(0)
    tokenizer = Tokenizer.of(config)
    model = build_model(config, len(tokenizer)).double()
    corpus = Corpus(config.data.train, tokenizer, config)
    step = corpus.first_step()
    counts = count(step, config.objective.image_loss)
    for raw in step.micro:
        out = model(ready(corpus, raw, torch.float64))
        (factor * (out.text / counts[0] + out.image / counts[1])).backward()
    return [p.grad for p in model.parameters()]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.allclose(x, y, rtol=1e-9, atol=1e-12) for x, y in zip(a, b, strict=True))


def test_micro_steps_do_not_change_the_gradient(config: Config) -> None:
    whole = gradients(config, None)
    for rows in (1, 2, 3):
        assert equal(whole, gradients(config, rows)), rows
    assert not equal(whole, gradients(config, 1, factor=2.0)), "doubled gradients must be detected"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resume_repeats_the_uninterrupted_run(config: Config, tmp_path: Path, optimizer: str) -> None:
    straight = override(config, {"run": {"dir": str(tmp_path / "a")}, "train": {"optimizer": optimizer}})
    assert train(straight) == 0
    # The state after a crash past step 3: only the older checkpoint exists, and metrics.jsonl is ahead of it.
    third = override(straight, {"run": {"dir": str(tmp_path / "c")}})
    shutil.copytree(straight.run.dir, third.run.dir, symlinks=True)
    shutil.rmtree(third.run.dir / "checkpoints" / "step-6")
    (third.run.dir / "checkpoints" / "latest").unlink()
    (third.run.dir / "checkpoints" / "latest").symlink_to("step-3")
    assert train(third) == 0
    assert losses(third) == losses(straight)
    assert [m["step"] for m in metrics(third) if "loss" in m] == [1, 2, 3, 4, 5, 6]
    a, b = (checkpoint.load_model(c.run.dir / "checkpoints" / "latest")[0] for c in (straight, third))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("fault", ["moments", "average", "position"])
def test_an_incomplete_resume_is_detected(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """If a resume loses one part of the state, the comparison of the test above fails."""
    straight = override(config, {"run": {"dir": str(tmp_path / "a")}})
    train(straight)
    broken = override(config, {"run": {"dir": str(tmp_path / "b")}})
    shutil.copytree(straight.run.dir, broken.run.dir, symlinks=True)
    shutil.rmtree(broken.run.dir / "checkpoints" / "step-6")
    (broken.run.dir / "checkpoints" / "latest").unlink()
    (broken.run.dir / "checkpoints" / "latest").symlink_to("step-3")
    restore, read = checkpoint.restore, checkpoint.read_trainer

    def lose(found: checkpoint.Checkpoint, engine: Engine) -> None:
        restore(found, engine)
        for state in engine.optimizer.state.values():
            if fault == "moments":
                state["exp_avg"].zero_()
                state["exp_avg_sq"].zero_()
            elif fault == "average":
                state[EMA].zero_()

    monkeypatch.setattr(checkpoint, "restore", lose)
    if fault == "position":
        start = {"position": Position()}
        monkeypatch.setattr(checkpoint, "read_trainer", lambda *where: read(*where).model_copy(update=start))
    train(broken)
    a, b = (checkpoint.load_model(c.run.dir / "checkpoints" / "latest")[0] for c in (straight, broken))
    same = all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not same
    assert (losses(broken) != losses(straight)) == (fault != "average")


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_continues(config: Config, tmp_path: Path) -> None:
    """Start the command, press Ctrl-C, repeat the command: losses equal those of an uninterrupted run."""
    outcome = {}
    for name in ("straight", "interrupted"):
        run = override(config, {"run": {"dir": str(tmp_path / name)}, "train": {"steps": 30, "save_every": 100}})
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(run.model_dump(mode="json")))
        command = [sys.executable, "-m", "mmgen.cli", "train", "--config", str(file)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if name == "interrupted":
            process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
            while not (run.run.dir / "metrics.jsonl").exists() or len(losses(run)) < 3:
                time.sleep(0.02)
                assert process.poll() is None
            process.send_signal(signal.SIGINT)
            printed = process.communicate(timeout=60)[1]
            assert process.returncode == INTERRUPTED, printed
            assert "the same command continues" in printed
            assert len(losses(run)) < 30
        subprocess.run(command, env=environment, check=True, capture_output=True)
        outcome[name] = losses(run)
    assert outcome["straight"] == outcome["interrupted"]


def test_a_failed_last_save_keeps_the_previous_checkpoint(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    train(config)
    before = checkpoint.latest(config.run.dir)

    def full_disk(path: Path, tensors: dict) -> str:
        path.write_bytes(b"incomplete")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saver, "write", full_disk)
        with pytest.raises(
            OSError, match="step-9 could not be written .*No space left.* the previous one is unchanged"
        ):
            train(override(config, {"train": {"steps": 9}}))
    assert checkpoint.latest(config.run.dir) == before
    assert checkpoint.read_trainer(before).step == 6
    assert not list((config.run.dir / "checkpoints").glob(".*"))
    assert train(override(config, {"train": {"steps": 9}})) == 0


def test_a_failed_save_during_training_does_not_stop_the_run(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    write, calls = saver.write, []

    def denied_once(path: Path, tensors: dict) -> str:
        calls.append(path)
        if len(calls) == 1:
            raise PermissionError(13, "Permission denied")
        return write(path, tensors)

    monkeypatch.setattr(saver, "write", denied_once)
    assert train(config) == 0
    assert "checkpoint step-3 could not be written ([Errno 13] Permission denied)" in capsys.readouterr().err
    assert [p.name for p in checkpoint.candidates(config.run.dir)] == ["step-6"]


def damage(folder: Path) -> None:
    state = folder / "state-00000.safetensors"
    data = bytearray(state.read_bytes())
    data[-1] ^= 1
    state.write_bytes(bytes(data))


def test_a_damaged_checkpoint_is_reported_and_an_older_one_used(config: Config, capsys: pytest.CaptureFixture) -> None:
    train(config)
    before = losses(config)
    folder = checkpoint.latest(config.run.dir)
    assert folder is not None
    damage(folder)
    with pytest.raises(ValueError, match=r"step-6/state-00000\.safetensors is missing or damaged"):
        checkpoint.load_model(folder)
    assert train(config) == 0
    assert "step-6/state-00000.safetensors is missing or damaged; trying an older one" in capsys.readouterr().out
    assert losses(config) == before
    assert checkpoint.read_trainer(folder).step == 6, "step 6 was trained and saved again"
    for step in (3, 6):
        damage(config.run.dir / "checkpoints" / f"step-{step}")
    with pytest.raises(ValueError, match="all checkpoints of .* are damaged"):
        train(config)


def test_a_checkpoint_of_another_configuration_is_refused(config: Config) -> None:
    train(config)
    wider = override(config, {"model": {"backbone": {"intermediate_size": 64}}})
    with pytest.raises(ValueError, match=r"model\.backbone\.intermediate_size \(64 here, 48 there\)"):
        train(wider)
    assert train(override(config, {"train": {"steps": 7, "log_every": 2}})) == 0, (
        "more steps and other logging are allowed"
    )


def test_another_tokenizer_is_refused(config: Config) -> None:
    train(config)
    path = config.data.tokenizer
    words = json.loads(path.read_text())
    one, two = list(words["model"]["vocab"])[:2]
    vocabulary = words["model"]["vocab"]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    path.write_text(json.dumps(words))
    with pytest.raises(ValueError, match="is not the tokenizer of the checkpoint"):
        train(override(config, {"train": {"steps": 8}}))


@pytest.mark.parametrize("dangling", [True, False])
def test_a_run_without_latest_continues_from_its_newest_checkpoint(config: Config, dangling: bool) -> None:
    train(config)
    before = losses(config)
    shutil.rmtree(config.run.dir / "checkpoints" / "step-6")
    if not dangling:
        (config.run.dir / "checkpoints" / "latest").unlink()
    assert train(override(config, {"train": {"log_every": 6}})) == 0
    assert losses(config) == [*before[:3], before[5]]


def test_old_checkpoints_are_deleted(config: Config) -> None:
    train(override(config, {"train": {"steps": 8, "save_every": 2, "keep_last": 2}}))
    folder = config.run.dir / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-6", "step-8"]


def test_non_finite_values_stop_the_run(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "learning_rate", lambda settings, step: 1e30)
    with pytest.raises(FloatingPointError, match=r"step \d: .*(loss|grad_norm) = (nan|inf)"):
        train(override(config, {"train": {"clip_norm": 1e30}}))
    assert checkpoint.latest(config.run.dir) is None


def test_too_many_bad_samples_stop_the_run(config: Config, tmp_path: Path) -> None:
    members = pairs(10)
    for i in range(4):
        members[f"{i:04d}.png"] = members[f"{i:04d}.png"][:70]
    few = {
        "data": {"train": [str(write_tar(tmp_path / "bad.tar", members))], "val": []},
        "model": {"patcher": {"image_sizes": [[4, 4]]}},
    }
    with pytest.raises(ValueError, match=r"of 10 samples cannot be read, more than data\.max_bad_fraction"):
        train(override(config, few))
    lines = (config.run.dir / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(lines[0]).keys() == {"shard", "key", "reason"}
    lenient = override(config, {**few, "run": {"dir": str(tmp_path / "lenient")}})
    assert train(override(lenient, {"data": {"max_bad_fraction": 0.5}})) == 0


def test_names_of_samples_are_not_markup(config: Config, capsys: pytest.CaptureFixture) -> None:
    """A key with a closing tag, which is an error in terminal markup, must not stop a run."""
    config.run.dir.mkdir(parents=True, exist_ok=True)
    log = Log(config, 0)
    assert log.quarantine([BadRecord("a.tar", "cat[/b]", "[bold] is no image")]) == 1
    log.close()
    assert "a.tar/cat[/b]: [bold] is no image" in capsys.readouterr().err


def test_learning_rate(config: Config) -> None:
    settings = override(config, {"train": {"steps": 100, "warmup_steps": 10, "lr": 1.0, "min_lr_ratio": 0.05}}).train
    rates = [learning_rate(settings, step) for step in range(1, 101)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    assert rates[99] == pytest.approx(0.05)
    assert rates[54] == pytest.approx(0.525)


def test_averaged_weights_follow_the_recursion(config: Config) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(model, override(config, {"train": {"ema_decay": 0.9}}).train)
    expected = None
    for n in range(1, 30):
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.9, (1 + n) / (10 + n))
        now = model.weight.detach().double()
        expected = now if expected is None else decay * expected + (1 - decay) * now
    torch.testing.assert_close(optimizer.state[model.weight][EMA].double(), expected, rtol=1e-5, atol=1e-6)
    before = model.weight.detach().clone()
    average = optimizer.state[model.weight][EMA].clone()
    with averaged_weights(optimizer):
        assert torch.equal(model.weight, average)
    assert torch.equal(model.weight, before)


def test_the_optimiser_equals_torchs_adamw(config: Config) -> None:
    """The subclass adds averaged weights and changes nothing else."""
    torch.manual_seed(0)
    ours, theirs = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    settings = config.train
    mine = build_optimizer(ours, settings)
    groups = [
        {"params": [theirs.weight], "weight_decay": settings.weight_decay},
        {"params": [theirs.bias], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas)
    for _ in range(5):
        x = torch.randn(4, 3)
        for model, optimizer in ((ours, mine), (theirs, reference)):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(ours.bias, theirs.bias)


def test_samples_are_drawn_without_validation_data(config: Config) -> None:
    """A run without `data.val` draws the first captions of its training data."""
    config = override(config, {"data": {"val": []}, "train": {"steps": 2, "sample_every": 2, "save_every": 2}})
    assert train(config) == 0
    assert (config.run.dir / "samples" / "step-2.png").exists()
