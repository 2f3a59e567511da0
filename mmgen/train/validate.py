"""What a run shows while it trains: validation losses and sample grids."""

from __future__ import annotations

from collections.abc import Iterator
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
    """Each batch of one epoch of a corpus and its losses, with fixed noise; a rank gets its share of every step."""
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


def validation(model: MMGenModel, corpus: Corpus, ranks: Ranks) -> dict[str, float]:
    """Losses over one epoch of a corpus with fixed noise, each rank taking a share of every step.

    `val_loss/text` in nats per text target, `val_loss/image` per entry, and that per range of t.
    """
    sums = torch.zeros(4, device=model.device)
    times = torch.zeros(2, metrics.BUCKETS, device=model.device)
    for batch, losses in held_out(model, corpus, ranks):
        counts = [losses.text.new_tensor(float(n)) for n in (losses.text_count, losses.image_count)]
        sums += torch.stack([losses.text, losses.image, *counts])
        times += metrics.by_time(batch, losses)
    text, image, texts, images = ranks.total(sums).tolist()
    found = {"val_loss/text": text / max(texts, 1), "val_loss/image": image / max(images, 1)}
    return found | metrics.time_losses(ranks.total(times), "val_loss")


def sample_prompts(config: Config) -> list[str]:
    """The first captions of the validation shards: the fixed prompts of a run's sample grids."""
    if not config.data.val:
        return []
    return [sample.caption for sample in islice(read(config.data.val, bad=[]), SAMPLES) if sample.caption]


def draw(decoder: Decoder, captions: list[str]) -> Image.Image:
    """One image per caption, seeds 0, 1, ..., as a grid."""
    results = decoder.generate([Request([caption], "image", seed) for seed, caption in enumerate(captions)])
    return sheet.grid([result.images[0] for result in results], captions)


class Probe:
    """Sample grids and validation losses of a run, with averaged weights, at the steps where they are due."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, log: Log) -> None:
        self.engine, self.tokenizer, self.log = engine, tokenizer, log
        self.prompts = sample_prompts(engine.config)

    def show(self, step: int) -> None:
        """Draw and validate where it is due after a step; every rank calls this alike."""
        config, settings = self.engine.config, self.engine.config.train
        due = step == settings.first_sample or (settings.sample_every and step % settings.sample_every == 0)
        if self.prompts and due:
            path = config.run.dir / "samples" / f"step-{step}.png"
            self._draw(path)
            self.log.say(f"samples: {path}")
        due = step == settings.steps or (settings.val_every and step % settings.val_every == 0)
        if config.data.val and due:
            corpus = Corpus(config.data.val, self.tokenizer, config, self.engine.model.autoencoder)
            with self.engine.averaged(config.sample.weights):
                self.log.record(step, validation(self.engine.model, corpus, self.engine.ranks))

    def _draw(self, path: Path) -> None:
        """Under stage 3 all ranks must call the model alike."""
        config, rank = self.engine.config, self.engine.ranks.rank
        with self.engine.averaged(config.sample.weights):
            if rank == 0 or config.train.zero_stage == 3:
                drawn = draw(Decoder(self.engine.model, self.tokenizer, config.sample), self.prompts)
                if rank == 0:
                    sheet.save(drawn, path)
