"""Validation losses and sample grids of a run in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch
from PIL import Image

from mmgen.config import Config
from mmgen.data.documents import Share
from mmgen.data.loader import Corpus
from mmgen.data.order import Position
from mmgen.data.shards.samples import read
from mmgen.generate.decoder import Decoder, Request
from mmgen.image import sheet
from mmgen.model import Losses, MMGenModel
from mmgen.sequence.batch import Batch, prepare
from mmgen.sequence.tokenizer import Tokenizer
from mmgen.train import metrics
from mmgen.train.engine import Engine
from mmgen.train.log import Log
from mmgen.train.ranks import Ranks

SAMPLES = 12


@torch.no_grad()
def held_out(model: MMGenModel, corpus: Corpus, ranks: Ranks) -> Iterator[tuple[Batch, Losses]]:
    """Yield this rank's part of each batch of one epoch of a corpus, with its losses; noise is fixed."""
    training = model.training
    model.eval()
    rows, patcher = corpus.plan.epoch_rows(0), model.build_patcher()
    number = 0
    while chunk := list(islice(rows, corpus.config.train.batch_rows)):
        for raw in corpus.step(number, chunk, Position(), Share(ranks.rank, ranks.world)).micro:
            batch = prepare(raw, patcher, model.device)
            yield batch, model(batch)
        number += 1
    model.train(training)


def validation(
    model: MMGenModel, corpus: Corpus, ranks: Ranks, count: Callable[[str], None] = lambda done: None
) -> dict[str, float]:
    """Losses over one epoch of a corpus with fixed noise; each rank computes its share of every step.

    Returns `val_loss/text` in nats per text target, `val_loss/image` per learned patch, and the image loss per range
    of t. `count` receives the number of batches that are done, as text.
    """
    sums = torch.zeros(4, device=model.device)
    times = torch.zeros(2, metrics.BUCKETS, device=model.device)
    for number, (batch, losses) in enumerate(held_out(model, corpus, ranks), 1):
        count(f"{number} batches")
        counts = [losses.text.new_tensor(float(n)) for n in (losses.text_count, losses.image_count)]
        sums += torch.stack([losses.text, losses.image, *counts])
        times += metrics.by_time(batch, losses)
    text, image, texts, images = ranks.total(sums).tolist()
    means = {"val_loss/text": text / max(texts, 1), "val_loss/image": image / max(images, 1)}
    return means | metrics.time_losses(ranks.total(times), "val_loss")


def sample_prompts(config: Config) -> list[str]:
    """The prompts of a run's sample grids: the first captions of the validation shards, else of the training shards."""
    shards = config.data.val or config.data.train
    return [sample.caption for sample in islice(read(shards, bad=[]), SAMPLES) if sample.caption]


def draw(decoder: Decoder, captions: list[str]) -> Image.Image:
    """A grid of one image per caption, with seeds 0, 1, ..."""
    results = decoder.generate([Request([caption], "image", seed) for seed, caption in enumerate(captions)])
    return sheet.grid([result.images[0] for result in results], captions)


class Probe:
    """Draws sample grids and computes validation losses with averaged weights, at the steps where they are due."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, log: Log) -> None:
        self.engine, self.tokenizer, self.log = engine, tokenizer, log

    @cached_property
    def prompts(self) -> list[str]:
        """The prompts of the sample grids, read when the first grid is due."""
        return sample_prompts(self.engine.config)

    def show(self, step: int) -> None:
        """Draw and validate after a step if due; every rank must call this."""
        config, settings = self.engine.config, self.engine.config.train
        due = step == settings.first_sample or (settings.sample_every and step % settings.sample_every == 0)
        if due and self.prompts:
            self.log.heartbeat.begin(f"drawing samples of step {step}")
            path = config.run.dir / "samples" / f"step-{step}.png"
            self._draw(path)
            self.log.print(f"samples: {path}")
        due = step == settings.steps or (settings.val_every and step % settings.val_every == 0)
        if config.data.val and due:
            self.log.heartbeat.begin(f"validation of step {step}")
            corpus = Corpus(config.data.val, self.tokenizer, config, self.engine.model.autoencoder)
            with self.engine.averaged(config.sample.weights):
                losses = validation(self.engine.model, corpus, self.engine.ranks, self.log.heartbeat.count)
            self.log.record(step, losses)
            self.log.print(
                f"validation of step {step}: loss/text {losses['val_loss/text']:.4g}  "
                f"loss/image {losses['val_loss/image']:.4g}"
            )

    def _draw(self, path: Path) -> None:
        """Draw on rank 0; under stage 3 every rank draws, because each call gathers weights from all of them."""
        config, rank = self.engine.config, self.engine.ranks.rank
        with self.engine.averaged(config.sample.weights):
            if rank == 0 or config.train.zero_stage == 3:
                drawn = draw(Decoder(self.engine.model, self.tokenizer, config.sample), self.prompts)
                if rank == 0:
                    sheet.save(drawn, path)
