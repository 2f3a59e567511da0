"""Global steps: planned rows, decoded, written and collated, ahead of the model."""

from __future__ import annotations

import os
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mmgen.config import Config
from mmgen.data.dataset import DROPPED, IMAGE_FIRST, Dataset, Samples
from mmgen.data.order import Cursors, Mixture, Plan, PlannedDocument, PlannedRow, Position, chances, keyed
from mmgen.data.shards import store
from mmgen.data.shards.samples import Bad, BadSample, Picture, Sample, open_image, open_latent
from mmgen.data.shards.store import Patterns
from mmgen.flow.time import stratified
from mmgen.image.latent import AutoencoderFacts, LatentPatcher, build_patcher
from mmgen.image.patch import Floats, Grid
from mmgen.image.resize import CENTRE, draft, fit
from mmgen.objective import ImageSite, build_layout
from mmgen.sequence.batch import RawBatch, RowFormat, collate
from mmgen.sequence.document import Document, ImageSegment, Strip, TextSegment, Writer
from mmgen.sequence.tokenizer import Tokenizer

Form = Literal["as told", "caption first", "image first", "caption dropped"]
FORMS: tuple[Form, ...] = ("as told", "caption first", "image first", "caption dropped")
FETCHERS = 16
"""Samples of a remote store that are fetched at the same time."""


@dataclass
class Step:
    """This process's share of one global step."""

    number: int
    micro: list[RawBatch]
    after: Position | Cursors
    """Where the run stands once this step is done."""
    documents: int
    positions: int
    """Positions of real documents, padding not counted."""
    images: int
    bad: list[Bad] = field(default_factory=list)
    """Samples that could not be decoded: shard, key, reason."""

    def pin_memory(self) -> Step:
        """Move the batches to page-locked memory, from where a GPU copies while it computes."""
        self.micro = [batch.pin_memory() for batch in self.micro]
        return self


Decoded = list[list[int] | tuple[NDArray[Any], Grid]]
"""Segments of a sample: token ids, or rows of pixels in 0..255 (patch rows of a latent) and their grid."""


class Documents(ABC):
    """Samples written as documents, one at a time.

    Decoding and every random draw happen per document and depend on (seed, epoch, shard, key) alone.
    """

    def __init__(self, tokenizer: Tokenizer, config: Config, autoencoder: AutoencoderFacts | None = None) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.patcher = build_patcher(config.model.patcher, facts=autoencoder)
        self.layout = build_layout(config.objective, config.model.patcher)

    @abstractmethod
    def segments(self, planned: PlannedDocument) -> tuple[tuple[str, str], Decoded]:
        """(shard, key), and tokens and patch rows, of a planned document; raises `BadSample`."""

    @property
    @abstractmethod
    def unencoded(self) -> bool:
        """Batches carry pixels, which `prepare` scales or encodes, and not precomputed patches."""

    @abstractmethod
    def name(self, planned: PlannedDocument) -> tuple[str, str]:
        """Name of its shard, and key, of a planned document."""

    @abstractmethod
    def steps(self, first: int, last: int, start: Any, rank: int, world: int) -> Iterator[Step]:
        """Global steps [first, last) of a run that stands at `start`, decoded ahead in `data.workers` processes."""

    @abstractmethod
    def first_step(self, rank: int = 0, world: int = 1) -> Step:
        """The share of `rank` in a run's first global step, made in this process: for who measures or inspects one."""

    def document(self, planned: PlannedDocument, quantiles: Sequence[float] | None) -> Document:
        """Decode one document; `quantiles` are the stratified draws for t of its images. Raises `BadSample`."""
        epoch = planned.epoch
        (shard, key), decoded = self.segments(planned)
        told = list(decoded)
        if planned.form == IMAGE_FIRST:
            told.reverse()
        if planned.form == DROPPED:
            last = max(i for i, segment in enumerate(told) if isinstance(segment, tuple))
            told = [segment for i, segment in enumerate(told) if i > last or isinstance(segment, tuple)]
        told = self._cut(told, planned.length)
        texts = [i for i, segment in enumerate(told) if not isinstance(segment, tuple)]
        document: list[TextSegment | ImageSegment] = []
        image = 0
        for i, segment in enumerate(told):
            if not isinstance(segment, tuple):
                document.append(TextSegment(segment))
                continue
            x_NP, grid = segment
            rng = keyed(self.config.run.seed, epoch, shard, key, "noise", image)
            quantile = rng.random() if quantiles is None else quantiles[image]
            before, after = bool(texts) and texts[0] < i, bool(texts) and texts[-1] > i
            site = ImageSite(grid, before, after, quantile)
            document.append(ImageSegment(x_NP, grid, self.layout.blocks(site, rng)))
            image += 1
        return document

    def write(self, planned: PlannedDocument, quantiles: Sequence[float] | None) -> Strip:
        """Decode one document and write it. Raises `BadSample`."""
        strip = Writer(self.tokenizer).document(self.document(planned, quantiles))
        if len(strip) != planned.length:
            raise BadSample(f"its document has {len(strip)} positions, planned were {planned.length}")
        return strip

    def _cut(self, told: Decoded, length: int) -> Decoded:
        """Text shortened from the end until the document has its planned length."""
        sizes = [3 + self.layout.copies * s[1][0] * s[1][1] if isinstance(s, tuple) else len(s) for s in told]
        spare = 2 + sum(sizes) - length
        for i in range(len(told) - 1, -1, -1):
            segment = told[i]
            if spare > 0 and not isinstance(segment, tuple):
                kept = max(0, len(segment) - spare)
                spare -= len(segment) - kept
                told[i] = segment[:kept]
        return [segment for segment in told if len(segment)]

    def decode(self, sample: Sample, grids: Sequence[Grid], epoch: int) -> Decoded:
        """Tokens and patch rows of a sample whose images have these patch grids; raises `BadSample`."""
        expected = iter(grids)
        decoded: Decoded = []
        for i, segment in enumerate(sample.segments):
            if isinstance(segment, str):
                decoded.append(self.tokenizer.encode(segment))
            else:
                decoded.append(self._rows(sample, i, segment, epoch, next(expected)))
        return decoded

    def _rows(self, sample: Sample, number: int, picture: Picture, epoch: int, grid: Grid) -> tuple[NDArray[Any], Grid]:
        if picture.latent:
            return self._latent_rows(picture, grid)
        data, patcher = self.config.data, self.config.model.patcher
        centering = CENTRE
        if data.crop == "random":
            centering = chances(self.config.run.seed, epoch, sample.shard, sample.key, "crop", number)
        image = open_image(picture.data, data.limits, lambda image: draft(image, patcher.image_sizes))
        image = fit(image, patcher.channels, patcher.image_sizes, data.resize, centering)
        levels_NP, found = self.patcher.levels(image)
        if found != grid:
            raise BadSample(f"the image has grid {found}, planned was {grid}")
        return levels_NP, grid

    def _latent_rows(self, picture: Picture, grid: Grid) -> tuple[Floats, Grid]:
        assert isinstance(self.patcher, LatentPatcher)
        latent_Chw = open_latent(picture.data)
        try:
            x_NP, found = self.patcher.rows(latent_Chw)
        except ValueError as error:
            raise BadSample(str(error)) from None
        if found != grid:
            height, width = (cells * self.config.model.patcher.vae.factor for cells in latent_Chw.shape[1:])
            raise BadSample(
                f"latent {list(latent_Chw.shape)} stands for {height}x{width} pixels, which model.patcher.image_sizes "
                "does not declare"
            )
        return x_NP, grid

    def batch(self, rows: Sequence[Sequence[Strip | int]]) -> RawBatch:
        """Collate written rows."""
        patches = self.patcher.sent if self.unencoded else self.patcher.ready
        return collate(
            rows, RowFormat(self.config.data.row_length, self.tokenizer, self.layout.context((0, 0)), patches)
        )

    def written(self, row: PlannedRow, ordinal: int, quantile: Callable[[int], float], step: Step) -> list[Strip | int]:
        """Write the documents of a row and count them in `step`.

        `ordinal` is the number of the row's first image; `quantile` gives each number its draw for t.
        """
        strips: list[Strip | int] = []
        for document in row:
            even = None
            if self.config.objective.time.stratified:
                even = [quantile(i) for i in range(ordinal, ordinal + document.images)]
            strips.append(self._write_or_leave(document, even, step))
            ordinal += document.images
            step.images += document.images
            step.positions += document.length
        step.documents += len(row)
        return strips

    def micro_batches(self, written: list[list[Strip | int]], world: int) -> list[RawBatch]:
        """The written rows of a rank as its micro-batches, filled up with empty rows."""
        settings = self.config.train
        share = -(-settings.batch_rows // world)
        micro = min(settings.micro_rows or share, share)
        steps = -(-settings.batch_rows // (world * micro))
        written = [*written, *([] for _ in range(steps * micro - len(written)))]
        return [self.batch(written[i * micro : (i + 1) * micro]) for i in range(steps)]

    def _write_or_leave(self, document: PlannedDocument, quantiles: Sequence[float] | None, step: Step) -> Strip | int:
        try:
            return self.write(document, quantiles)
        except BadSample as error:
            shard, key = self.name(document)
            step.bad.append({"shard": shard, "key": key, "reason": str(error)})
            return document.length


class Corpus(Documents):
    """The documents of a list of shards, read through their indexes, and the plan of their order."""

    def __init__(
        self, patterns: Patterns, tokenizer: Tokenizer, config: Config, autoencoder: AutoencoderFacts | None = None
    ) -> None:
        super().__init__(tokenizer, config, autoencoder)
        self.dataset = Dataset(patterns, tokenizer, config)
        self._check_kind()
        self.dataset.refuse_overlong()
        self.bad, self.samples = self.dataset.bad, Samples(self.dataset)
        self.start = Position()
        mixture = Mixture(self.dataset.counts, self.dataset.weights, config.run.seed, config.data.block)
        self.plan = Plan(mixture, config.data.window, config.data.row_length, self.dataset.lengths)
        self._cache: dict[int, tuple[tuple[str, str], Decoded]] = {}
        self._cached_bytes = 0
        self._fetched: dict[int, Sample | BadSample] = {}
        self._remote = [store.is_url(shard) for shard in self.dataset.shards]
        self._pool: tuple[int, ThreadPoolExecutor] | None = None

    def _check_kind(self) -> None:
        """Raise ValueError where shards hold latents that the settings do not want, or of another autoencoder."""
        pictures, latents = self.dataset.pictures, self.dataset.autoencoders
        if latents and not isinstance(self.patcher, LatentPatcher):
            raise ValueError(
                f"{next(iter(latents.values()))} holds latents, but model.patcher.kind is pixels: set it to vae, or "
                "name shards of images"
            )
        if latents and pictures:
            raise ValueError(
                f"{next(iter(latents.values()))} holds latents and {pictures} images: name shards of one kind "
                "(`python -m data_prep.latents` makes latents of images)"
            )
        if latents and self.config.data.crop == "random":
            raise ValueError("data.crop is random, but a stored latent has one crop: set it to center")
        if isinstance(self.patcher, LatentPatcher):
            for fingerprint, shard in latents.items():
                if fingerprint and fingerprint != self.patcher.fingerprint:
                    raise ValueError(
                        f"the latents of {shard} come from another autoencoder (fingerprint {fingerprint}) than "
                        f"'{self.config.model.patcher.vae.name}' (fingerprint {self.patcher.fingerprint}): name that "
                        "one in model.patcher.vae.name, or make the latents anew with `python -m data_prep.latents`"
                    )

    @property
    def unencoded(self) -> bool:
        return not self.dataset.autoencoders

    @property
    def told(self) -> str:
        """What is trained on, in words."""
        return f"{len(self.samples)} samples"

    def known(self, position: Position | Cursors) -> int:
        """Samples that a rate of bad ones is taken of."""
        return len(self.samples) + len(self.bad)

    def form(self, epoch: int, index: int) -> Form:
        """How this sample is told in this epoch."""
        facts = self.dataset.gather(np.array([index]))
        return FORMS[int(self.dataset.forms(np.array([epoch]), facts)[0])]

    def length(self, epoch: int, index: int) -> int:
        """Positions of the document in this epoch."""
        return int(self.dataset.lengths(np.array([epoch]), np.array([index]))[0][0])

    def has_image(self, index: int) -> bool:
        """Whether the sample holds an image."""
        return bool(self.dataset.gather(np.array([index])).images[0])

    def segments(self, planned: PlannedDocument) -> tuple[tuple[str, str], Decoded]:
        return self.decoded(planned.epoch, planned.index)

    def name(self, planned: PlannedDocument) -> tuple[str, str]:
        return self.dataset.name(planned.index)

    def decoded(self, epoch: int, index: int) -> tuple[tuple[str, str], Decoded]:
        """(shard, key), tokens and patch rows of a sample; the first ones are kept: a small corpus is decoded once."""
        if index in self._cache:
            return self._cache[index]
        sample = self._fetched.pop(index, None) or self.dataset.sample(index)
        if isinstance(sample, BadSample):
            raise sample
        decoded = self.decode(sample, self.dataset.grids_of(index), epoch)
        size = sum(s[0].nbytes if isinstance(s, tuple) else 8 * len(s) for s in decoded) + 200
        if self.config.data.crop == "center" and self._cached_bytes + size <= self.config.data.cache_bytes:
            self._cache[index] = (sample.shard, sample.key), decoded
            self._cached_bytes += size
        return (sample.shard, sample.key), decoded

    def step(self, number: int, rows: Sequence[PlannedRow], after: Position, rank: int = 0, world: int = 1) -> Step:
        """Decode the share of `rank` in a global step: rows rank, rank + world, ..."""
        step = Step(number, [], after, 0, 0, 0)
        total = sum(document.images for row in rows for document in row)
        shared, _ = chances(self.config.run.seed, "t", number)
        self._prefetch([document.index for row in rows[rank::world] for document in row])
        ordinal = 0
        written: list[list[Strip | int]] = []
        for r, row in enumerate(rows):
            if r % world == rank:
                written.append(self.written(row, ordinal, lambda i: stratified(shared, i, total), step))
            ordinal += sum(document.images for document in row)
        step.micro = self.micro_batches(written, world)
        return step

    def steps(self, first: int, last: int, start: Position, rank: int, world: int) -> Iterator[Step]:
        stream = _Stream(self, first, last, start, rank, world)
        return ahead(stream, self.config.data.workers, torch.cuda.is_available())

    def first_step(self, rank: int = 0, world: int = 1) -> Step:
        ((number, rows, after),) = planned_steps(self.plan, self.config.train.batch_rows, 0, 1, self.start)
        return self.step(number, rows, after, rank, world)

    def _prefetch(self, indices: Sequence[int]) -> None:
        """Fetch samples of remote shards side by side: each alone would wait for its answer."""
        self._fetched.clear()
        if not any(self._remote):
            return
        far = [i for i in indices if i not in self._cache and self._remote[self.dataset.where(i)[0]]]
        if self._pool is None or self._pool[0] != os.getpid():  # threads do not survive a fork
            self._pool = os.getpid(), ThreadPoolExecutor(FETCHERS)
        for index, sample in zip(far, self._pool[1].map(self._fetch, far), strict=True):
            self._fetched[index] = sample

    def _fetch(self, index: int) -> Sample | BadSample:
        try:
            return self.dataset.sample(index)
        except BadSample as error:
            return error


Planned = tuple[int, list[PlannedRow], Position]
"""Number of a global step, its rows, and where the run stands behind it."""


def planned_steps(plan: Plan, batch_rows: int, first: int, last: int, start: Position) -> Iterator[Planned]:
    """Global steps [first, last) of a run that stands at `start`, before anything is decoded."""
    source = plan.rows(start)
    for number in range(first, last):
        rows = [next(source) for _ in range(batch_rows)]
        yield number, [row for row, _ in rows], rows[-1][1]


class _Stream(IterableDataset[Step]):
    """Steps from a position on; worker w of W makes steps w, w + W, ..."""

    def __init__(self, corpus: Corpus, first: int, last: int, start: Position, rank: int, world: int) -> None:
        self.corpus, self.first, self.last, self.start, self.rank, self.world = corpus, first, last, start, rank, world

    def __iter__(self) -> Iterator[Step]:
        worker = get_worker_info()
        lane, lanes = (worker.id, worker.num_workers) if worker else (0, 1)
        rows = self.corpus.config.train.batch_rows
        for number, planned, after in planned_steps(self.corpus.plan, rows, self.first, self.last, self.start):
            if (number - self.first) % lanes == lane:
                yield self.corpus.step(number, planned, after, self.rank, self.world)


def steps(corpus: Documents, first: int, last: int, start: Any, rank: int = 0, world: int = 1) -> Iterator[Step]:
    """Global steps [first, last) of a run that stands at `start`, decoded ahead in `data.workers` processes."""
    return corpus.steps(first, last, start, rank, world)


def ahead(source: IterableDataset[Any], workers: int, pinned: bool) -> Iterator[Any]:
    """The items of `source`, made ahead in `workers` processes; 0 makes them here."""
    begin = partial(_begin_worker, os.getpid())
    options: dict[str, Any] = {"prefetch_factor": 4, "worker_init_fn": begin} if workers else {}
    return iter(DataLoader(source, batch_size=None, num_workers=workers, pin_memory=pinned, **options))


def _begin_worker(parent: int, worker: int) -> None:
    """Signals reach the whole process group; only the training process answers, and ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A worker whose training process was killed would wait for ever to hand over its last step."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
