"""Training in many processes: every cut equals a plain loop, every layout resumes, and the checks can fail."""

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
import torch
import torch.distributed as dist
import yaml
from transformers import AutoTokenizer

from mmgen.cli.export import export as export_command
from mmgen.config import Config
from mmgen.config_io import override
from mmgen.data.documents import Share
from mmgen.data.loader import Corpus
from mmgen.data.order import Position
from mmgen.model import Losses, MMGenModel
from mmgen.sequence.batch import Batch
from mmgen.sequence.tokenizer import Tokenizer
from mmgen.train import guard, loop
from mmgen.train import metrics as meter
from mmgen.train.checkpoint import posthoc
from mmgen.train.checkpoint import read as checkpoint
from mmgen.train.checkpoint.export import export
from mmgen.train.checkpoint.fragments import Store
from mmgen.train.engine import Engine
from mmgen.train.loop import train
from mmgen.train.optimizer import AveragingAdamW, power, power_exponent
from mmgen.train.ranks import Ranks
from tests.conftest import pairs, ready, write_tar
from tests.train.test_loop import losses, metrics

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def command(module: str, *words: object) -> tuple[int, dict]:
    """Exit code and JSON of a check in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.faults.{module}", *map(str, words), "--json"],
        env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert lines, done.stderr[-2000:]
    return done.returncode, json.loads(lines[-1])


def test_stages_in_two_processes_equal_a_plain_loop() -> None:
    code, found = command("oracle", "--cells", 4)
    assert {cell["cell"].split("-")[0] for cell in found["cells"]} == {"stage0", "stage1", "stage2", "stage3"}
    assert code == 0, found


@pytest.mark.slow
def test_every_cut_equals_a_plain_loop() -> None:
    code, found = command("oracle")
    assert (code, len(found["cells"])) == (0, 16), found


@pytest.mark.slow
def test_settings_that_must_not_change_the_result() -> None:
    """Offloading, checkpointed activations, buckets, samples on the way; a spoiled step left out in every stage."""
    code, found = command("oracle", "--variants")
    assert code == 0, found


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["doubled", "no_sync"])
def test_the_plain_loop_tells_wrong_gradients(fault: str) -> None:
    code, found = command("oracle", "--inject", fault, "--cells", 3)
    assert code == 1
    assert not any(cell["holds"] for cell in found["cells"]), found
    assert not any(code for cell in found["cells"] for code in cell["codes"]), "wrong, not broken"


@pytest.mark.slow
def test_every_layout_resumes() -> None:
    code, found = command("resume")
    assert code == 0, found
    assert sum(case["bit_equal"] for case in found["cases"]) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["moments", "ema", "rng"])
def test_a_resume_that_forgets_is_told(fault: str) -> None:
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
def test_killed_runs_that_lose_something_are_told(fault: str) -> None:
    code, found = command("kill_matrix", "--points", 9, "--inject", fault)
    assert code == 1
    kept = found["resumed"] if fault == "early_prune" else found["bit_equal"]
    assert kept < found["points"] == 9, found


@pytest.mark.slow
def test_bytes_of_state_and_messages_are_those_of_theory() -> None:
    code, found = command("accounts")
    assert (code, len(found["cells"])) == (0, 24), found


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["whole_averages", "sent_twice"])
def test_bytes_too_many_are_told(fault: str) -> None:
    code, found = command("accounts", "--world", 2, "--inject", fault)
    assert code == 1
    assert not any(cell["holds"] for cell in found["cells"]), found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "to"), [(signal.SIGUSR1, "rank"), (signal.SIGTERM, "rank"), (signal.SIGINT, "rank"),
                       (signal.SIGTERM, "launcher")], ids=str,
)  # fmt: skip
def test_a_signal_stops_all_ranks_after_saving(config: Config, tmp_path: Path, number: int, to: str) -> None:
    """As a user: torchrun, a signal that only one process gets, and the same command again."""
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
    told = process.communicate(timeout=120)[1]
    assert "the same command continues" in told
    if to == "rank":  # a launcher that was told to stop names no codes
        assert f"exitcode  : {guard.INTERRUPTED}" in told
    stopped = len(losses(run))
    assert stopped < 30
    assert checkpoint.read_trainer(checkpoint.latest(run.run.dir)).step == stopped
    subprocess.run([*words, "train", "--config", file], env=ENVIRONMENT, check=True, capture_output=True)
    assert [step for step, *_ in losses(run)] == list(range(1, 31))


@pytest.mark.slow
def test_a_rank_that_hangs_ends_all() -> None:
    code, found = command("hang")
    assert code == 0, found


def among(world: int, function: Callable[[Ranks], Any]) -> list[Any]:
    """What a function returns on every rank, threads that talk through a real group."""
    store, found = dist.HashStore(), [None] * world

    def one(rank: int) -> None:
        side = dist.ProcessGroupGloo(store, rank, world, timedelta(seconds=30))
        found[rank] = function(Ranks(rank, world, side))

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("busy", [[0.3], [0.3, 0.1], [0.1, 0.2, 0.3, 0.9, 0.25], [2.0, 1e-6, 1e-6, 50.0]], ids=str)
def test_ranks_agree_on_sums_and_on_the_slowest(busy: list[float]) -> None:
    def told(ranks: Ranks) -> tuple:
        mine = busy[ranks.rank]
        return ranks.sums([mine, 1.0]), ranks.maxima([mine, -mine]), meter.slowest(ranks, mine)

    found = among(len(busy), told)
    assert all(one == found[0] for one in found)
    sums, maxima, (rank, over) = found[0]
    assert sums == pytest.approx([sum(busy), len(busy)])
    assert maxima == [max(busy), -min(busy)]
    assert busy[rank] == max(busy)
    median = max(sorted(busy)[(len(busy) - 1) // 2], 1e-4)  # what the histogram can tell apart
    assert over == pytest.approx(max(busy) / median, rel=0.02)


def test_trackers_are_told(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []

    class Tracker:
        def log(self, values: dict, step: int) -> None:
            told.append((step, values["loss"]))

        def finish(self) -> None:
            told.append("finished")

    module = type(sys)("wandb")
    module.init = lambda **settings: told.append(settings["name"]) or Tracker()
    monkeypatch.setitem(sys.modules, "wandb", module)
    run = override(config, {"train": {"trackers": ["wandb"], "steps": 2}, "data": {"val": []}})
    train(run)
    assert told == ["run", *[(step, loss) for step, loss, _ in losses(run)], "finished"]
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ValueError, match="trackio, which is not installed: pip install trackio"):
        train(override(config, {"train": {"trackers": ["trackio"], "steps": 3}}))


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


def test_deepspeeds_own_settings_come_last(config: Config) -> None:
    from mmgen.train.zero import deepspeed_config

    own = {"zero_optimization": {"zero_hpz_partition_size": 8, "reduce_bucket_size": 7}, "prescale_gradients": True}
    found = deepspeed_config(override(config, {"train": {"zero_stage": 3, "deepspeed": own}}), world=2, bf16=True)
    assert found["prescale_gradients"]
    assert found["zero_optimization"] | own["zero_optimization"] == found["zero_optimization"]
    assert found["zero_optimization"]["stage"] == 3


def test_other_shards_are_refused_on_resume(config: Config, tmp_path: Path) -> None:
    train(override(config, {"train": {"steps": 3}}))
    write_tar(Path(config.data.train[0]), pairs(80))
    with pytest.raises(ValueError, match="the training shards are not those of the checkpoint"):
        train(config)


def test_a_hang_is_named_and_ends_the_process(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
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
    """A run of 6 steps, in which the loss of step 5 is not a number."""
    forward, phase, now = Engine.forward, guard.Watchdog.phase, [0]

    def noting(self: guard.Watchdog, name: str, step: int) -> None:
        now[0] = step
        phase(self, name, step)

    def poison(self: Engine, batch: Batch) -> Losses:
        found = forward(self, batch)
        if now[0] == 5:
            found.text = found.text * float("nan")
        return found

    monkeypatch.setattr(Engine, "forward", poison)
    monkeypatch.setattr(guard.Watchdog, "phase", noting)
    return config


def state(config: Config) -> dict[str, torch.Tensor]:
    store = Store(checkpoint.latest(config.run.dir))
    return {
        f"{kind} {name}": store.whole(kind, name) for kind in ("weight", "exp_avg", "ema") for name in store.names(kind)
    }


def test_non_finite_stop(poisoned: Config) -> None:
    with pytest.raises(FloatingPointError, match="step 5: loss = nan"):
        train(poisoned)
    assert checkpoint.read_trainer(checkpoint.latest(poisoned.run.dir)).step == 3


def test_a_skipped_step_leaves_no_trace(poisoned: Config) -> None:
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


def test_rollback_leaves_the_step_out(poisoned: Config) -> None:
    """Going back to step 3 and leaving step 5 out gives the state of a run that skipped it at once."""
    back = override(poisoned, {"train": {"non_finite": "rollback"}})
    assert train(back) == 0
    assert [line["step"] for line in metrics(back) if "loss" in line] == [1, 2, 3, 4, 5, 6]
    skipping = override(poisoned, {"train": {"non_finite": "skip"}, "run": {"dir": str(back.run.dir) + "-skip"}})
    assert train(skipping) == 0
    one, other = state(back), state(skipping)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_spikes_remember_the_data_range(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_little_room_is_refused(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(ValueError, match="two checkpoints need"):
        train(config)
    with pytest.raises(ValueError, match="loader workers need about"):
        guard.check_space(override(config, {"data": {"workers": 2}}), 0, 10**6)


@pytest.mark.parametrize("average", ["ema", "weight", "ema_0.5", "power_0.1", "power:0.12"])
def test_export_is_read_by_transformers(config: Config, tmp_path: Path, average: str) -> None:
    config = override(config, {"train": {"ema_more": [0.5], "ema_power": [0.1, 0.2], "keep_every": 3}})
    train(config)
    found = checkpoint.latest(config.run.dir)
    out = tmp_path / "out"
    export(config.run.dir, found, out, average)
    model = MMGenModel.from_pretrained(out)
    if ":" not in average:
        expected = checkpoint.load_model(found, average)[0]
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), expected.parameters(), strict=True))
    tokenizer = AutoTokenizer.from_pretrained(out)
    ours = Tokenizer.of(config)
    assert tokenizer("picture 1", add_special_tokens=False)["input_ids"] == ours.encode("picture 1")
    assert tokenizer.eos_token_id == ours.eos


def test_export_from_the_command_line(config: Config, tmp_path: Path) -> None:
    train(config)
    assert export_command(config=config, out=tmp_path / "out") == 0
    with pytest.raises(ValueError, match="no weights 'ema_0.3'.*it has ema, weight"):
        export_command(config=override(config, {"sample": {"weights": "ema_0.3"}}), out=tmp_path / "no")


def test_a_new_run_starts_from_weights(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train(config)
    found = checkpoint.latest(config.run.dir)
    other = {"run": {"dir": str(tmp_path / "next")}, "train": {"init_from": str(found), "lr": 1e-12, "steps": 1}}
    assert train(override(config, other)) == 0
    weights = checkpoint.load_model(tmp_path / "next" / "checkpoints" / "latest", "weight")[0]
    expected = checkpoint.load_model(found)[0]
    for p, q in zip(weights.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    larger = {"model": {"patcher": {"patch_size": 1, "channels": 3}}, "run": {"dir": str(tmp_path / "larger")}}
    assert train(override(config, {**other, **larger})) == 0
    assert "these start fresh: objective." in capsys.readouterr().out


def test_kept_checkpoints_stay(config: Config) -> None:
    train(override(config, {"train": {"steps": 8, "save_every": 1, "keep_last": 1, "keep_every": 3}}))
    names = {path.name for path in checkpoint.candidates(config.run.dir)}
    assert names == {"step-3", "step-6", "step-8"}


def test_power_averages_and_any_width_after_training() -> None:
    """Against the integral of the profile, and a width that was not tracked from two that were."""
    for width in (0.05, 0.1, 0.25):
        gamma = power_exponent(width)
        tau = np.linspace(0, 1, 200_001)[1:]
        profile = tau**gamma / (tau**gamma).sum()
        mean = (profile * tau).sum()
        assert ((profile * tau**2).sum() - mean**2) ** 0.5 == pytest.approx(width, rel=1e-3)
    path = np.cumsum(np.random.default_rng(0).standard_normal((2000, 8)), axis=0)
    tracked, snapshots = {}, []
    for n, value in enumerate(path, 1):
        for width in (0.05, 0.1, 0.08):
            keep = power(width)(n)
            tracked[width] = value if n == 1 else keep * tracked[width] + (1 - keep) * value
        if n % 250 == 0:
            snapshots += [(n, width, tracked[width]) for width in (0.05, 0.1)]
    weights = posthoc.solve(np.array([s for s, _, _ in snapshots]), np.array([w for _, w, _ in snapshots]), 2000, 0.08)
    made = sum(weight * value for weight, (_, _, value) in zip(weights, snapshots, strict=True))
    assert np.abs(made - tracked[0.08]).max() < 0.02 * np.abs(tracked[0.08]).max()
    assert weights.sum() == pytest.approx(1, abs=0.01)


def test_several_averages_follow_their_recursions() -> None:
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(5))
    decays = {"ema": lambda n: 0.9, "power_0.1": power(0.1)}
    optimizer = AveragingAdamW([p], decays, lr=0.1)
    expected: dict[str, torch.Tensor] = {}
    for n in range(1, 20):
        (p * torch.randn(5)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, decay in decays.items():
            now = p.detach().double()
            expected[name] = now if n == 1 else decay(n) * expected[name] + (1 - decay(n)) * now
    for name, value in expected.items():
        torch.testing.assert_close(optimizer.state[p][name].double(), value, rtol=1e-5, atol=1e-6)


def test_metrics_of_a_step(config: Config) -> None:
    train(override(config, {"train": {"peak_tflops": 1.0, "val_every": 3}}))
    line = [line for line in metrics(config) if "loss" in line][-1]
    parts = [value for name, value in line.items() if name.startswith("grad_norm/")]
    assert sum(part**2 for part in parts) ** 0.5 == pytest.approx(line["grad_norm"], rel=1e-4)
    assert len(parts) == 3
    assert 0 < line["goodput"] <= 1
    assert line["memory_bytes"] > 10**6
    validations = [line for line in metrics(config) if "val_loss/text" in line]
    assert [line["step"] for line in validations] == [3, 6]
    assert any(name.startswith("val_loss/image_t") for name in validations[0])


OBJECTIVES = [
    {},
    *({"kind": "mar", "mar": {"order": order}} for order in ("raster", "random", "masked")),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("held", ["text", "pictures", "nothing"])
def test_every_parameter_takes_part(config: Config, tmp_path: Path, objective: dict, held: str) -> None:
    """Whatever a rank's rows hold: otherwise ZeRO-1 and 2 abort, and ZeRO-3 hangs."""
    kept = {"text": ".json", "pictures": ".png", "nothing": ""}[held]
    members = {name: data for name, data in pairs(8).items() if name.endswith(kept)}
    shard = str(write_tar(tmp_path / "some.tar", members))
    data = {"train": [shard], "captionless": "keep"}
    config = override(config, {"data": data, "objective": objective, "train": {"batch_rows": 1}})
    tokenizer = Tokenizer.of(config)
    model = loop.build_engine(config, len(tokenizer), Ranks()).model
    rank, world = (7, 8) if held == "nothing" else (0, 1)
    corpus = Corpus(config.data.train, tokenizer, config)
    (raw,) = corpus.first_step(Share(rank, world)).micro
    found = model(ready(corpus, raw))
    # Where only pictures stand, BOI and EOS are still to be predicted.
    assert (found.text_count > 0, found.image_count > 0) == (held != "nothing", held == "pictures")
    (found.text + found.image).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_losses_per_range_of_t_make_up_the_image_loss(config: Config) -> None:
    tokenizer = Tokenizer.of(config)
    corpus = Corpus(config.data.train, tokenizer, config)
    model = loop.build_engine(config, len(tokenizer), Ranks()).model
    (raw,) = corpus.first_step().micro
    batch = ready(corpus, raw)
    found = model(batch)
    times = meter.by_time(batch, found)
    assert float(times[0].sum()) == pytest.approx(float(found.image), rel=1e-5)
    assert int(times[1].sum()) == found.image_count


def test_attended_pairs_are_those_of_the_mask(config: Config) -> None:
    from mmgen.sequence.attention import dense_visible

    tokenizer = Tokenizer.of(config)
    (batch,) = Corpus(config.data.train, tokenizer, config).first_step().micro
    real = (batch.document_BS >= 0).unsqueeze(-1)
    assert meter.attended_pairs(batch) == int((dense_visible(batch.sites) & real).sum())
