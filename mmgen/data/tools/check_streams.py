"""`mmgen data check` where `data.streams` reads shards forward: the same promises, without an index.

Everything is read twice: once plainly, for what there is, once through the streams, as every rank would.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from mmgen.config import Config
from mmgen.data.order import Cursor, PlannedDocument, PlannedRow
from mmgen.data.shards.samples import BadRecord, BadSample, read
from mmgen.data.streams import HeldDocument, StreamCorpus, StreamRow, Streams, Window
from mmgen.data.tools.check import STEPS, CheckOptions, Promises, Report
from mmgen.sequence.tokenizer import Tokenizer

Rows = dict[int, list[StreamRow]]
"""Rows of each stream."""


class _Dropping(Streams):
    """A fault: what a window leaves over is not carried into the next step."""

    def packed(self, stream: int, at: Cursor, window: Window) -> list[PlannedRow]:
        return super().packed(stream, at, window)[:-1]


@dataclass(frozen=True, kw_only=True)
class StreamReport(Report):
    """Of shards that are read in streams."""

    streams: int
    rows: int
    fill: float

    def details(self) -> dict[str, object]:
        return {"streams": self.streams, "rows": self.rows, "fill": self.fill}


def check_streams(tokenizer: Tokenizer, config: Config, options: CheckOptions) -> StreamReport:
    """What is in the training shards, what is lost, and whether their streams keep their promises.

    Raises:
        ValueError, FileNotFoundError: a missing shard, or no usable sample at all.
    """
    inject, report = options.inject, options.report
    corpus = StreamCorpus(config.data.train, tokenizer, config, options.autoencoder)
    shards = corpus.dataset.shards
    if inject == "duplicated_shard":
        shards = [*shards, shards[0]]
    bad: list[BadRecord] = []
    there = Counter((sample.shard, sample.key) for sample in read(shards, bad, config.data))
    report(f"read {len(shards)} shards")
    duplicates = sorted("/".join(name) for name, count in there.items() if count > 1)

    def streams_of(rank: int) -> Streams:
        kind = _Dropping if inject == "dropped_carry" else Streams
        other = config.run.model_copy(update={"seed": rank})
        seeded = config.model_copy(update={"run": other}) if inject == "per_rank_seed" and rank else config
        return kind(shards, tokenizer, seeded)

    seen, positions, rows = Counter[tuple[str, str]](), 0, 0
    for stream in range(config.data.streams):
        for row in _epoch(streams_of(0), stream):
            rows, positions = rows + 1, positions + sum(document.length for document in row)
            seen.update(corpus.name(document) for document in row)
            if options.decode:
                bad += undecodable(corpus, row)
        report(f"read stream {stream + 1} of {config.data.streams}")
    return StreamReport(
        samples=sum(there.values()),
        shards=len(shards),
        streams=config.data.streams,
        fingerprint=corpus.dataset.fingerprint,
        promises=Promises(seen == there and not duplicates, *_same_order(streams_of, config, inject == "off_by_one")),
        rows=rows,
        fill=positions / max(1, rows * config.data.row_length),
        bad_samples=bad,
        duplicate_keys=duplicates,
    )


def _epoch(streams: Streams, stream: int) -> list[PlannedRow]:
    """The rows of a stream's first epoch."""
    found = []
    for row in streams.rows(stream, Cursor()):
        if row.documents[0].epoch:
            break
        found.append(row.documents)
    return found


def undecodable(corpus: StreamCorpus, row: PlannedRow) -> list[BadRecord]:
    """The documents of a row that cannot be decoded."""
    found: list[BadRecord] = []
    for document in row:
        try:
            corpus.segments(document)
        except BadSample as error:
            shard, key = corpus.name(document)
            found.append(BadRecord(shard, key, str(error)))
    return found


def _same_order(streams_of: Callable[[int], Streams], config: Config, late: bool) -> tuple[bool, bool]:
    """Whether ranks of any number see one global order, and whether resumed runs do."""
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
    for n in worlds:
        parts: Rows = {}
        for rank in range(n):
            parts |= taken(streams_of(rank), range(rank, count, n), {}, last)
        ranks.append(digests(parts) == reference)
    resumed = []
    for step in (1, STEPS // 2, STEPS - 1):
        at = {v: whole[v][step * share - 1 + late].after for v in range(count)}
        rest = taken(streams_of(0), range(count), at, last - step * share)
        resumed.append(digests(rest) == reference[step * share :])
    return all(ranks), all(resumed)


def _digest(rows: Sequence[PlannedRow]) -> str:
    facts = [[_facts(document) for document in row] for row in rows]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _facts(document: PlannedDocument) -> tuple[object, ...]:
    assert isinstance(document, HeldDocument)
    sample = document.sample
    return document.epoch, sample.shard, sample.key, document.length, document.images, document.form
