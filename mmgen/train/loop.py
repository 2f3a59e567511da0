"""The training loop, in one process on a CPU, a CUDA or an MPS device."""

from __future__ import annotations

import math
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from types import FrameType
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from PIL import Image

from mmgen import picture
from mmgen.config import Config
from mmgen.data.loader import Corpus, Step, steps
from mmgen.data.order import Position
from mmgen.data.shards import read
from mmgen.generate import Decoder, Request
from mmgen.model import MMGenModel, build_model
from mmgen.tokenizer import Tokenizer
from mmgen.train import checkpoint
from mmgen.train.log import Log
from mmgen.train.optimizer import averaged_weights, build_optimizer, learning_rate

INTERRUPTED = 75
"""Exit code after SIGINT or SIGTERM: a checkpoint was written and the same command continues (EX_TEMPFAIL)."""
SAMPLES = 12


def train(config: Config) -> int:
    """Train, or continue, the run in `run.dir`; returns the exit code (0, or `INTERRUPTED`).

    Raises:
        ValueError, FileNotFoundError: settings, shards, tokenizer or checkpoint do not fit; nothing is changed.
        FloatingPointError: the loss or the gradient stopped being finite; no checkpoint is written.
    """
    accelerator = Accelerator(mixed_precision="bf16" if uses_bf16(config) else "no")
    world = max(accelerator.num_processes, int(os.environ.get("WORLD_SIZE", "1")))
    rank, device = accelerator.process_index, accelerator.device
    if world != 1:
        raise ValueError(f"this version trains in one process, but {world} were started")
    settings, run = config.train, config.run.dir
    torch.manual_seed(config.run.seed)
    tokenizer = Tokenizer.load(config.data.tokenizer, config.model.patcher.grids)
    model = build_model(config, len(tokenizer))
    found = checkpoint.latest(run)
    trainer: dict[str, Any] = {"step": 0, "train_seconds": 0.0, "position": Position().as_dict()}
    if found:
        trainer = checkpoint.read_trainer(found)
        checkpoint.check_same_run(trainer, config, tokenizer, found)
        if trainer["step"] >= settings.steps:
            print(f"{run} is trained: {trainer['step']} of {settings.steps} steps (raise train.steps to go on)")
            return 0
    corpus = Corpus(config.data.train, tokenizer, config)
    optimizer = build_optimizer(model, settings)
    prepared, prepared_optimizer = accelerator.prepare(model, optimizer)
    if found:
        checkpoint.restore(found, model, optimizer)
    compiled = settings.compile and can_compile(device)
    if compiled:
        model.compile_backbone()
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    first, seconds = trainer["step"], trainer["train_seconds"]
    log = Log(run, first, settings.steps, settings.tensorboard)
    known_bad = log.quarantine(corpus.bad)
    log.say(
        f"{run}: steps {first + 1} to {settings.steps} on {device}, {len(corpus.samples)} samples, "
        f"{'bf16 autocast' if accelerator.mixed_precision == 'bf16' else 'fp32'}{', compiled' if compiled else ''}"
    )
    prompts = sample_prompts(config)
    began = time.monotonic()
    position = checkpoint.position_of(trainer)

    def save(step: int) -> None:
        record = {
            "position": position.as_dict(),
            "train_seconds": seconds + time.monotonic() - began,
            "optimizer_steps": step,
        }
        checkpoint.save(run / "checkpoints", step, model, optimizer, tokenizer, config, record)

    stream = steps(corpus, first, settings.steps, position, rank, world)
    prepared.train()
    with interruptible() as interrupted:
        for step in range(first + 1, settings.steps + 1):
            started = time.monotonic()
            data = next(stream)
            waited = time.monotonic() - started
            known_bad = log.quarantine(data.bad) if data.bad else known_bad
            refuse_bad_data(known_bad, corpus, config)

            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, step)
            counts = accelerator.reduce(count(data, device), reduction="sum").clamp(min=1)
            sums = torch.zeros(2, device=device)
            for batch in data.micro:
                losses = prepared(batch.to(device))
                parts = torch.stack([losses.text, losses.image]) / counts
                accelerator.backward((parts[0] + config.objective.lambda_image * parts[1]) * world)
                sums += parts.detach()
            norm = accelerator.clip_grad_norm_(prepared.parameters(), settings.clip_norm)
            text, image = accelerator.reduce(sums, reduction="sum").tolist()
            loss = text + config.objective.lambda_image * image
            refuse_non_finite(step, loss=loss, text=text, image=image, grad_norm=float(norm))
            prepared_optimizer.step()
            prepared_optimizer.zero_grad()
            position = data.after

            log.advance(step)
            if step % settings.log_every == 0 or step in (1, settings.steps):
                spent = time.monotonic() - started
                log.record(step, {
                    "loss": loss, "loss/text": text, "loss/image": image, "lr": learning_rate(settings, step),
                    "grad_norm": float(norm), "tokens_per_s": data.positions / spent,
                    "images_per_s": data.images / spent, "data_wait": waited / spent,
                })  # fmt: skip
            if interrupted:
                save(step)
                log.say(f"interrupted: step {step} is saved, the same command continues from it")
                log.close()
                return INTERRUPTED
            if step % settings.save_every == 0 or step == settings.steps:
                save(step)
            if prompts and (
                step == settings.first_sample or (settings.sample_every and step % settings.sample_every == 0)
            ):
                with averaged_weights(optimizer):
                    drawn = draw(Decoder(model, tokenizer, config.sample), prompts)
                path = run / "samples" / f"step-{step}.png"
                picture.save(drawn, path)
                log.say(f"samples: {path}")
    if config.data.val:
        with averaged_weights(optimizer):
            text, image = validate(model, Corpus(config.data.val, tokenizer, config))
        log.record(settings.steps, {"val_loss/text": text, "val_loss/image": image})
    log.close()
    return 0


def count(step: Step, device: torch.device) -> torch.Tensor:
    """[text targets, learned patches] of this process's micro-batches."""
    text = sum(len(batch.label_at_L) for batch in step.micro)
    image = sum(len(batch.loss_at_J) for batch in step.micro)
    return torch.tensor([text, image], dtype=torch.float32, device=device)


@torch.no_grad()
def validate(model: MMGenModel, corpus: Corpus) -> tuple[float, float]:
    """(cross-entropy per text target in nats, image loss per entry) over one epoch of a corpus, with fixed noise."""
    device, training = model.device, model.training
    model.eval()
    sums = torch.zeros(2)
    counts = torch.zeros(2)
    rows = corpus.plan.epoch_rows(0)
    number = 0
    while chunk := list(islice(rows, corpus.config.train.batch_rows)):
        step = corpus.step(number, chunk, Position())
        for batch in step.micro:
            losses = model(batch.to(device))
            sums += torch.stack([losses.text, losses.image]).cpu()
        counts += count(step, torch.device("cpu"))
        number += 1
    model.train(training)
    text, image = (sums / counts.clamp(min=1)).tolist()
    return text, image


def sample_prompts(config: Config) -> list[str]:
    """The first captions of the validation shards: the fixed prompts of a run's sample grids."""
    if not config.data.val:
        return []
    return [sample.caption for sample in islice(read(config.data.val, bad=[]), SAMPLES) if sample.caption]


def draw(decoder: Decoder, captions: list[str]) -> Image.Image:
    """One image per caption, seeds 0, 1, ..., as a grid."""
    results = decoder.generate([Request([caption], "image", seed) for seed, caption in enumerate(captions)])
    return picture.grid([result.images[0] for result in results], captions)


def uses_bf16(config: Config) -> bool:
    """Whether autocast runs in bf16: as set, or where the hardware multiplies it natively."""
    if config.train.precision == "auto":
        if torch.cuda.is_available():
            return bool(torch.cuda.is_bf16_supported())
        return not torch.backends.mps.is_available() and bool(torch.cpu._is_amx_tile_supported())
    return config.train.precision == "bf16"


def can_compile(device: torch.device) -> bool:
    """Whether `torch.compile` can work here; on a CPU it needs a C++ compiler."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    return device.type != "cpu" or compiler is not None


def refuse_non_finite(step: int, **values: float) -> None:
    """Stop the run at a value that is not finite, naming it."""
    wrong = [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]
    if wrong:
        raise FloatingPointError(
            f"step {step}: {', '.join(wrong)}. The last checkpoint is as it was; lower train.lr or train.clip_norm, "
            "or look at the data of this step"
        )


def refuse_bad_data(bad: int, corpus: Corpus, config: Config) -> None:
    """Stop the run where more samples are unreadable than `data.max_bad_fraction` allows."""
    total = len(corpus.samples) + len(corpus.bad)
    if bad > config.data.max_bad_fraction * total:
        raise ValueError(
            f"{bad} of {total} samples cannot be read, more than data.max_bad_fraction {config.data.max_bad_fraction}: "
            f"see {config.run.dir / 'quarantine.jsonl'}"
        )


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """A list that receives SIGINT or SIGTERM; a second SIGINT acts at once."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
