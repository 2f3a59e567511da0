"""Samples as documents: decoded, written, and collated into the batches of a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from mmgen.config import Config
from mmgen.data.dataset import DROPPED, IMAGE_FIRST
from mmgen.data.order import Cursors, PlannedDocument, PlannedRow, Position, chances, keyed
from mmgen.data.shards.samples import Bad, BadSample, Picture, Sample, open_image, open_latent
from mmgen.image.latent import AutoencoderFacts, LatentPatcher, build_patcher
from mmgen.image.patch import Floats, Grid
from mmgen.image.resize import CENTRE, draft, fit
from mmgen.objective import ImageSite, build_layout
from mmgen.sequence.batch import RawBatch, RowFormat, collate
from mmgen.sequence.document import Document, ImageSegment, Strip, TextSegment, Writer
from mmgen.sequence.tokenizer import Tokenizer


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
