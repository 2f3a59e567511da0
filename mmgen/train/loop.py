"""The training loop: the same code for one process and for many."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from mmgen.config import Config
from mmgen.data.documents import Step
from mmgen.data.latents import find_facts
from mmgen.data.loader import Corpus, steps
from mmgen.data.order import Cursors, Position
from mmgen.data.shards.samples import worst_shards
from mmgen.data.streams import training_corpus
from mmgen.image.latent import AutoencoderFacts
from mmgen.sequence.batch import prepare
from mmgen.sequence.tokenizer import Tokenizer
from mmgen.train import metrics
from mmgen.train.checkpoint import read as checkpoint
from mmgen.train.checkpoint.write import IDLE, Saver
from mmgen.train.engine import Engine, can_compile, uses_bf16
from mmgen.train.guard import INTERRUPTED, Spikes, Watchdog, check_space, interruptible
from mmgen.train.log import Log
from mmgen.train.optimizer import averages, learning_rate
from mmgen.train.ranks import Ranks, finish, shard, start
from mmgen.train.validate import draw_samples, sample_prompts, validation

__all__ = ["INTERRUPTED", "can_compile", "train", "uses_bf16"]


def train(config: Config) -> int:
    """Train, or continue, the run in `run.dir`; returns the exit code (0, or `INTERRUPTED`).

    Raises:
        ValueError, FileNotFoundError: settings, shards, tokenizer or checkpoint do not fit; nothing is changed.
        FloatingPointError: the loss or the gradient stopped being finite; no checkpoint is written.
        OSError: the last checkpoint of the run, or that of an interruption, could not be written.
    """
    ranks = start(config)
    config.check(ranks.world)
    torch.manual_seed(config.run.seed)
    tokenizer = Tokenizer.load(config.data.tokenizer, config.model.patcher.grids)
    found = checkpoint.newest_good(config.run.dir, ranks=ranks)
    facts = ranks.gather_objects(known_facts(found[1]) if found else find_facts(config, tokenizer))[0]
    if found:
        folder, trainer = found
        checkpoint.check_same_run(trainer, config, tokenizer, folder)
        if trainer["step"] >= config.train.steps:
            done = f"{trainer['step']} of {config.train.steps} steps"
            ranks.say(f"{config.run.dir} is trained: {done} (raise train.steps to go on)")
            finish()
            return 0
    watchdog = Watchdog(config.train.timeout, ranks.rank)
    try:
        run = Run(config, ranks, tokenizer, watchdog, facts)
        if found:
            run.restore(*found)
        elif config.train.init_from is not None:
            run.start_from(config.train.init_from)
        code = run.go()
        run.engine.close()
    finally:
        watchdog.close()
    finish()
    return code


def build_engine(config: Config, vocabulary: int, ranks: Ranks, facts: AutoencoderFacts | None = None) -> Engine:
    """The machinery that the settings and the number of processes ask for."""
    if not shard(config):
        return Engine(config, vocabulary, ranks, facts)
    from mmgen.train.zero import ZeroEngine

    return ZeroEngine(config, vocabulary, ranks, facts)


def known_facts(trainer: dict[str, Any]) -> AutoencoderFacts | None:
    """What a checkpoint knows of its autoencoder; earlier versions kept it among the settings."""
    if trainer.get("autoencoder"):
        return AutoencoderFacts(**trainer["autoencoder"])
    return AutoencoderFacts.of_settings(trainer["config"]["model"]["patcher"])


class Told(NamedTuple):
    """What a step holds over all ranks, and where these stand: sums, in one message of fixed size."""

    texts: float
    patches: float
    positions: float
    images: float
    bad: float
    signals: float
    unwritten: float
    failed: float


class Run:
    """A run in memory: engine, data, logs, and where it stands."""

    def __init__(
        self, config: Config, ranks: Ranks, tokenizer: Tokenizer, watchdog: Watchdog, facts: AutoencoderFacts | None
    ) -> None:
        self.facts = facts
        self.config, self.ranks, self.tokenizer, self.watchdog = config, ranks, tokenizer, watchdog
        known = [*averages(config.train), "weight"]
        if config.sample.weights not in known:
            raise ValueError(f"sample.weights '{config.sample.weights}' is not kept by this run: {', '.join(known)}")
        self.corpus = training_corpus(config, tokenizer, facts)
        self.engine = build_engine(config, len(tokenizer), ranks, facts)
        self.model, self.device = self.engine.model, self.engine.device
        self.patcher = self.model.build_patcher()
        self.patcher.load()  # not when the first image is drawn
        self.saver = Saver(config.run.dir / "checkpoints", self.engine, ranks, tokenizer)
        self.data = self.corpus.dataset.fingerprint
        self.spikes = Spikes(config.train.spike_factor)
        self.step, self.skipped = 0, 0
        self.position: Position | Cursors = self.corpus.start
        self.resumed: Path | None = None
        self.left_out: set[int] = set()
        """Steps that a rollback decided to leave out."""
        self.seconds = self.productive = 0.0
        self.born, self.began = time.time(), time.monotonic()

    def restore(self, folder: Path, trainer: dict[str, Any]) -> None:
        """Stand where a checkpoint stands."""
        checkpoint.check_same_data(trainer, self.data, folder)
        checkpoint.restore(folder, self.engine, trainer)
        self.resumed = folder
        self.step, self.position = trainer["step"], checkpoint.position_of(trainer)
        self.skipped = trainer["step"] - trainer["optimizer_steps"]
        self.left_out |= set(trainer.get("left_out", []))
        self.seconds, self.began = trainer["train_seconds"], time.monotonic()
        self.productive, self.born = trainer.get("productive_seconds", 0.0), trainer.get("born", self.born)

    def start_from(self, folder: Path) -> None:
        """Take the weights of another run's checkpoint."""
        fresh = checkpoint.start_from(folder, self.engine)
        self.ranks.say(f"weights from {folder}" + (f"; these start fresh: {', '.join(fresh)}" if fresh else ""))

    def go(self) -> int:
        """Train to the end, or to a signal."""
        config, settings, ranks, engine = self.config, self.config.train, self.ranks, self.engine
        self._open()
        stream, busy = self._stream(), 0.0
        self.model.train()
        with interruptible() as signals:
            while self.step < settings.steps:
                step = self.step + 1
                self.watchdog.phase("data", step)
                started, worked = time.monotonic(), time.thread_time()
                data = next(stream)
                waited = time.monotonic() - started
                if self.resumed is not None:  # not earlier: what starts a run draws random numbers too
                    checkpoint.restore_random(self.resumed, ranks, self.step)
                    self.resumed = None
                mine = (*count(data), data.positions, data.images, len(data.bad), len(signals), *self.saver.progress)
                told = Told(*ranks.sums(mine))
                counts = torch.tensor(told[:2]).clamp(min=1).to(self.device)
                logged = step % settings.log_every == 0 or step in (1, settings.steps)

                engine.watched = logged
                for group in engine.optimizer.param_groups:
                    group["lr"] = learning_rate(settings, step)
                sums, times = torch.zeros(2, device=self.device), torch.zeros(2, metrics.BUCKETS, device=self.device)
                for i, raw in enumerate(data.micro):
                    self.watchdog.phase("forward", step)
                    batch = prepare(raw, self.patcher, self.device)
                    losses = engine.forward(batch)
                    parts = torch.stack([losses.text, losses.image]) / counts
                    self.watchdog.phase("backward", step)
                    loss = (parts[0] + config.objective.lambda_image * parts[1]) * ranks.world
                    engine.backward(loss, last=i + 1 == len(data.micro))
                    sums += parts.detach()
                    if logged:
                        times += metrics.by_time(batch, losses)
                text, image = ranks.total(sums).tolist()
                total = text + config.objective.lambda_image * image
                self.watchdog.phase("step", step)
                norm, taken = engine.step(allow=math.isfinite(total) and step not in self.left_out)
                values = {"loss": total, "loss/text": text, "loss/image": image, "grad_norm": norm}
                if not taken and self._goes_back(step, values):
                    stream = self._stream()
                    continue
                self.skipped += not taken
                before, self.position, self.step = self.position, data.after, step
                spent = time.monotonic() - started
                busy = waited + time.thread_time() - worked
                self.productive += spent if taken else 0.0

                self._tell(data, told, values, before)
                if logged:
                    self._record(data, told, values, times, spent, waited, busy)
                if told.signals:
                    self._save(must=True)
                    self.log.say(f"interrupted: step {step} is saved, the same command continues from it")
                    self.log.close()
                    return INTERRUPTED
                if step % settings.save_every == 0 or step == settings.steps:
                    self._save(must=step == settings.steps)
                self._probe()
        self.log.close()
        return 0

    def _stream(self) -> Iterator[Step]:
        return steps(self.corpus, self.step, self.config.train.steps, self.position, self.ranks.rank, self.ranks.world)

    def _stands(self) -> Position | Cursors:
        """Where all processes stand in the data; each knows its own streams."""
        if isinstance(self.position, Position):
            return self.position
        return Cursors.union(self.ranks.gather_objects(self.position))

    def _open(self) -> None:
        """What a start checks and tells."""
        config, run, settings = self.config, self.config.run.dir, self.config.train
        state = 4 * sum(f.numel for f in self.engine.fragments if f.owned) * (3 + len(self.engine.optimizer.averages))
        rows = -(-settings.batch_rows // self.ranks.world)
        positions = rows * config.data.row_length
        check_space(
            config,
            int(self.ranks.sums([state])[0]),
            positions * (60 + 8 * config.model.patcher.patch_length + config.model.patcher.pixel_length),
        )
        if self.ranks.rank == 0:
            run.mkdir(parents=True, exist_ok=True)
            checkpoint.clean(run)
            (run / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        self.log = Log(config, self.step, self.ranks.rank == 0)
        self.known_bad = self.log.quarantine(self.corpus.bad)
        self.log.say(
            f"{run}: steps {self.step + 1} to {settings.steps} on {self.device}, {self.corpus.told}, "
            f"{'bf16' if self.engine.bf16 else 'fp32'}{', compiled' if self.model.compiled else ''}"
            + (f", {self.ranks.world} processes, ZeRO stage {settings.zero_stage}" if shard(config) else "")
        )
        given = settings.peak_tflops
        self.peak = given * 1e12 if given else metrics.measured_peak(self.device, self.engine.bf16)
        self.arithmetic = metrics.Arithmetic(self.model)
        self.prompts = sample_prompts(config)
        self.line = (self.step, time.monotonic())

    def _goes_back(self, step: int, values: dict[str, float]) -> bool:
        """Act on a step that was not taken, as `train.non_finite` says; whether the run went back."""
        if step in self.left_out:
            return False
        settings = self.config.train
        wrong = ", ".join(f"{name} = {value}" for name, value in values.items() if not math.isfinite(value))
        told = f"step {step}: {wrong}"
        left_out = self.skipped if settings.non_finite == "skip" else len(self.left_out)
        if settings.non_finite == "stop" or left_out >= settings.max_skips:
            self._finish_save(must=False)
            limit = "" if settings.non_finite == "stop" else f" (train.max_skips {settings.max_skips} is reached)"
            raise FloatingPointError(
                f"{told}{limit}. The last checkpoint is as it was; lower train.lr or train.clip_norm, "
                "or look at the data of this step"
            )
        event = {"step": step, "policy": settings.non_finite, "position": self.position.as_dict()}
        self.log.event("skipped.jsonl", {**event, **{name: str(value) for name, value in values.items()}})
        if settings.non_finite == "skip":
            self.log.say(f"{told}: left out")
            return False
        self._finish_save(must=False)
        found = checkpoint.newest_good(self.config.run.dir, self.log.say, self.ranks)
        if found is None:
            raise FloatingPointError(f"{told}, and there is no checkpoint to go back to")
        self.left_out.add(step)
        self.restore(*found)
        self.log.rewind(self.step)
        self.log.say(f"{told}: back to step {self.step}, and step {step} will be left out")
        return True

    def _tell(self, data: Step, told: Told, values: dict[str, float], before: Position | Cursors) -> None:
        """What every step may have to say: a finished save, bad samples, a spike, a slow rank."""
        if self.saver.status != IDLE:
            self._say_save(self.saver.poll(told.unwritten, told.failed))
        if told.bad:
            for bad in self.ranks.gather_objects(data.bad):
                self.known_bad = max(self.known_bad, self.log.quarantine(bad))
            known = self.corpus.known(self._stands())
            refuse_bad_data(int(self.ranks.maxima([self.known_bad])[0]), known, self.config)
        median = self.spikes.seen(values["loss"]) if math.isfinite(values["loss"]) else None
        if median is not None:
            where = {"from": before.as_dict(), "to": data.after.as_dict()}
            self.log.event("spikes.jsonl", {"step": self.step, "loss": values["loss"], "median": median, **where})
            self.log.say(f"step {self.step}: loss {values['loss']:.4g} over a median of {median:.4g} (spikes.jsonl)")
        self.log.advance(self.step)

    def _record(
        self,
        data: Step,
        told: Told,
        values: dict[str, float],
        times: Tensor,
        spent: float,
        waited: float,
        busy: float,
    ) -> None:
        """One line of metrics; every rank takes part."""
        step, ranks = self.step, self.ranks
        (flops,) = ranks.sums([metrics.step_flops(self.arithmetic, data)])
        held, wait = ranks.maxima([metrics.memory(self.device), waited])
        share = self.peak * ranks.world
        last, then = self.line
        self.line = (step, time.monotonic())
        rank, over = metrics.slowest(ranks, busy)
        slow = {"slowest_rank": float(rank), "slowest_over_median": over} if ranks.world > 1 else {}
        self.log.record(step, {
            **values, "lr": learning_rate(self.config.train, step), **self.engine.norms(values["grad_norm"]),
            **metrics.time_losses(ranks.total(times)),
            "tokens_per_s": told.positions / spent, "images_per_s": told.images / spent, "data_wait": wait / spent,
            "mfu": flops / (spent - wait) / share,
            "mfu_wall": flops * (step - last) / (self.line[1] - then) / share,
            "memory_bytes": held, "goodput": self.productive / max(time.time() - self.born, 1e-9),
            "skipped": float(self.skipped), **slow,
        })  # fmt: skip

    def _save(self, must: bool) -> None:
        settings = self.config.train
        self.watchdog.phase("save", self.step)
        self._finish_save(must=False)
        record = {
            "step": self.step,
            "config": self.config.model_dump(mode="json"),
            "position": self._stands().as_dict(),
            "optimizer_steps": self.step - self.skipped,
            "left_out": sorted(self.left_out),
            "train_seconds": self.seconds + time.monotonic() - self.began,
            "productive_seconds": self.productive,
            "born": self.born,
            "world": self.ranks.world,
            "data": self.data,
            "autoencoder": asdict(self.facts) if self.facts else None,
        }
        self.saver.begin(self.step, record, settings.keep_last, settings.keep_every)
        if must or not settings.save_async:
            self._finish_save(must)

    def _finish_save(self, must: bool) -> None:
        self._say_save(self.saver.finish(), must)

    def _say_save(self, problem: str | None, must: bool = False) -> None:
        if problem and must:
            raise OSError(problem)
        if problem:
            self.log.say(problem)

    def _probe(self) -> None:
        """Sample grids and validation, where they are due."""
        step, settings = self.step, self.config.train
        self.watchdog.phase("sample", step)
        due = step == settings.first_sample or (settings.sample_every and step % settings.sample_every == 0)
        if self.prompts and due:
            path = draw_samples(self.engine, self.tokenizer, self.config, self.prompts, step)
            self.log.say(f"samples: {path}")
        due = step == settings.steps or (settings.val_every and step % settings.val_every == 0)
        if self.config.data.val and due:
            corpus = Corpus(self.config.data.val, self.tokenizer, self.config, self.facts)
            with self.engine.averaged(self.config.sample.weights):
                self.log.record(step, validation(self.model, corpus, self.ranks))


def count(step: Step) -> tuple[int, int]:
    """(text targets, learned patches) of this process's micro-batches."""
    return sum(len(batch.label_at_L) for batch in step.micro), sum(len(batch.loss_at_J) for batch in step.micro)


def refuse_bad_data(bad: int, total: int, config: Config) -> None:
    """Stop the run where more of `total` samples are unreadable than `data.max_bad_fraction` allows."""
    if bad > config.data.max_bad_fraction * total:
        raise ValueError(
            f"{bad} of {total} samples cannot be read, more than data.max_bad_fraction {config.data.max_bad_fraction}: "
            f"see {config.run.dir / 'quarantine.jsonl'} (most in {worst_shards(config.run.dir / 'quarantine.jsonl')})"
        )
