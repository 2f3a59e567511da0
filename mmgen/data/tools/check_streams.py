"""`mmgen data check` for shards that `data.streams` reads forward: the same guarantees, without an index.

Every shard is read twice: once directly, to list its samples, and once through the streams, as each rank reads it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from mmgen.config import Config
from mmgen.data.dataset import Overlong, overlong_remedy
from mmgen.data.order import Cursor, PlannedDocument, PlannedRow
from mmgen.data.progress import Progress
from mmgen.data.shards.samples import BadRecord, BadSample, read
from mmgen.data.streams import ReadSample, StreamCorpus, StreamDocument, StreamRow, Streams, Window
from mmgen.data.tools.check import RESUMES, STEPS, CheckOptions, Guarantees, Report
from mmgen.sequence.tokenizer import Tokenizer

Rows = dict[int, list[StreamRow]]
"""Rows of each stream."""


class _Collecting(Streams):
    """Streams that collect documents longer than a row, and plan them with the length of a row."""

    def __init__(self, shards: Sequence[str], tokenizer: Tokenizer, config: Config) -> None:
        super().__init__(shards, tokenizer, config)
        self.overlong: list[Overlong] = []

    def indexed(self, samples: Sequence[ReadSample]) -> Window:
        window = Window(samples, self.tokenizer, self.config, cut_overlong=True)
        self.overlong += window.overlong_documents()
        return window


class _Dropping(_Collecting):
    """A fault: the last row of each window is dropped."""

    def packed(self, stream: int, at: Cursor, window: Window) -> list[PlannedRow]:
        return super().packed(stream, at, window)[:-1]


@dataclass(frozen=True, kw_only=True)
class StreamReport(Report):
    """The findings for shards that are read in streams."""

    streams: int
    rows: int
    fill: float

    def details(self) -> dict[str, object]:
        return {"streams": self.streams, "rows": self.rows, "fill": self.fill}


def check_streams(tokenizer: Tokenizer, config: Config, options: CheckOptions) -> StreamReport:
    """Check the content of the training shards, and whether the order of their streams has the guaranteed properties.

    Raises:
        FileNotFoundError: a shard does not exist.
        ValueError: there is no usable sample, or there are fewer shards than streams.
    """
    inject, log = options.inject, options.log
    corpus = StreamCorpus(config.data.train, tokenizer, config, options.autoencoder)
    shards = corpus.dataset.shards
    if inject == "duplicated_shard":
        shards = [*shards, shards[0]]
    bad: list[BadRecord] = []
    samples = Progress(f"reading {len(shards)} shards", "samples", log=log).over(read(shards, bad, config.data))
    present = Counter((sample.shard, sample.key) for sample in samples)
    duplicates = sorted("/".join(name) for name, count in present.items() if count > 1)

    def streams_of(rank: int) -> _Collecting:
        kind = _Dropping if inject == "dropped_carry" else _Collecting
        other = config.run.model_copy(update={"seed": rank})
        seeded = config.model_copy(update={"run": other}) if inject == "per_rank_seed" and rank else config
        return kind(shards, tokenizer, seeded)

    seen, positions, rows, overlong = Counter[tuple[str, str]](), 0, 0, set[Overlong]()
    with Progress("reading streams", "samples", sum(present.values()), log) as progress:
        for stream in range(config.data.streams):
            streams = streams_of(0)
            for row in _epoch(streams, stream):
                rows, positions = rows + 1, positions + sum(document.length for document in row)
                seen.update(corpus.name(document) for document in row)
                if options.decode:
                    bad += undecodable(corpus, row)
                progress.done += len(row)
            overlong.update(streams.overlong)
    with Progress("comparing orders", "runs", log=log, quiet=True) as progress:
        same = _same_order(streams_of, config, inject == "off_by_one", progress)
    return StreamReport(
        samples=sum(present.values()),
        shards=len(shards),
        streams=config.data.streams,
        fingerprint=corpus.dataset.fingerprint,
        guarantees=Guarantees(seen == present and not duplicates, *same),
        rows=rows,
        fill=positions / max(1, rows * config.data.row_length),
        bad_samples=bad,
        duplicate_keys=duplicates,
        overlong=sorted(overlong, key=lambda document: (document.shard, document.key)),
        overlong_remedy=overlong_remedy(config.data),
    )


def _epoch(streams: Streams, stream: int) -> list[PlannedRow]:
    """The rows of a stream's first epoch."""
    rows = []
    for row in streams.rows(stream, Cursor()):
        if row.documents[0].epoch:
            break
        rows.append(row.documents)
    return rows


def undecodable(corpus: StreamCorpus, row: PlannedRow) -> list[BadRecord]:
    """The documents of a row that cannot be decoded."""
    bad: list[BadRecord] = []
    for document in row:
        try:
            corpus.segments(document)
        except BadSample as error:
            shard, key = corpus.name(document)
            bad.append(BadRecord(shard, key, str(error)))
    return bad


def _same_order(
    streams_of: Callable[[int], Streams], config: Config, late: bool, progress: Progress
) -> tuple[bool, bool]:
    """Whether the global order is the same for any number of ranks, and whether it is the same after resuming."""
    count, share = config.data.streams, config.train.batch_rows // config.data.streams
    last = STEPS * share

    def taken(streams: Streams, own: Sequence[int], at: dict[int, Cursor], most: int) -> Rows:
        return {v: list(islice(streams.rows(v, at.get(v, Cursor())), most)) for v in own}

    def digests(rows: Rows) -> list[str]:
        return [_digest([rows[v][i].documents for v in range(count)]) for i in range(len(rows[0]))]

    whole = taken(streams_of(0), range(count), {}, last + 1)
    reference = digests(whole)[:last]
    worlds = [n for n in range(1, count + 1) if count % n == 0][:4]
    ranks: list[bool] = []
    for n in progress.each(worlds):
        parts: Rows = {}
        for rank in range(n):
            parts |= taken(streams_of(rank), range(rank, count, n), {}, last)
        ranks.append(digests(parts) == reference)
    resumed = []
    for step in progress.each(RESUMES):
        at = {v: whole[v][step * share - 1 + late].after for v in range(count)}
        rest = taken(streams_of(0), range(count), at, last - step * share)
        resumed.append(digests(rest) == reference[step * share :])
    return all(ranks), all(resumed)


def _digest(rows: Sequence[PlannedRow]) -> str:
    facts = [[_facts(document) for document in row] for row in rows]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _facts(document: PlannedDocument) -> tuple[object, ...]:
    assert isinstance(document, StreamDocument)
    sample = document.sample
    return document.epoch, sample.shard, sample.key, document.length, document.images, document.form
