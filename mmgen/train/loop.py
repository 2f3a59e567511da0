"""The training loop, from the first step or a checkpoint to the last step, for one process or many."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from mmgen.config import Config, SourceConfig
from mmgen.data.latents import find_facts
from mmgen.data.streams import training_corpus
from mmgen.image.latent import AutoencoderFacts
from mmgen.sequence.batch import prepare
from mmgen.sequence.tokenizer import Tokenizer
from mmgen.train import metrics, recovery
from mmgen.train.checkpoint import read as checkpoint
from mmgen.train.checkpoint.read import Checkpoint
from mmgen.train.checkpoint.start import checkpoint_of, start_from
from mmgen.train.checkpoint.write import Saver
from mmgen.train.engine import Engine
from mmgen.train.guard import INTERRUPTED, Watchdog, check_space, interruptible
from mmgen.train.heartbeat import Heartbeat, MachineLoad
from mmgen.train.log import Log
from mmgen.train.optimizer import ema_decays, learning_rate
from mmgen.train.ranks import Ranks, finish, shard, start
from mmgen.train.report import Clock, Outcome, Reporter, Totals, count
from mmgen.train.run import Run
from mmgen.train.state import NOISE, Progress
from mmgen.train.validate import Probe


def train(config: Config) -> int:
    """Train, or continue, the run in `run.dir`; returns the exit code (0, or `INTERRUPTED`).

    Raises:
        ValueError, FileNotFoundError: settings, shards, tokenizer and checkpoint do not fit together; no file is
            changed.
        FloatingPointError: the loss or the gradient was not finite; no checkpoint is written.
        OSError: the last checkpoint of the run, or the one of an interruption, could not be written.
    """
    with closing(main_heartbeat()) as heartbeat:
        heartbeat.begin("starting the processes")
        ranks = start(config)
        config.check_processes(ranks.world)
        torch.manual_seed(config.run.seed)
        tokenizer = Tokenizer.of(config)
        heartbeat.begin("verifying the newest checkpoint")
        resumed = checkpoint.newest_good(config.run.dir, ranks=ranks)
        heartbeat.begin("reading the autoencoder and its statistics")
        facts = ranks.gather_objects(resumed.state.autoencoder if resumed else first_facts(config, tokenizer))[0]
        if resumed:
            if tokenizer.roles.described and not (resumed.folder / "tokenizer_config.json").exists():
                tokenizer = Tokenizer.load(config.data.tokenizer, config.model.patcher.grids, own_roles=False)
            checkpoint.check_same_run(resumed, config, tokenizer)
            if resumed.state.step >= config.train.steps:
                ranks.print(checkpoint.describe_finished(resumed, config))
                finish()
                return 0
            for line in checkpoint.describe_changes(resumed, config):
                ranks.print(line)
            config = config.with_positions(resumed.state.positions)
        with closing(Watchdog(config.train.timeout, ranks.rank, heartbeat=heartbeat)) as watchdog:
            run = open_run(Start(config, ranks, tokenizer, facts, resumed), watchdog, heartbeat)
            code = loop(run, resumed.folder if resumed else None)
            run.log.close()
            run.engine.close()
    finish()
    return code


def main_heartbeat() -> Heartbeat:
    """The heartbeat of this process: it prints in the first process of the run only."""
    if os.environ.get("RANK", "0") != "0":
        return Heartbeat()
    return Heartbeat(load=MachineLoad()).start()


def first_facts(config: Config, tokenizer: Tokenizer) -> AutoencoderFacts | None:
    """Facts of a new run's autoencoder: those stored with the weights of `train.init_from`, else measured now."""
    start = config.train.init_from
    stored = (
        checkpoint.stored_facts(checkpoint_of(start))
        if start is not None and config.model.patcher.kind == "vae"
        else None
    )
    return stored or find_facts(config, tokenizer)


def loop(run: Run, resumed: Path | None) -> int:
    """Train to the last step or to a signal; `resumed` is the checkpoint that the run continues from.

    Returns the exit code: 0, or `INTERRUPTED`.
    """
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
            terms = count(data, config.objective.image_loss)
            mine = (*terms, data.positions, data.images, len(data.bad), len(signals), *run.saver.progress)
            totals = Totals(*ranks.sums(mine))
            counts = torch.tensor(totals[:2]).clamp(min=1).to(engine.device)

            engine.begin(lr := learning_rate(settings, step), watched=logged)
            sums = torch.zeros(2, device=engine.device)
            by_time = torch.zeros(2, metrics.BUCKETS, device=engine.device)
            for i, raw in enumerate(data.micro):
                watchdog.phase("forward", step)
                batch = prepare(raw, run.patcher, engine.device, compiled=engine.model.compiled)
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
            if not taken and (restored := recovery.react(run, step, values)):
                stream = run.batches(restored.folder)
                continue
            clock.stop()
            before = progress.position
            progress.advance(data.after, taken, clock.spent)

            run.saver.poll(totals.unwritten, totals.failed)
            outcome = Outcome(step, data, totals, values, lr, by_time, clock, before)
            run.reporter.step(outcome)
            if logged:
                run.reporter.record(outcome, progress)
            else:
                run.log.progress(step, values)
            if totals.signals:
                run.save(must=True)
                run.log.print(f"interrupted: step {step} is saved; the same command continues from it")
                return INTERRUPTED
            if step % settings.save_every == 0 or step == settings.steps:
                run.save(must=step == settings.steps)
            watchdog.phase("sample", step)
            run.probe.show(step)
    run.log.print(
        f"finished at step {progress.step}: {config.run.dir}/checkpoints/latest. "
        f'Next: mmgen sample {config.run.dir} "CAPTION"'
    )
    return 0


@dataclass(frozen=True)
class Start:
    """What a run starts from: settings, processes, tokenizer, facts of its autoencoder, and a checkpoint if any."""

    config: Config
    ranks: Ranks
    tokenizer: Tokenizer
    autoencoder: AutoencoderFacts | None
    resumed: Checkpoint | None
    """The checkpoint that the run continues from; None for a new run."""


def open_run(start: Start, watchdog: Watchdog, heartbeat: Heartbeat) -> Run:
    """Build the parts of a run, restore its checkpoint if it has one, and write config.yaml.

    Raises:
        ValueError, FileNotFoundError: settings, shards and checkpoint do not fit together; no file is changed.
    """
    config, ranks, tokenizer, resumed = start.config, start.ranks, start.tokenizer, start.resumed
    known = [*ema_decays(config.train), "weight"]
    if config.sample.weights not in known:
        raise ValueError(
            f"this run keeps no weights '{config.sample.weights}': set sample.weights to one of {', '.join(known)}"
        )
    heartbeat.begin("indexing shards and planning their order")
    corpus = training_corpus(config, tokenizer, start.autoencoder)
    heartbeat.begin("building the model")
    engine = build_engine(config, len(tokenizer), ranks, start.autoencoder)
    patcher = engine.model.build_patcher()
    patcher.load()  # now, so that a missing autoencoder is an error before the first step
    heartbeat.begin("loading weights")
    progress = Progress(corpus.start)
    if resumed is not None:
        recovery.resume(resumed, engine, progress, corpus.dataset.fingerprint)
        if resumed.state.noise != NOISE:
            ranks.print(f"{resumed.folder} is of an earlier version: the run continues with the noise of this one")
    elif config.train.init_from is not None:
        # All ranks take the checkpoint that rank 0 found, also if the other run is still training.
        found: Path = ranks.gather_objects(checkpoint_of(config.train.init_from))[0]
        for line in start_from(found, engine, tokenizer).lines():
            ranks.print(line)
    heartbeat.begin("opening the run folder")
    check_room(engine)
    if ranks.rank == 0:
        config.run.dir.mkdir(parents=True, exist_ok=True)
        checkpoint.clean(config.run.dir)
        (config.run.dir / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    log = Log(config, progress.step, ranks.rank == 0, heartbeat)
    reporter = Reporter(engine, corpus, log)
    log.print(
        f"{config.run.dir}: steps {progress.step + 1} to {config.train.steps} on {engine.device}, "
        f"{corpus.description}, validation on {shown_shards(config.data.val)}, {'bf16' if engine.bf16 else 'fp32'}"
        + (", compiled in the first step" if engine.model.compiled else "")
        + (f", {ranks.world} processes, ZeRO stage {config.train.zero_stage}" if shard(config) else "")
    )
    saver = Saver(config.run.dir / "checkpoints", engine, tokenizer, log.print)
    probe = Probe(engine, tokenizer, log, watchdog)
    return Run(engine, corpus, patcher, progress, log, reporter, saver, probe, watchdog)


def shown_shards(patterns: Sequence[str | SourceConfig]) -> str:
    """The first pattern of a list of shards and the number of the others, for one line of text."""
    if not patterns:
        return "no data"
    first = patterns[0] if isinstance(patterns[0], str) else patterns[0].shards[0]
    return first + (f" and {len(patterns) - 1} more" if patterns[1:] else "")


def build_engine(config: Config, vocabulary: int, ranks: Ranks, autoencoder: AutoencoderFacts | None = None) -> Engine:
    """The engine for the settings and the number of processes: `Engine`, or `ZeroEngine` if DeepSpeed is needed."""
    if not shard(config):
        return Engine(config, vocabulary, ranks, autoencoder)
    from mmgen.train.zero import ZeroEngine

    return ZeroEngine(config, vocabulary, ranks, autoencoder)


def check_room(engine: Engine) -> None:
    """Raise ValueError if there is too little space for checkpoints or for the batches of loader workers."""
    config, ranks = engine.config, engine.ranks
    state = 4 * sum(f.numel for f in engine.fragments if f.owned) * (3 + len(engine.optimizer.decays))
    positions = -(-config.train.batch_rows // ranks.world) * config.data.row_length
    per_position = 60 + 8 * config.model.patcher.patch_length + config.model.patcher.pixel_length
    check_space(config, int(ranks.sums([state])[0]), positions * per_position)
