"""The order of documents without an index: V streams that each read their shards forward.

In each epoch the shards are shuffled and assigned to the streams in turn. A stream reads its shards in sequence,
collects its share of `data.window` samples, and shuffles and packs this window alone. A global step takes the same
number of rows from every stream, and a stream belongs to one process. So the global batch at step n is the same for any
number of processes that divides V, and for any number of workers.

The state is six integers per stream. To resume, a stream reads its present shard again, without decoding, up to the
start of its window, and then the window: at most one shard and one window, at any position in the data.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from mmgen.config import Config
from mmgen.data.dataset import Facts, Measured, Overlong, facts_of, patch_grids
from mmgen.data.documents import Decoded, Documents, Share, Step, WrittenRow
from mmgen.data.loader import Corpus, ahead
from mmgen.data.order import (
    Cursor,
    Cursors,
    Ints,
    PlannedDocument,
    PlannedRow,
    Position,
    epoch_order,
    keyed,
    pack,
)
from mmgen.data.shards import store
from mmgen.data.shards.index import Builder, SegmentFacts, key_hash, repeated, segment_facts, tokens_column
from mmgen.data.shards.samples import BadRecord, BadSample, Group, Picture, Sample, Unwanted, damage, groups, parse
from mmgen.data.shards.store import Patterns, expand
from mmgen.data.shards.tar import Damaged
from mmgen.image.latent import AutoencoderFacts
from mmgen.image.patch import Grid
from mmgen.sequence.tokenizer import Tokenizer

BARREN = 16
"""Consecutive epochs without a usable sample after which a stream raises an error."""
SETTLED = 1000
"""Least number of samples that the share of bad samples is relative to; a share of fewer samples is not meaningful."""


@dataclass(frozen=True, kw_only=True)
class StreamDocument(PlannedDocument):
    """A planned document with its sample, still encoded, because a stream cannot read it again."""

    sample: Sample
    grids: list[Grid]


@dataclass(frozen=True)
class ReadSample:
    """A sample that was read, still encoded."""

    sample: Sample
    group: Group
    segments: list[SegmentFacts]


@dataclass(frozen=True)
class Met:
    """The next sample in a shard of a stream, usable or bad."""

    shard: int
    """Index of the shard in the stream's list."""
    group: int
    """Index of the following sample in the shard."""
    sample: ReadSample | BadRecord


@dataclass(frozen=True)
class StreamRow:
    """A planned row of a stream."""

    documents: PlannedRow
    after: Cursor
    """Position of the stream after this row."""
    bad: list[BadRecord]
    """Bad samples that were read since the previous row."""


class Window(Measured):
    """The samples of one window of a stream, numbered from 0, with an index in memory."""

    def __init__(
        self, samples: Sequence[ReadSample], tokenizer: Tokenizer, config: Config, cut_overlong: bool = False
    ) -> None:
        super().__init__(config, tokenizer.framing, cut_overlong)
        self.samples, self.count = [one.sample for one in samples], len(samples)
        builder = Builder()
        for one in samples:
            builder.add(one.sample, one.group, one.segments)
        self._columns = builder.columns(tokenizer)
        grids = patch_grids(self, config.model.patcher)
        self._facts = facts_of(self, tokens_column(tokenizer), grids)
        ends = self.column("segment_end_n")[:-1]
        self.grids = [[(r, c) for r, c in part.tolist() if r] for part in np.split(grids, ends)]

    def column(self, name: str) -> NDArray[np.generic]:
        """The column of this name."""
        return self._columns[name]

    def gather(self, indices: Ints) -> Facts:
        return self._facts.take(indices)

    def overlong_documents(self) -> list[Overlong]:
        """All documents that do not fit into a row with all their text."""
        return self.overlong(np.arange(self.count), self._facts)

    def name(self, index: int) -> tuple[str, str]:
        return self.samples[index].shard, self.samples[index].key


class Streams:
    """The endless rows of each stream; a stream keeps only its window in memory."""

    def __init__(self, shards: Sequence[str], tokenizer: Tokenizer, config: Config) -> None:
        self.shards, self.tokenizer, self.config = list(shards), tokenizer, config
        self.count = config.data.streams
        self.window = -(-config.data.window // self.count)
        """Number of samples of one window of one stream."""
        self.seed = config.run.seed
        if len(self.shards) < self.count:
            raise ValueError(
                f"data.streams is {self.count}, but data.train has {len(self.shards)} shard(s), and a stream reads "
                f"whole shards: set data.streams to {len(self.shards)} or less, or write more and smaller shards"
            )

    @property
    def fingerprint(self) -> str:
        """A hash of the names of the shards in their order; their contents are not read."""
        return hashlib.sha256("\n".join(map(store.name, self.shards)).encode()).hexdigest()

    def shard(self, stream: int, number: int, epoch: int) -> str | None:
        """The shard at index `number` of a stream's list; None after its last."""
        at, count = stream + number * self.count, len(self.shards)
        if at >= count:
            return None
        return self.shards[int(epoch_order(count, f"{self.seed} shards", epoch, range(at, at + 1))[0])]

    def rows(self, stream: int, start: Cursor) -> Iterator[StreamRow]:
        """Rows of a stream from position `start`.

        Raises:
            ValueError: a document is longer than a row, or no sample of the stream's shards can be used.
            OSError: a shard cannot be read.
        """
        at, bad, barren = start, list[BadRecord](), 0
        while barren < BARREN:
            source = self._epoch(stream, at)
            barren += 1
            while True:
                samples, following = self._gather(source, at, bad)
                if not samples:
                    break
                if at.row:  # they came with the window's first row
                    bad = []
                rows, barren = self.packed(stream, at, self.indexed(samples)), 0
                for r in range(at.row, len(rows)):
                    after = replace(at, row=r + 1) if r + 1 < len(rows) else following
                    yield StreamRow(rows[r], after, bad)
                    bad = []
                at = following
            at = Cursor(epoch=at.epoch + 1, met=following.met)
        last = f": the last bad one is {bad[-1].name}: {bad[-1].reason}" if bad else ""
        left_out = "; data.where leaves out the others, if there are any" if self.config.data.where else ""
        raise ValueError(f"stream {stream} finds no usable sample in its shards{last}{left_out}")

    def indexed(self, samples: Sequence[ReadSample]) -> Window:
        """A window of these samples."""
        return Window(samples, self.tokenizer, self.config)

    def packed(self, stream: int, at: Cursor, window: Window) -> list[PlannedRow]:
        """The rows of a window that begins at `at`, in an order that does not depend on their lengths."""
        rng = keyed(self.seed, "stream", stream, at.epoch, at.window)
        order = rng.permutation(window.count)
        columns = (column.tolist() for column in window.lengths(np.full(window.count, at.epoch), order))
        documents = [
            StreamDocument(at.epoch, index, *facts, sample=window.samples[index], grids=window.grids[index])
            for index, *facts in zip(order.tolist(), *columns, strict=True)
        ]
        rows = pack([document.length for document in documents], self.config.data.row_length)
        return [[documents[i] for i in rows[r]] for r in rng.permutation(len(rows))]

    def _gather(self, source: Iterator[Met], at: Cursor, bad: list[BadRecord]) -> tuple[list[ReadSample], Cursor]:
        """The samples of the window at `at` (none at the end of the epoch), and the start of the next window."""
        samples: list[ReadSample] = []
        following = replace(at, window=at.window + 1, row=0)
        for met in source:
            following = replace(following, shard=met.shard, group=met.group, met=following.met + (at.epoch == 0))
            if isinstance(met.sample, BadRecord):
                bad.append(met.sample)
                continue
            samples.append(met.sample)
            if len(samples) == self.window:
                break
        return samples, following

    def _epoch(self, stream: int, at: Cursor) -> Iterator[Met]:
        """The samples of a stream from `at` to the end of its epoch."""
        number, first = at.shard, at.group
        while (shard := self.shard(stream, number, at.epoch)) is not None:
            for group, sample in self._shard(shard, first):
                yield Met(number, group, sample)
            number, first = number + 1, 0

    def _shard(self, shard: str, first: int) -> Iterator[tuple[int, ReadSample | BadRecord]]:
        """The samples of a shard after its first `first` ones; an interrupted read is retried from the same sample."""
        data, name = self.config.data, store.name(shard)
        for wait in (*store.RETRIES, None):
            number, seen = 0, set[int]()
            try:
                with store.stream(shard, data.limits) as file:
                    for group in groups(file, data.limits):
                        hashed, number = key_hash(name, group.key), number + 1
                        again = hashed in seen
                        seen.add(hashed)
                        if number > first:
                            first = number
                            if (found := self._look(name, group, again)) is not None:
                                yield number, found
                return
            except Damaged as error:
                if number >= first:
                    yield number + 1, BadRecord(name, error.key, damage(error))
                return
            except FileNotFoundError:
                raise FileNotFoundError(f"shard {shard} does not exist: correct data.train, or restore it") from None
            except OSError as error:
                if wait is None:
                    raise OSError(f"shard {shard} cannot be read: {error}") from None
                time.sleep(wait)

    def _look(self, name: str, group: Group, again: bool) -> ReadSample | BadRecord | None:
        """A sample, the reason why it cannot be used, or None if `data.where` leaves it out."""
        try:
            if again:
                raise BadSample(repeated(group))
            sample = parse(name, group, self.config.data)
            if any(isinstance(segment, Picture) and segment.stored for segment in sample.segments):
                raise BadSample(
                    "latents and codes are read only through an index, which records their maker: set data.streams to 0"
                )
            return ReadSample(sample, group, [segment_facts(segment, self.config.data) for segment in sample.segments])
        except Unwanted:
            return None
        except BadSample as error:
            return BadRecord(name, group.key, str(error))


@dataclass(frozen=True)
class Part:
    """The part of a global step that one loader process makes from some of the streams."""

    number: int
    """Number of the step."""
    after: Cursors
    """Positions of these streams after the step."""
    rows: dict[int, list[WrittenRow]]
    """Stream to its rows."""


class StreamCorpus(Documents):
    """The documents of a list of shards, read forward in `data.streams` streams, without an index.

    Each loader process reads some of this process's streams and writes their documents; this class joins the parts.
    """

    def __init__(
        self, patterns: Patterns, tokenizer: Tokenizer, config: Config, autoencoder: AutoencoderFacts | None = None
    ) -> None:
        super().__init__(tokenizer, config, autoencoder)
        self.dataset = Streams(expand(patterns), tokenizer, config)
        self.bad: list[BadRecord] = []
        self.start = Cursors()

    @property
    def unencoded(self) -> bool:
        return True

    @property
    def description(self) -> str:
        """The numbers of shards and streams, for the first line of a run."""
        return f"{len(self.dataset.shards)} shards in {self.dataset.count} streams"

    def known(self, position: Position | Cursors) -> int:
        """Number of samples that the share of bad samples is relative to: those read so far, at least `SETTLED`."""
        assert isinstance(position, Cursors)
        return max(SETTLED, sum(cursor.met for cursor in position.streams.values()))

    def segments(self, planned: PlannedDocument) -> Decoded:
        assert isinstance(planned, StreamDocument)
        return self.decode(planned.sample, planned.grids, planned.epoch)

    def name(self, planned: PlannedDocument) -> tuple[str, str]:
        assert isinstance(planned, StreamDocument)
        return planned.sample.shard, planned.sample.key

    def part(self, number: int, sources: dict[int, Iterator[StreamRow]]) -> Part:
        """The share of some streams in a global step."""
        cursors: dict[int, Cursor] = {}
        rows: dict[int, list[WrittenRow]] = {}
        for stream, source in sources.items():
            drawn = [next(source) for _ in range(self.config.train.batch_rows // self.dataset.count)]
            ends = list(accumulate(sum(document.images for document in row.documents) for row in drawn))
            even = self.quantiles(number, np.arange(ends[-1]), ends[-1], stream)
            rows[stream] = []
            for row, start, end in zip(drawn, [0, *ends], ends, strict=False):
                written = self.written(row.documents, even[start:end])
                rows[stream].append(replace(written, bad=[*written.bad, *row.bad]))
            cursors[stream] = drawn[-1].after
        return Part(number, Cursors(cursors), rows)

    def joined(self, parts: Sequence[Part], share: Share) -> Step:
        """This process's share of a global step, in which row i comes from stream i mod V."""
        rows = {stream: own for part in parts for stream, own in part.rows.items()}
        count = self.dataset.count
        mine = [rows[i % count][i // count] for i in range(share.rank, self.config.train.batch_rows, share.world)]
        after = Cursors.union(part.after for part in parts)
        by_stream = [row for own in rows.values() for row in own]
        return Step.of_rows(parts[0].number, self.micro_batches(mine, share.world), after, by_stream)

    def steps(self, first: int, last: int, start: Cursors, share: Share) -> Iterator[Step]:
        """Global steps [first, last); raises ValueError for a world that does not divide the number of streams."""
        self.config.check_processes(share.world)
        own = range(share.rank, self.dataset.count, share.world)
        lanes = min(self.config.data.workers, len(own))
        parts = ahead(_Lanes(self, first, last, start, own), lanes, pinned=False)
        whole = (self.joined([next(parts) for _ in range(max(1, lanes))], share) for _ in range(first, last))
        return (step.pin_memory() for step in whole) if torch.cuda.is_available() else whole

    def first_step(self, share: Share = Share()) -> Step:
        own = range(share.rank, self.dataset.count, share.world)
        return self.joined(list(_Lanes(self, 0, 1, self.start, own)), share)


class _Lanes(IterableDataset[Part]):
    """Parts of steps; worker w of W reads streams w, w + W, ..., so that no byte is read twice."""

    def __init__(self, corpus: StreamCorpus, first: int, last: int, start: Cursors, own: range) -> None:
        self.corpus, self.first, self.last, self.start, self.own = corpus, first, last, start, own

    def __iter__(self) -> Iterator[Part]:
        worker = get_worker_info()
        lane, lanes = (worker.id, worker.num_workers) if worker else (0, 1)
        read = self.corpus.dataset.rows
        sources = {stream: read(stream, self.start.of_stream(stream)) for stream in self.own[lane::lanes]}
        for number in range(self.first, self.last):
            yield self.corpus.part(number, sources)


def training_corpus(
    config: Config, tokenizer: Tokenizer, autoencoder: AutoencoderFacts | None = None
) -> Corpus | StreamCorpus:
    """The documents of `data.train`, read through indexes or, if `data.streams` is set, in streams.

    Raises:
        FileNotFoundError: a shard does not exist.
        ValueError: the shards cannot be used with these settings.
    """
    kind = StreamCorpus if config.data.streams else Corpus
    return kind(config.data.train, tokenizer, config, autoencoder)
