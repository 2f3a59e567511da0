"""Documents of samples: decoding, writing, and collating them into the batches of a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from mmgen.config import Config
from mmgen.data.dataset import IMAGE_FIRST, NO_TEXT, ONE_IMAGE, SHORT
from mmgen.data.order import Cursors, Ints, PlannedDocument, PlannedRow, Position, chances, keyed, permuted
from mmgen.data.shards.pictures import STORED, open_image, open_stored
from mmgen.data.shards.samples import BadRecord, BadSample, Picture, Sample, Text
from mmgen.flow.time import stratified
from mmgen.image.latent import AutoencoderFacts, build_patcher
from mmgen.image.patch import Grid
from mmgen.image.resize import CENTRE, draft, fit
from mmgen.objective import ImageSite, build_layout
from mmgen.sequence.batch import RawBatch, RowFormat, collate
from mmgen.sequence.document import Document, ImageSegment, Strip, TextSegment, Writer
from mmgen.sequence.tokenizer import Tokenizer


@dataclass(frozen=True)
class Share:
    """The part of a global step that one of `world` processes trains on: rows rank, rank + world, ..."""

    rank: int = 0
    world: int = 1


@dataclass(frozen=True)
class WrittenRow:
    """A planned row, decoded and written, before it is collated."""

    strips: Sequence[Strip | int]
    """Its documents; for one that could not be decoded, its planned length."""
    positions: int
    """Positions of its documents, without padding."""
    images: int
    """Number of learned images."""
    bad: Sequence[BadRecord]
    """Samples that could not be used."""


@dataclass(frozen=True)
class Step:
    """This process's share of one global step."""

    number: int
    micro: Sequence[RawBatch]
    after: Position | Cursors
    """Position of the run in its data after this step."""
    documents: int
    positions: int
    """Positions of documents, without padding."""
    images: int
    """Number of learned images."""
    bad: Sequence[BadRecord]
    """Samples that could not be decoded."""

    @staticmethod
    def of_rows(number: int, micro: Sequence[RawBatch], after: Position | Cursors, rows: Sequence[WrittenRow]) -> Step:
        """The step of these micro-batches, with the totals of its rows."""
        return Step(
            number,
            micro,
            after,
            documents=sum(len(row.strips) for row in rows),
            positions=sum(row.positions for row in rows),
            images=sum(row.images for row in rows),
            bad=[record for row in rows for record in row.bad],
        )

    def pin_memory(self) -> Step:
        """A copy with its batches in page-locked memory, so that a GPU copies them while it computes."""
        return replace(self, micro=[batch.pin_memory() for batch in self.micro])


@dataclass(frozen=True)
class DecodedImage:
    """A decoded image as N patches of P numbers."""

    x_NP: NDArray[Any]
    """Pixel values in 0..255, or precomputed patches (latents, codes)."""
    grid: Grid
    learn: bool = True


@dataclass(frozen=True)
class Decoded:
    """A sample with its text as tokens and its images as patches."""

    shard: str
    key: str
    segments: Sequence[TextSegment | DecodedImage]

    @property
    def nbytes(self) -> int:
        """Approximate size in memory."""
        sizes = (8 * len(s.ids) if isinstance(s, TextSegment) else s.x_NP.nbytes for s in self.segments)
        return sum(sizes) + 200


def cut(segments: Sequence[TextSegment | DecodedImage], spare: int) -> list[TextSegment | DecodedImage]:
    """The segments without the last `spare` tokens of text; empty text is dropped."""
    kept: list[TextSegment | DecodedImage] = []
    for segment in reversed(segments):
        if spare > 0 and isinstance(segment, TextSegment):
            ids = segment.ids[: max(0, len(segment.ids) - spare)]
            spare -= len(segment.ids) - len(ids)
            segment = replace(segment, ids=ids)
        if isinstance(segment, DecodedImage) or segment.ids:
            kept.insert(0, segment)
    return kept


class Documents(ABC):
    """Turns samples into documents, one at a time.

    Decoding and every random draw are per document and depend on (seed, epoch, shard, key) alone.
    """

    def __init__(self, tokenizer: Tokenizer, config: Config, autoencoder: AutoencoderFacts | None = None) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.patcher = build_patcher(config.model.patcher, facts=autoencoder)
        self.layout = build_layout(config.objective)

    @abstractmethod
    def segments(self, planned: PlannedDocument) -> Decoded:
        """The decoded sample of a planned document; raises `BadSample`."""

    @property
    @abstractmethod
    def unencoded(self) -> bool:
        """Whether batches hold pixels, which `prepare` scales or encodes, instead of precomputed patches."""

    @abstractmethod
    def name(self, planned: PlannedDocument) -> tuple[str, str]:
        """Shard name and key of a planned document."""

    @abstractmethod
    def steps(self, first: int, last: int, start: Any, share: Share) -> Iterator[Step]:
        """Global steps [first, last) from position `start`, decoded ahead in `data.workers` processes."""

    @abstractmethod
    def first_step(self, share: Share = Share()) -> Step:
        """A rank's share of the first global step, made in this process; for measuring and inspecting one step."""

    def document(self, planned: PlannedDocument, quantiles: Sequence[float] | None) -> Document:
        """Decode one document. `quantiles` are the stratified draws in [0, 1) for t of its learned images.

        Raises:
            BadSample: the sample cannot be decoded.
        """
        decoded = self.segments(planned)
        segments = list(decoded.segments)
        if planned.form == IMAGE_FIRST:
            segments.reverse()
        if planned.form in NO_TEXT:
            segments = [segment for segment in segments if isinstance(segment, DecodedImage)]
        if planned.form in ONE_IMAGE:
            target = [segment for segment in segments if isinstance(segment, DecodedImage) and segment.learn][-1]
            segments = [segment for segment in segments if isinstance(segment, TextSegment) or segment is target]
        short = planned.form in SHORT
        whole = self.tokenizer.framing + sum(self._positions(segment, short) for segment in segments)
        segments = cut(segments, whole - planned.length)
        texts = [i for i, segment in enumerate(segments) if isinstance(segment, TextSegment)]
        document: list[TextSegment | ImageSegment] = []
        drawn = iter(quantiles) if quantiles is not None else None
        image = 0
        for i, segment in enumerate(segments):
            if isinstance(segment, TextSegment):
                document.append(segment)
                continue
            rng = keyed(self.config.run.seed, planned.epoch, decoded.shard, decoded.key, "noise", image)
            if not segment.learn:
                blocks = [self.layout.context(segment.grid)]
            else:
                quantile = rng.random() if drawn is None else next(drawn)
                before, after = bool(texts) and texts[0] < i, bool(texts) and texts[-1] > i
                key = int(rng.integers(-(2**63), 2**63))
                blocks = self.layout.blocks(ImageSite(segment.grid, before, after, quantile, key), rng)
                if short:
                    blocks = blocks[:1]
            document.append(ImageSegment(segment.x_NP, segment.grid, blocks, segment.learn))
            image += 1
        return document

    def write(self, planned: PlannedDocument, quantiles: Sequence[float] | None) -> Strip:
        """Decode one document and write it as tokens and patches; raises `BadSample`."""
        strip = Writer(self.tokenizer, self.config.model.chosen_positions).document(self.document(planned, quantiles))
        if len(strip) != planned.length:
            raise BadSample(f"its document has {len(strip)} positions, but {planned.length} were planned")
        return strip

    def _positions(self, segment: TextSegment | DecodedImage, short: bool) -> int:
        """Number of positions of a segment in a row; in a `short` document, images have no clean copy."""
        if isinstance(segment, TextSegment):
            return len(segment.ids)
        rows, columns = segment.grid
        copies = self.layout.copies if segment.learn and not short else 1
        return 3 + copies * (self.layout.lead + rows * columns)

    def decode(self, sample: Sample, grids: Sequence[Grid], epoch: int) -> Decoded:
        """The tokens and patches of a sample whose images have the patch grids `grids`; raises `BadSample`."""
        expected = iter(grids)
        segments: list[TextSegment | DecodedImage] = []
        for i, segment in enumerate(sample.segments):
            if isinstance(segment, Text):
                segments.append(TextSegment(self.tokenizer.encode(segment.text), segment.learn))
            elif segment.stored:
                segments.append(self._stored(segment, next(expected)))
            else:
                centering = CENTRE
                if self.config.data.crop == "random":
                    centering = chances(self.config.run.seed, epoch, sample.shard, sample.key, "crop", i)
                segments.append(self._image(segment, centering, next(expected)))
        return Decoded(sample.shard, sample.key, segments)

    def _image(self, picture: Picture, centering: tuple[float, float], grid: Grid) -> DecodedImage:
        data, patcher = self.config.data, self.config.model.patcher
        image = open_image(picture.data, data.limits, lambda image: draft(image, patcher.image_sizes))
        image = fit(image, patcher.channels, patcher.image_sizes, data.resize, centering)
        pixels_NP, actual = self.patcher.pixels(image)
        if actual != grid:
            raise BadSample(f"the image has the patch grid {actual}, but {grid} was planned")
        return DecodedImage(pixels_NP, grid, picture.learn)

    def _stored(self, picture: Picture, grid: Grid) -> DecodedImage:
        stored = open_stored(picture.data)
        if stored.kind != self.patcher.stored:
            raise BadSample(f"it holds {STORED[stored.kind].plural}, which model.patcher.kind does not accept")
        try:
            x_NP, actual = self.patcher.encode_stored(stored.array)
        except ValueError as error:
            raise BadSample(str(error)) from None
        if actual != grid:
            height, width = (n * STORED[stored.kind].cell_pixels(self.config.model.patcher) for n in stored.size)
            raise BadSample(
                f"{stored.kind} {list(stored.array.shape)} represents an image of {height}x{width} pixels, which "
                "model.patcher.image_sizes does not declare"
            )
        return DecodedImage(x_NP, grid, picture.learn)

    def batch(self, rows: Sequence[Sequence[Strip | int]]) -> RawBatch:
        """Collate written rows into one batch."""
        patches = self.patcher.sent if self.unencoded else self.patcher.ready
        nothing, draws = self.layout.context((0, 0)), self.layout.noise_draws
        return collate(rows, RowFormat(self.config.data.row_length, self.tokenizer, nothing, patches, draws))

    def quantiles(self, number: int, ordinals: Ints, total: int, stream: int | None = None) -> list[float]:
        """The draws in [0, 1) for t of the learned images `ordinals` [n] of all `total` ones of step `number`.

        They are evenly spaced over the step and assigned to images in a random order, so that the draws of the images
        of a document are independent. A stream has its own draws, which lie between those of the other streams.
        """
        seed, streams = self.config.run.seed, self.config.data.streams
        shared, _ = chances(seed, "t", number)
        offset = 0.0 if stream is None else stream / streams
        where = () if stream is None else (stream,)
        order = permuted(ordinals, total, seed, "t order", number, *where)
        return [stratified(shared, ordinal + offset, total) for ordinal in order.tolist()]

    def written(self, row: PlannedRow, quantiles: Sequence[float]) -> WrittenRow:
        """Decode and write the documents of a row; `quantiles` are the stratified draws for t of its learned images."""
        strips: list[Strip | int] = []
        bad: list[BadRecord] = []
        following = 0
        for document in row:
            first, following = following, following + document.images
            even = quantiles[first:following] if self.config.objective.time.stratified else None
            try:
                strips.append(self.write(document, even))
            except BadSample as error:
                strips.append(document.length)
                bad.append(BadRecord(*self.name(document), str(error)))
        return WrittenRow(strips, sum(document.length for document in row), following, bad)

    def micro_batches(self, rows: Sequence[WrittenRow], world: int) -> list[RawBatch]:
        """The micro-batches of a rank from its written rows, padded with empty rows to equal size."""
        settings = self.config.train
        share = -(-settings.batch_rows // world)
        micro = min(settings.micro_rows or share, share)
        steps = -(-settings.batch_rows // (world * micro))
        strips = [*(row.strips for row in rows), *([] for _ in range(steps * micro - len(rows)))]
        return [self.batch(strips[i * micro : (i + 1) * micro]) for i in range(steps)]
