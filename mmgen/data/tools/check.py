"""`mmgen data check`: the content of shards, their bad samples, and whether the order of documents has the guaranteed
properties.

The order is checked by running the planner as each rank does. `FAULTS` break it, to show that the checks fail.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mmgen.config import Config
from mmgen.data.dataset import Overlong, overlong_remedy
from mmgen.data.loader import Corpus, planned_steps
from mmgen.data.order import Plan, PlannedRow, Position
from mmgen.data.progress import Log, Progress
from mmgen.data.shards import store
from mmgen.data.shards.index import ensure, ensure_all, pool_of
from mmgen.data.shards.samples import BadRecord, BadSample
from mmgen.data.shards.store import Patterns, expand
from mmgen.data.tools.findings import folded, folded_bad, folded_overlong
from mmgen.image.latent import AutoencoderFacts
from mmgen.sequence.tokenizer import Tokenizer

FAULTS = ("per_rank_seed", "dropped_carry", "off_by_one", "duplicated_shard")
WORLDS = (1, 2, 3, 4)
STEPS = 24
"""Global steps that are compared between numbers of ranks."""
RESUMES = (1, STEPS // 2, STEPS - 1)
"""Steps at which a run is resumed."""
COVERED = 1 << 20
"""Number of documents of an epoch that are counted individually."""
SPAN = 256
"""Samples that a worker decodes before it returns."""
SHOWN_KEYS = 1000
"""Largest number of duplicate keys and overlong documents in the lists of `--json`."""
SAME_NAMES = (
    "Samples with equal shard names and keys share their random draws: give the shards of each folder another name "
    "(`--name` of data_prep), or name each shard once"
)


class _Dropping(Plan):
    """A fault: the last row of each window is dropped."""

    def packed(self, epoch: int, window: int) -> list[PlannedRow]:
        return super().packed(epoch, window)[:-1]


@dataclass(frozen=True)
class CheckOptions:
    """How shards are checked."""

    log: Log = lambda line: None
    """Called with each line of progress."""
    decode: bool = True
    """Whether every sample is decoded."""
    inject: str | None = None
    """One of `FAULTS`."""
    workers: int = 1
    world: int = 8
    """Number of ranks whose shares are compared."""
    autoencoder: AutoencoderFacts | None = None
    """Facts of the autoencoder of stored latents."""

    def __post_init__(self) -> None:
        if self.inject is not None and self.inject not in FAULTS:
            raise ValueError(f"unknown fault '{self.inject}' (one of: {', '.join(FAULTS)})")
        if self.world < 1:
            raise ValueError(f"--world is {self.world}: it must be at least 1")


@dataclass(frozen=True)
class Totals:
    """Sums over all samples."""

    text_tokens: int
    images: int
    patches: int


@dataclass(frozen=True)
class Guarantees:
    """Which guaranteed properties the order of documents has."""

    coverage_exact: bool
    """An epoch contains each sample once."""
    same_for_any_world: bool
    """The order is the same for any number of ranks."""
    same_after_resume: bool

    @property
    def hold(self) -> bool:
        """Whether it has all of them."""
        return self.coverage_exact and self.same_for_any_world and self.same_after_resume


@dataclass(frozen=True)
class Balance:
    """How full the rows of an epoch are, and how equal the shares of the ranks."""

    rows: int
    fill: float
    fill_greedy: float
    fill_padded: float
    rank_positions_min_over_max: float
    rank_images_min_over_max: float


@dataclass(frozen=True, kw_only=True)
class Report(ABC):
    """The findings of `mmgen data check`, for indexed shards and for streams."""

    samples: int
    shards: int
    fingerprint: str
    guarantees: Guarantees
    bad_samples: list[BadRecord]
    duplicate_keys: list[str]
    overlong: list[Overlong]
    """Documents that are longer than a row and would stop a run."""
    overlong_remedy: str

    @property
    def holds(self) -> bool:
        """Whether no problem was found."""
        return not (self.bad_samples or self.duplicate_keys or self.overlong) and self.guarantees.hold

    @abstractmethod
    def details(self) -> dict[str, object]:
        """Further figures by name."""

    def figures(self) -> dict[str, object]:
        """All figures and verdicts as one flat dictionary."""
        return {
            "samples": self.samples,
            "bad": len(self.bad_samples),
            "duplicates": len(self.duplicate_keys),
            "overlong": len(self.overlong),
            "shards": self.shards,
            "fingerprint": self.fingerprint,
            **self.details(),
            **asdict(self.guarantees),
            "holds": self.holds,
        }

    def lists(self) -> dict[str, list[str]]:
        """Kind of finding to the names of its shards or keys."""
        return {"duplicate_keys": self.duplicate_keys[:SHOWN_KEYS]}

    def findings(self) -> Iterator[str]:
        """The problems as lines for people: one line for each kind, with a count and examples."""
        yield from folded_bad(self.bad_samples)
        yield from folded("duplicate key", "duplicate keys", self.duplicate_keys, SAME_NAMES)
        yield from folded_overlong(self.overlong, self.overlong_remedy)

    def as_dict(self) -> dict[str, object]:
        """The whole report, for JSON."""
        return {
            **self.figures(),
            "bad_samples": [bad.as_dict() for bad in self.bad_samples],
            "overlong_documents": [asdict(document) for document in self.overlong[:SHOWN_KEYS]],
            **self.lists(),
        }


@dataclass(frozen=True, kw_only=True)
class CheckReport(Report):
    """The findings for shards that have an index."""

    totals: Totals
    balance: Balance
    duplicate_shards: list[str]
    unused_shards: list[str]

    @property
    def holds(self) -> bool:
        return super().holds and not self.duplicate_shards

    def details(self) -> dict[str, object]:
        return {**asdict(self.totals), **asdict(self.balance)}

    def lists(self) -> dict[str, list[str]]:
        shards = {"duplicate_shards": self.duplicate_shards, "unused_shards": self.unused_shards}
        return {**super().lists(), **shards}

    def findings(self) -> Iterator[str]:
        yield from super().findings()
        yield from folded(
            "copy of an earlier shard",
            "copies of earlier shards",
            self.duplicate_shards,
        )
        yield from folded(
            "unused shard, which no setting names",
            "unused shards, which no setting names",
            self.unused_shards,
        )


def check(patterns: Patterns, tokenizer: Tokenizer, config: Config, options: CheckOptions) -> CheckReport:
    """Check the content of shards, and whether the order of their documents has the guaranteed properties.

    Documents that are longer than a row are reported, and planned with the length of a row.

    Raises:
        FileNotFoundError: a shard does not exist.
        ValueError: there is no usable sample.
    """
    shards, log = expand(patterns), options.log
    if options.inject == "duplicated_shard":
        patterns = [*patterns, shards[0]]
    config = config.model_copy(update={"data": config.data.model_copy(update={"cache_bytes": 0})})
    ensure_all(shards, tokenizer, config.data, options.workers, log)
    corpus = Corpus(patterns, tokenizer, config, options.autoencoder, cut_overlong=True)
    bad = list(corpus.bad)
    if options.decode:
        bad += undecodable(corpus, options.workers, log)
    seen, epoch = _epoch(_plan(corpus, 0, options.inject), log)
    return CheckReport(
        samples=len(corpus.samples),
        shards=len(corpus.dataset.shards),
        fingerprint=corpus.dataset.fingerprint,
        totals=totals(corpus),
        guarantees=Guarantees(
            _covered(seen, len(corpus.samples), len(corpus.dataset.counts)), *_same_order(corpus, options.inject, log)
        ),
        balance=_balance(epoch, options.world, config.data.row_length),
        duplicate_shards=copies(corpus),
        unused_shards=unused(corpus.dataset.shards, config),
        bad_samples=bad,
        duplicate_keys=duplicate_keys(corpus),
        overlong=corpus.dataset.overlong_documents(),
        overlong_remedy=overlong_remedy(config.data),
    )


def totals(corpus: Corpus) -> Totals:
    """Sums over all samples."""
    facts = [corpus.dataset.facts(shard) for shard in range(len(corpus.dataset.shards))]
    text, images, patches = (
        sum(int(getattr(part, name).sum()) for part in facts) for name in ("text", "images", "patches")
    )
    return Totals(text, images, patches)


def duplicate_keys(corpus: Corpus) -> list[str]:
    """Samples whose shard name and key occur more than once, in one shard or in two shards of the same name."""
    dataset = corpus.dataset
    names = []
    for number, shard in enumerate(dataset.shards):
        names += [f"{store.name(shard)}/{key}" for key in dataset.index(number).meta.duplicates]
    hashes = np.concatenate([dataset.facts(number).hashes for number in range(len(dataset.shards))])
    order = np.argsort(hashes, kind="stable")
    twice = order[1:][hashes[order][1:] == hashes[order][:-1]]
    return names + ["/".join(dataset.name(int(index))) for index in np.sort(twice)]


def copies(corpus: Corpus) -> list[str]:
    """Shards whose bytes equal those of an earlier one."""
    first: dict[str, str] = {}
    return [shard for shard, digest in zip(corpus.dataset.shards, corpus.dataset.hashes, strict=True)
            if first.setdefault(digest, shard) is not shard]  # fmt: skip


def unused(shards: Sequence[str], config: Config) -> list[str]:
    """Tar files in the folders of the shards that no setting names."""
    named = {Path(shard).resolve() for shard in shards}
    for patterns in (config.data.train, config.data.val, config.eval.judge, config.eval.test, config.eval.heldout):
        named |= {Path(shard).resolve() for shard in (expand(patterns) if patterns else [])}
    folders = {Path(shard).resolve().parent for shard in shards if not store.is_url(shard)}
    present = {path for folder in folders for path in folder.glob("*.tar*") if store.is_shard(path.name)}
    return sorted(str(path) for path in present - named)


_CORPUS: list[Corpus] = []


def _look(span: tuple[int, int]) -> list[BadRecord]:
    corpus, bad = _CORPUS[0], list[BadRecord]()
    for index in range(*span):
        try:
            corpus.decoded(0, index)
        except BadSample as error:
            shard, key = corpus.dataset.name(index)
            bad.append(BadRecord(shard, key, str(error)))
    return bad


def undecodable(corpus: Corpus, workers: int, log: Log) -> list[BadRecord]:
    """Every sample that is usable according to the index but cannot be decoded."""
    _CORPUS[:] = [corpus]  # inherited by the workers
    count = len(corpus.samples)
    spans = [(first, min(first + SPAN, count)) for first in range(0, count, SPAN)]
    bad: list[BadRecord] = []
    with ExitStack() as stack:
        progress = stack.enter_context(Progress("decoding", "samples", count, log))
        results = stack.enter_context(pool_of(workers)).map(_look, spans) if workers > 1 else map(_look, spans)
        for span, records in zip(spans, results, strict=True):
            bad += records
            progress.done = span[1]
    return bad


def _plan(corpus: Corpus, rank: int, inject: str | None) -> Plan:
    """The plan as a rank makes it, with the injected fault, if any."""
    plan = corpus.plan
    kind = _Dropping if inject == "dropped_carry" else Plan
    mixture = plan.mixture
    if inject == "per_rank_seed" and rank:
        mixture = type(mixture)(corpus.dataset.counts, corpus.dataset.weights, rank, mixture.block)
    return kind(mixture, plan.window, plan.row_length, plan.lengths)


def _same_order(corpus: Corpus, inject: str | None, log: Log) -> tuple[bool, bool]:
    """Whether the global order is the same for any number of ranks, and whether it is the same after resuming."""
    with Progress("comparing orders", "runs", len(WORLDS) + len(RESUMES), log, quiet=True) as progress:
        return _compared(corpus, inject, progress)


def _compared(corpus: Corpus, inject: str | None, progress: Progress) -> tuple[bool, bool]:
    rows, last = corpus.config.train.batch_rows, STEPS
    whole = list(planned_steps(_plan(corpus, 0, inject), rows, 0, last, Position()))
    reference = [_digest(step.rows) for step in whole]
    worlds = []
    for world in progress.each(WORLDS):
        shares = (_seen(_plan(corpus, rank, inject), rows, last, rank, world) for rank in range(world))
        worlds.append([_dealt(parts) for parts in zip(*shares, strict=True)] == reference)
    resumed = []
    for at in progress.each(RESUMES):
        after = whole[at - 1 + (inject == "off_by_one")].after
        rest = planned_steps(_plan(corpus, 0, inject), rows, at, last, after)
        resumed.append([_digest(step.rows) for step in rest] == reference[at:])
    return all(worlds), all(resumed)


def _seen(plan: Plan, rows: int, last: int, rank: int, world: int) -> Iterator[list[PlannedRow]]:
    for step in planned_steps(plan, rows, 0, last, Position()):
        yield step.rows[rank::world]


def _dealt(shares: Sequence[list[PlannedRow]]) -> str:
    """Digest of a global step that is reassembled from the shares of all ranks."""
    world = len(shares)
    return _digest([shares[i % world][i // world] for i in range(sum(map(len, shares)))])


def _digest(rows: Sequence[PlannedRow]) -> str:
    facts = repr([[(d.epoch, d.index, d.length, d.images, d.form) for d in row] for row in rows])
    return hashlib.sha256(facts.encode()).hexdigest()


def _epoch(plan: Plan, log: Log) -> tuple[Counter[int], list[PlannedRow]]:
    """The count of each sample in an epoch, and the epoch's rows; of a very large epoch its first part."""
    rows, seen = [], Counter[int]()
    with Progress("planning an epoch", "samples", min(plan.count, COVERED), log, quiet=True) as progress:
        for row in plan.epoch_rows(0):
            rows.append(row)
            seen.update(document.index for document in row)
            progress.done = len(seen)
            if len(seen) >= COVERED:
                break
    return seen, rows


def _covered(seen: Counter[int], count: int, sources: int) -> bool:
    if sources > 1:  # a mixture repeats small sources and skips a part of large ones
        return sum(seen.values()) == count
    return max(seen.values()) == 1 and (len(seen) == count or len(seen) >= COVERED)


def _balance(rows: list[PlannedRow], world: int, row_length: int) -> Balance:
    positions = np.array([sum(d.length for d in row) for row in rows])
    images = np.array([sum(d.images for d in row) for row in rows])
    lengths = [length for _, length in sorted((d.index, d.length) for row in rows for d in row)]
    share = [positions[rank::world].sum() for rank in range(world)]
    pictures = [images[rank::world].sum() for rank in range(world)]
    return Balance(
        rows=len(rows),
        fill=float(positions.sum() / (len(rows) * row_length)),
        fill_greedy=greedy_fill(lengths, row_length),
        fill_padded=float(np.mean(lengths) / max(lengths)),
        rank_positions_min_over_max=float(min(share) / max(share)) if max(share) else 1.0,
        rank_images_min_over_max=float(min(pictures) / max(pictures)) if max(pictures) else 1.0,
    )


def greedy_fill(lengths: Sequence[int], row_length: int) -> float:
    """Fill of rows that take documents in the given order; a row is closed at the first document that does not fit."""
    rows, used = 1, 0
    for length in lengths:
        if used + length > row_length:
            rows, used = rows + 1, 0
        used += length
    return sum(lengths) / (rows * row_length)


@dataclass(frozen=True)
class IndexReport:
    """The result of `mmgen data index`."""

    shards: int
    samples: int
    bad: int
    duplicates: int
    left_out: int
    """Samples that `data.where` leaves out."""
    left_out_because: dict[str, int]
    fingerprint: str

    def as_dict(self) -> dict[str, object]:
        """The fields as a dictionary, for JSON."""
        return asdict(self)


def index_shards(patterns: Patterns, tokenizer: Tokenizer, config: Config, workers: int, log: Log) -> IndexReport:
    """Index all shards that have no index."""
    shards = expand(patterns)
    ensure_all(shards, tokenizer, config.data, workers, log)
    indexes = [ensure(shard, tokenizer, config.data) for shard in shards]
    unwanted = sum((Counter(index.meta.unwanted) for index in indexes), Counter[str]())
    facts = "\n".join(f"{store.name(s)} {index.meta.sha256}" for s, index in zip(shards, indexes, strict=True))
    return IndexReport(
        shards=len(shards),
        samples=sum(index.count for index in indexes),
        bad=sum(len(index.meta.bad) for index in indexes),
        duplicates=sum(len(index.meta.duplicates) for index in indexes),
        left_out=unwanted.total(),
        left_out_because=dict(unwanted),
        fingerprint=hashlib.sha256(facts.encode()).hexdigest(),
    )
