"""Validation losses and sample grids of a run in training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mmgen.config import Config
from mmgen.data.documents import Share
from mmgen.data.loader import Corpus
from mmgen.data.order import Position
from mmgen.data.shards.samples import read
from mmgen.data.views import GRID, KINDS, TEXT, ViewBatch, Views, validation_corpus
from mmgen.generate.decoder import Decoder, Request
from mmgen.image import sheet
from mmgen.image.patch import Patcher
from mmgen.model import Losses, MMGenModel
from mmgen.sequence.batch import Batch, prepare
from mmgen.sequence.tokenizer import Tokenizer
from mmgen.train import metrics
from mmgen.train.engine import Engine
from mmgen.train.estimate import Estimate, estimate, moments
from mmgen.train.guard import Watchdog
from mmgen.train.log import Log
from mmgen.train.ranks import Ranks

SAMPLES = 12
CHUNK = 64
"""Number of samples whose documents are packed together in validation. It does not depend on the run."""
NAMES = ("image_fixed_t", *TEXT, *(f"image_fixed_t{t:g}" for t in GRID))
"""Names of the losses of `fixed_losses`: the mean over the grid of times, kinds of text, and each time of the grid."""


@dataclass(frozen=True)
class FixedLosses:
    """Losses of fixed documents at fixed times with fixed noise: of all sources, and of each named one."""

    whole: dict[str, Estimate]
    """A name of `NAMES` to its loss. Kinds that no document has are left out."""
    sources: dict[str, dict[str, Estimate]]
    """The same for each named source, without the single times."""

    def flat(self, prefix: str) -> dict[str, float]:
        """The values under `PREFIX + NAME` and `PREFIX + NAME/SOURCE`, each with `_low` and `_high`."""
        flat: dict[str, float] = {}
        for name, whole in self.whole.items():
            flat |= whole.flat(prefix + name)
        for source, losses in self.sources.items():
            for name, loss in losses.items():
                flat |= loss.flat(f"{prefix}{name}/{source}")
        return flat


@torch.no_grad()
def held_out(model: MMGenModel, corpus: Corpus, ranks: Ranks) -> Iterator[tuple[Batch, Losses]]:
    """Yield this rank's part of each batch of one epoch of a corpus, with its losses.

    Forms, context and t are drawn as in training, with the seed of the corpus.
    """
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
    """Losses over one epoch of a corpus, drawn as in training; each rank computes its share of every step.

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


@torch.no_grad()
def fixed_losses(
    model: MMGenModel, corpus: Corpus, ranks: Ranks, count: Callable[[int], None] = lambda done: None
) -> FixedLosses:
    """Losses with context as at inference, of each image at eight times, and of each kind of text apart.

    Equal weights give equal losses up to rounding, whatever the seed, the context policy, the shares of forms, the
    batch size or the number of processes are. Each rank scores every `world`-th chunk of samples, and only sums over
    documents are exchanged. `count` receives the number of samples that are done.
    """
    training = model.training
    model.eval()
    settings, patcher = corpus.config.train, model.build_patcher()
    views = Views(corpus, patcher)
    share = -(-settings.batch_rows // ranks.world)
    rows = min(settings.micro_rows or share, share)
    ends = torch.tensor(corpus.dataset.counts).cumsum(0)
    table = torch.zeros(len(ends), 6, len(NAMES), dtype=torch.float64)
    total = len(corpus.samples)
    for turn in range(math.ceil(total / (CHUNK * ranks.world))):
        first = min((turn * ranks.world + ranks.rank) * CHUNK, total)
        samples = range(first, min(first + CHUNK, total))
        batches = views.batches(samples, rows)
        if ranks.world > 1:  # ZeRO-3 gathers weights in each forward pass, so all ranks need the same number of them
            (most,) = ranks.maxima([len(batches)])
            batches += [views.empty(rows)] * (int(most) - len(batches))
        sums, counts = torch.zeros(2, len(samples), KINDS, dtype=torch.float64)
        for batch in batches:
            add_losses(model, patcher, batch, sums, counts)
        source = torch.searchsorted(ends, torch.arange(samples.start, samples.stop), right=True)
        for number in source.unique().tolist():
            here = source == number
            table[number] += moments(_columns(sums[here]), _columns(counts[here]))
        count(min((turn + 1) * CHUNK * ranks.world, total))
    model.train(training)
    table = torch.tensor(ranks.sums(table.flatten().tolist()), dtype=torch.float64).view_as(table)
    columns = len(NAMES) if len(views.times) > 1 else 1 + len(TEXT)
    named = {name: table[i] for i, name in enumerate(corpus.dataset.names) if name is not None}
    return FixedLosses(
        _estimates(table.sum(0), columns),
        {name: _estimates(part, 1 + len(TEXT)) for name, part in named.items()},
    )


def add_losses(model: MMGenModel, patcher: Patcher, views: ViewBatch, sums: Tensor, counts: Tensor) -> None:
    """Add the losses of a batch of views, and the number of their terms, per sample and kind [D, KINDS]."""
    batch = prepare(views.raw, patcher, model.device)
    losses = model(batch)
    assert losses.text_L is not None
    cell = views.cell_BS.flatten()
    patch_at = views.raw.at_I[views.raw.loss_at_J]
    at = torch.cat([cell[views.raw.label_at_L + 1], cell[patch_at]])
    terms = torch.cat([losses.text_L.cpu().double(), losses.image_J.cpu().double()])
    scored = at < sums.numel()
    sums.view(-1).index_add_(0, at[scored], terms[scored])
    counts.view(-1).index_add_(0, at[scored], torch.ones_like(terms[scored]))


def _columns(kinds_DK: Tensor) -> Tensor:
    """Sums per kind [D, KINDS] to those per name of `NAMES` [D, C]."""
    return torch.cat([kinds_DK[:, len(TEXT) :].sum(1, keepdim=True), kinds_DK], dim=1)


def _estimates(table_6C: Tensor, columns: int) -> dict[str, Estimate]:
    found = {name: estimate(table_6C[:, column]) for column, name in enumerate(NAMES[:columns])}
    return {name: value for name, value in found.items() if value is not None}


def sample_prompts(config: Config) -> list[str]:
    """The prompts of a run's sample grids: the first captions of the validation shards, else of the training shards."""
    shards = config.data.val or config.data.train
    return [sample.caption for sample in islice(read(shards, [], config.data), SAMPLES) if sample.caption]


def draw(decoder: Decoder, captions: list[str]) -> Image.Image:
    """A grid of one image per caption, with seeds 0, 1, ..."""
    results = decoder.generate([Request([caption], "image", seed) for seed, caption in enumerate(captions)])
    return sheet.grid([result.images[0] for result in results], captions)


class Probe:
    """Draws sample grids and computes validation losses with averaged weights, at the steps where they are due."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, log: Log, watchdog: Watchdog) -> None:
        self.engine, self.tokenizer, self.log, self.watchdog = engine, tokenizer, log, watchdog

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
            model, ranks = self.engine.model, self.engine.ranks
            corpus = validation_corpus(config, self.tokenizer, model.autoencoder)
            with self.engine.averaged(config.sample.weights):
                losses = validation(model, corpus, ranks, self.count)
                fixed = fixed_losses(model, corpus, ranks, lambda done: self.count(f"{done} samples"))
            self.log.record(step, losses | fixed.flat("val_loss/"))
            means = {"text": losses["val_loss/text"], "image": losses["val_loss/image"]}
            means |= {name: loss.mean for name, loss in fixed.whole.items() if name in NAMES[: 1 + len(TEXT)]}
            shown = "  ".join(f"loss/{name} {mean:.4g}" for name, mean in means.items())
            self.log.print(f"validation of step {step}: {shown}")

    def count(self, done: str) -> None:
        """Show progress, and restart the clock of the watchdog: a validation may last longer than `train.timeout`."""
        self.log.heartbeat.count(done)
        self.watchdog.restart()

    def _draw(self, path: Path) -> None:
        """Draw on rank 0; under stage 3 every rank draws, because each call gathers weights from all of them."""
        config, rank = self.engine.config, self.engine.ranks.rank
        with self.engine.averaged(config.sample.weights):
            if rank == 0 or config.train.zero_stage == 3:
                drawn = draw(Decoder(self.engine.model, self.tokenizer, config.sample), self.prompts)
                if rank == 0:
                    sheet.save(drawn, path)
