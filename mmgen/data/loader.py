"""Global steps: planned rows, decoded, written and collated, ahead of the model."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mmgen.config import Config
from mmgen.data.order import Plan, PlannedDocument, PlannedRow, Position, chances, keyed
from mmgen.data.shards import BadSample, Sample, open_image, read
from mmgen.flow.time import stratified
from mmgen.objective import ImageSite, objective_class
from mmgen.patch import Grid, Levels, PixelPatcher
from mmgen.sequence import Batch, ImageSegment, Strip, TextSegment, Writer, collate
from mmgen.tokenizer import Tokenizer

Form = Literal["caption first", "image first", "caption dropped", "no image"]
CACHE_BYTES = 256 * 2**20
"""Decoded images that each loader process keeps."""


@dataclass
class Step:
    """This process's share of one global step."""

    number: int
    micro: list[Batch]
    after: Position
    """Where the run stands once this step is done."""
    documents: int
    positions: int
    """Positions of real documents, padding not counted."""
    images: int
    bad: list[dict[str, str]] = field(default_factory=list)
    """Samples that could not be decoded: shard, key, reason."""


class Corpus:
    """All samples of a list of shards in memory, still encoded, with what planning needs to know of them.

    Decoding and every random draw happen per document and depend on (seed, epoch, shard, key) alone.
    """

    def __init__(self, patterns: Sequence[str], tokenizer: Tokenizer, config: Config) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.patcher = PixelPatcher(config.model.patcher)
        self.objective = objective_class(config.objective)
        self.bad: list[dict[str, str]] = []
        self.samples: list[Sample] = []
        self._ids: list[list[int]] = []
        self._grids: list[Grid | None] = []
        read_samples = list(read(patterns, self.bad))
        captions = tokenizer.encode_batch([sample.caption for sample in read_samples])
        for sample, ids in zip(read_samples, captions, strict=True):
            try:
                grid = self._grid(sample)
            except BadSample as error:
                self.bad.append({"shard": sample.shard, "key": sample.key, "reason": str(error)})
                continue
            self.samples.append(sample)
            self._grids.append(grid)
            self._ids.append(self._fit(sample, ids, grid))
        if not self.samples:
            why = f": the first of {len(self.bad)} bad ones is {self.bad[0]}" if self.bad else ""
            raise ValueError(f"no usable sample in {', '.join(patterns)}{why}")
        self.plan = Plan(config.run.seed, config.data.window, config.data.row_length, len(self.samples), self.length)
        largest = max(height * width for height, width in config.model.patcher.image_sizes)
        self._cache: dict[int, Levels] = {}
        self._cache_size = CACHE_BYTES // (largest * config.model.patcher.channels)

    def _grid(self, sample: Sample) -> Grid | None:
        """Patch grid of a sample's image, decoded only where several sizes are declared; raises `BadSample`."""
        grids = self.config.model.patcher.grids
        if sample.image is None or len(grids) == 1:
            return grids[0] if sample.image is not None else None
        image = self.patcher.fit(open_image(sample.image))
        side = self.config.model.patcher.patch_size
        return image.height // side, image.width // side

    def _around(self, grid: Grid | None) -> int:
        """Positions of a document beside its text."""
        copies = self.objective.copies(self.config.objective)
        return 2 + (0 if grid is None else 3 + copies * grid[0] * grid[1])

    def _fit(self, sample: Sample, ids: list[int], grid: Grid | None) -> list[int]:
        length = self._around(grid) + len(ids)
        spare = length - self.config.data.row_length
        if spare <= 0:
            return ids
        if self.config.data.overlong == "refuse" or spare > len(ids):
            raise ValueError(
                f"sample {sample.name} needs {length} positions but data.row_length is {self.config.data.row_length}: "
                "lengthen the row, shorten the caption, or set data.overlong to truncate"
            )
        return ids[:-spare]

    def form(self, epoch: int, index: int) -> Form:
        """How this sample is told in this epoch: decided before packing, by its own key."""
        sample, data = self.samples[index], self.config.data
        if sample.image is None:
            return "no image"
        if not sample.caption:
            return "caption dropped"
        flip, drop = chances(self.config.run.seed, epoch, sample.shard, sample.key, "form")
        if flip < data.image_first:
            return "image first"
        return "caption dropped" if drop < data.caption_drop else "caption first"

    def length(self, epoch: int, index: int) -> int:
        """Positions of the document in this epoch."""
        text = 0 if self.form(epoch, index) == "caption dropped" else len(self._ids[index])
        return self._around(self._grids[index]) + text

    def write(self, planned: PlannedDocument, quantile: float | None) -> Strip:
        """Decode one document and write it; `quantile` is its stratified draw for t. Raises `BadSample`."""
        epoch, index = planned.epoch, planned.index
        sample, form, grid = self.samples[index], self.form(epoch, index), self._grids[index]
        text = TextSegment(self._ids[index])
        if sample.image is None or grid is None:
            return Writer(self.tokenizer).document([text])
        x_NP = self.patcher.scale(self._levels(index))
        rng = keyed(self.config.run.seed, epoch, sample.shard, sample.key, "noise")
        quantile = rng.random() if quantile is None else quantile
        site = ImageSite(grid, x_NP.shape[1], form == "caption first", form == "image first", quantile)
        image = ImageSegment(x_NP, grid, self.objective.layout(self.config.objective, site, rng))
        documents: dict[Form, list[TextSegment | ImageSegment]] = {
            "caption first": [text, image],
            "image first": [image, text],
            "caption dropped": [image],
        }
        return Writer(self.tokenizer).document(documents[form])

    def _levels(self, index: int) -> Levels:
        """Decoded patch rows; the first images are kept, so that a small corpus is decoded once."""
        if index in self._cache:
            return self._cache[index]
        image, grid = self.samples[index].image, self._grids[index]
        assert image is not None
        levels_NP, found = self.patcher.levels(open_image(image))
        if found != grid:
            raise BadSample(f"the image has grid {found}, planned was {grid}")
        if len(self._cache) < self._cache_size:
            self._cache[index] = levels_NP
        return levels_NP

    def has_image(self, index: int) -> bool:
        """Whether the sample holds an image."""
        return self.samples[index].image is not None

    def batch(self, rows: Sequence[Sequence[Strip | int]]) -> Batch:
        """Collate written rows."""
        length = self.config.model.patcher.patch_length
        nothing = self.objective.context(self.config.objective, (0, 0), length)
        return collate(rows, self.config.data.row_length, self.tokenizer, nothing, length)

    def step(self, number: int, rows: Sequence[PlannedRow], after: Position, rank: int = 0, world: int = 1) -> Step:
        """Decode the share of `rank` in a global step: rows rank, rank + world, ..."""
        settings, step = self.config, Step(number, [], after, 0, 0, 0)
        total = sum(self.has_image(document.index) for row in rows for document in row)
        shared, _ = chances(settings.run.seed, "t", number)
        ordinal = 0
        written: list[list[Strip | int]] = []
        for r, row in enumerate(rows):
            mine = r % world == rank
            strips: list[Strip | int] = []
            for document in row:
                image = self.has_image(document.index)
                if mine:
                    even = stratified(shared, ordinal, total) if image and settings.objective.time.stratified else None
                    strips.append(self._write_or_leave(document, even, step))
                    step.images += image
                ordinal += image
            if mine:
                written.append(strips)
                step.documents += len(row)
                step.positions += sum(document.length for document in row)
        share = -(-settings.train.batch_rows // world)
        micro = min(settings.train.micro_rows or share, share)
        steps = -(-settings.train.batch_rows // (world * micro))
        written += [[] for _ in range(steps * micro - len(written))]
        step.micro = [self.batch(written[i * micro : (i + 1) * micro]) for i in range(steps)]
        return step

    def _write_or_leave(self, document: PlannedDocument, quantile: float | None, step: Step) -> Strip | int:
        try:
            return self.write(document, quantile)
        except BadSample as error:
            sample = self.samples[document.index]
            step.bad.append({"shard": sample.shard, "key": sample.key, "reason": str(error)})
            return document.length


class _Stream(IterableDataset[Step]):
    """Steps from a position on; worker w of W makes steps w, w + W, ..."""

    def __init__(self, corpus: Corpus, first: int, last: int, start: Position, rank: int, world: int) -> None:
        self.corpus, self.first, self.last, self.start, self.rank, self.world = corpus, first, last, start, rank, world

    def __iter__(self) -> Iterator[Step]:
        worker = get_worker_info()
        lane, lanes = (worker.id, worker.num_workers) if worker else (0, 1)
        source = self.corpus.plan.rows(self.start)
        for number in range(self.first, self.last):
            planned = [next(source) for _ in range(self.corpus.config.train.batch_rows)]
            if (number - self.first) % lanes == lane:
                rows = [row for row, _ in planned]
                yield self.corpus.step(number, rows, planned[-1][1], self.rank, self.world)


def steps(corpus: Corpus, first: int, last: int, start: Position, rank: int = 0, world: int = 1) -> Iterator[Step]:
    """Global steps [first, last) of a run that stands at `start`, decoded ahead in `data.workers` processes."""
    stream = _Stream(corpus, first, last, start, rank, world)
    workers = corpus.config.data.workers
    options: dict[str, Any] = {"prefetch_factor": 4, "worker_init_fn": _ignore_interrupt} if workers else {}
    return iter(DataLoader(stream, batch_size=None, num_workers=workers, **options))


def _ignore_interrupt(worker: int) -> None:
    """Signals reach the whole process group; only the training process answers, and ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
