"""The training loop: the same code for one process and for many."""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from mmgen.config import Config
from mmgen.data.latents import find_facts
from mmgen.data.streams import training_corpus
from mmgen.image.latent import AutoencoderFacts
from mmgen.sequence.batch import prepare
from mmgen.sequence.tokenizer import Tokenizer
from mmgen.train import metrics, recovery
from mmgen.train.checkpoint import read as checkpoint
from mmgen.train.checkpoint.read import Checkpoint
from mmgen.train.checkpoint.write import Saver
from mmgen.train.engine import Engine
from mmgen.train.guard import INTERRUPTED, Watchdog, check_space, interruptible
from mmgen.train.log import Log
from mmgen.train.optimizer import averages, learning_rate
from mmgen.train.ranks import Ranks, finish, shard, start
from mmgen.train.report import Clock, Outcome, Reporter, Totals, count
from mmgen.train.run import Run
from mmgen.train.state import Progress
from mmgen.train.validate import Probe


def train(config: Config) -> int:
    """Train, or continue, the run in `run.dir`; returns the exit code (0, or `INTERRUPTED`).

    Raises:
        ValueError, FileNotFoundError: settings, shards, tokenizer or checkpoint do not fit; nothing is changed.
        FloatingPointError: the loss or the gradient stopped being finite; no checkpoint is written.
        OSError: the last checkpoint of the run, or that of an interruption, could not be written.
    """
    ranks = start(config)
    config.check_processes(ranks.world)
    torch.manual_seed(config.run.seed)
    tokenizer = Tokenizer.of(config)
    found = checkpoint.newest_good(config.run.dir, ranks=ranks)
    facts = ranks.gather_objects(found.state.autoencoder if found else first_facts(config, tokenizer))[0]
    if found:
        checkpoint.check_same_run(found, config, tokenizer)
        if found.state.step >= config.train.steps:
            ranks.say(checkpoint.describe_finished(found, config))
            finish()
            return 0
    with closing(Watchdog(config.train.timeout, ranks.rank)) as watchdog:
        run = open_run(Start(config, ranks, tokenizer, facts, found), watchdog)
        code = loop(run, found.folder if found else None)
        run.log.close()
        run.engine.close()
    finish()
    return code


def first_facts(config: Config, tokenizer: Tokenizer) -> AutoencoderFacts | None:
    """What a new run takes for granted of its autoencoder: those of the weights that it starts from, else found now."""
    start = config.train.init_from
    stored = checkpoint.stored_facts(start) if start is not None and config.model.patcher.kind == "vae" else None
    return stored or find_facts(config, tokenizer)


def loop(run: Run, resumed: Path | None) -> int:
    """Train to the last step, or to a signal; `resumed` is the checkpoint that the run continues from."""
    config, settings, ranks, engine = run.config, run.config.train, run.ranks, run.engine
    progress, watchdog, stream = run.progress, run.watchdog, run.batches(resumed)
    engine.model.train()
    with interruptible() as signals:
        while progress.step < settings.steps:
            step, clock = progress.step + 1, Clock()
            logged = step % settings.log_every == 0 or step in (1, settings.steps)

            watchdog.phase("data", step)
            data = next(stream)
            clock.data()
            mine = (*count(data), data.positions, data.images, len(data.bad), len(signals), *run.saver.progress)
            totals = Totals(*ranks.sums(mine))
            counts = torch.tensor(totals[:2]).clamp(min=1).to(engine.device)

            engine.begin(lr := learning_rate(settings, step), watched=logged)
            sums = torch.zeros(2, device=engine.device)
            by_time = torch.zeros(2, metrics.BUCKETS, device=engine.device)
            for i, raw in enumerate(data.micro):
                watchdog.phase("forward", step)
                batch = prepare(raw, run.patcher, engine.device)
                losses = engine.forward(batch)
                parts = torch.stack([losses.text, losses.image]) / counts
                watchdog.phase("backward", step)
                loss = (parts[0] + config.objective.lambda_image * parts[1]) * ranks.world
                engine.backward(loss, last=i + 1 == len(data.micro))
                sums += parts.detach()
                if logged:
                    by_time += metrics.by_time(batch, losses)
            text, image = ranks.total(sums).tolist()
            total = text + config.objective.lambda_image * image

            watchdog.phase("step", step)
            norm, taken = engine.step(allow=math.isfinite(total) and step not in progress.left_out)
            values = {"loss": total, "loss/text": text, "loss/image": image, "grad_norm": norm}
            if not taken and (found := recovery.react(run, step, values)):
                stream = run.batches(found.folder)
                continue
            clock.stop()
            before = progress.position
            progress.advance(data.after, taken, clock.spent)

            run.saver.poll(totals.unwritten, totals.failed)
            outcome = Outcome(step, data, totals, values, lr, by_time, clock, before)
            run.reporter.step(outcome)
            if logged:
                run.reporter.record(outcome, progress)
            if totals.signals:
                run.save(must=True)
                run.log.say(f"interrupted: step {step} is saved, the same command continues from it")
                return INTERRUPTED
            if step % settings.save_every == 0 or step == settings.steps:
                run.save(must=step == settings.steps)
            watchdog.phase("sample", step)
            run.probe.show(step)
    return 0


@dataclass(frozen=True)
class Start:
    """What a run starts from."""

    config: Config
    ranks: Ranks
    tokenizer: Tokenizer
    autoencoder: AutoencoderFacts | None
    found: Checkpoint | None
    """The checkpoint that it continues from."""


def open_run(start: Start, watchdog: Watchdog) -> Run:
    """Build the parts of a run, which continues from a checkpoint where there is one; writes config.yaml.

    Raises:
        ValueError, FileNotFoundError: settings, shards or checkpoint do not fit; nothing is changed.
    """
    config, ranks, tokenizer, found = start.config, start.ranks, start.tokenizer, start.found
    known = [*averages(config.train), "weight"]
    if config.sample.weights not in known:
        raise ValueError(f"sample.weights '{config.sample.weights}' is not kept by this run: {', '.join(known)}")
    corpus = training_corpus(config, tokenizer, start.autoencoder)
    engine = build_engine(config, len(tokenizer), ranks, start.autoencoder)
    patcher = engine.model.build_patcher()
    patcher.load()  # not when the first image is drawn
    progress = Progress(corpus.start)
    if found is not None:
        recovery.resume(found, engine, progress, corpus.dataset.fingerprint)
    elif config.train.init_from is not None:
        fresh = checkpoint.start_from(config.train.init_from, engine)
        ranks.say(
            f"weights from {config.train.init_from}" + (f"; these start fresh: {', '.join(fresh)}" if fresh else "")
        )
    check_room(engine)
    if ranks.rank == 0:
        config.run.dir.mkdir(parents=True, exist_ok=True)
        checkpoint.clean(config.run.dir)
        (config.run.dir / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    log = Log(config, progress.step, ranks.rank == 0)
    reporter = Reporter(engine, corpus, log)
    log.say(
        f"{config.run.dir}: steps {progress.step + 1} to {config.train.steps} on {engine.device}, "
        f"{corpus.description}, {'bf16' if engine.bf16 else 'fp32'}{', compiled' if engine.model.compiled else ''}"
        + (f", {ranks.world} processes, ZeRO stage {config.train.zero_stage}" if shard(config) else "")
    )
    saver = Saver(config.run.dir / "checkpoints", engine, tokenizer, log.say)
    probe = Probe(engine, tokenizer, log)
    return Run(engine, corpus, patcher, progress, log, reporter, saver, probe, watchdog)


def build_engine(config: Config, vocabulary: int, ranks: Ranks, autoencoder: AutoencoderFacts | None = None) -> Engine:
    """The engine that the settings and the number of processes ask for."""
    if not shard(config):
        return Engine(config, vocabulary, ranks, autoencoder)
    from mmgen.train.zero import ZeroEngine

    return ZeroEngine(config, vocabulary, ranks, autoencoder)


def check_room(engine: Engine) -> None:
    """Raise ValueError where there is too little space for checkpoints, or for the batches of loader workers."""
    config, ranks = engine.config, engine.ranks
    state = 4 * sum(f.numel for f in engine.fragments if f.owned) * (3 + len(engine.optimizer.averages))
    positions = -(-config.train.batch_rows // ranks.world) * config.data.row_length
    per_position = 60 + 8 * config.model.patcher.patch_length + config.model.patcher.pixel_length
    check_space(config, int(ranks.sums([state])[0]), positions * per_position)
