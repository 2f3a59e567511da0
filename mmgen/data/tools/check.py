"""`mmgen data check`: what is in the shards, what is lost, and whether the order keeps its promises.

The checks of the order run the planner as every rank would; `FAULTS` make it wrong, to see them fail.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from mmgen.config import Config
from mmgen.data.loader import Corpus, planned_steps
from mmgen.data.order import Plan, PlannedRow, Position
from mmgen.data.shards import store
from mmgen.data.shards.index import ensure, ensure_all
from mmgen.data.shards.samples import BadRecord, BadSample
from mmgen.data.shards.store import Patterns, expand
from mmgen.image.latent import AutoencoderFacts
from mmgen.sequence.tokenizer import Tokenizer

FAULTS = ("per_rank_seed", "dropped_carry", "off_by_one", "duplicated_shard")
WORLDS = (1, 2, 3, 4)
STEPS = 24
"""Global steps that are compared between numbers of ranks."""
COVERED = 1 << 20
"""Documents of an epoch that are counted one by one."""
FINDINGS = {
    "duplicate_keys": "duplicate",
    "duplicate_shards": "the same bytes as an earlier shard",
    "unused_shards": "unused",
}
SHOWN_KEYS = 1000
"""Duplicate keys that a report names."""
Progress = Callable[[str], None]


class _Dropping(Plan):
    """A fault: what a window leaves over is not carried into the next step."""

    def packed(self, epoch: int, window: int) -> list[PlannedRow]:
        return super().packed(epoch, window)[:-1]


@dataclass(frozen=True)
class CheckOptions:
    """How shards are checked."""

    report: Progress = lambda line: None
    """Called with a line of progress."""
    decode: bool = True
    """Decode every sample."""
    inject: str | None = None
    """One of `FAULTS`."""
    workers: int = 1
    world: int = 8
    """Ranks whose shares are balanced."""
    autoencoder: AutoencoderFacts | None = None
    """What is known of the autoencoder of stored latents."""

    def __post_init__(self) -> None:
        if self.inject is not None and self.inject not in FAULTS:
            raise ValueError(f"unknown fault '{self.inject}' (one of: {', '.join(FAULTS)})")


@dataclass(frozen=True)
class Totals:
    """What the samples hold."""

    text_tokens: int
    images: int
    patches: int


@dataclass(frozen=True)
class Promises:
    """What holds of the order in which documents are read."""

    coverage_exact: bool
    """Every epoch holds each sample once."""
    same_for_any_world: bool
    same_after_resume: bool

    @property
    def kept(self) -> bool:
        """All of them hold."""
        return self.coverage_exact and self.same_for_any_world and self.same_after_resume


@dataclass(frozen=True)
class Balance:
    """How full the rows of an epoch are, and how even the shares of ranks."""

    rows: int
    fill: float
    fill_greedy: float
    fill_padded: float
    rank_positions_min_over_max: float
    rank_images_min_over_max: float


@dataclass(frozen=True, kw_only=True)
class Report(ABC):
    """What `mmgen data check` finds, however shards are read."""

    samples: int
    shards: int
    fingerprint: str
    promises: Promises
    bad_samples: list[BadRecord]
    duplicate_keys: list[str]

    @property
    def holds(self) -> bool:
        """Nothing is bad."""
        return not self.bad_samples and not self.duplicate_keys and self.promises.kept

    @abstractmethod
    def details(self) -> dict[str, object]:
        """Further figures."""

    def figures(self) -> dict[str, object]:
        """Numbers and verdicts as one flat object."""
        return {
            "samples": self.samples,
            "bad": len(self.bad_samples),
            "duplicates": len(self.duplicate_keys),
            "shards": self.shards,
            "fingerprint": self.fingerprint,
            **self.details(),
            **asdict(self.promises),
            "holds": self.holds,
        }

    def lists(self) -> dict[str, list[str]]:
        """Names of shards and keys that were found, by what was found."""
        return {"duplicate_keys": self.duplicate_keys[:SHOWN_KEYS]}

    def findings(self) -> Iterator[str]:
        """What was found, a line each."""
        for bad in self.bad_samples:
            yield f"bad: {bad.shard}/{bad.key}: {bad.reason}"
        for found, names in self.lists().items():
            yield from (f"{FINDINGS[found]}: {name}" for name in names)

    def as_dict(self) -> dict[str, object]:
        """All of it for JSON."""
        return {**self.figures(), "bad_samples": [bad.as_dict() for bad in self.bad_samples], **self.lists()}


@dataclass(frozen=True, kw_only=True)
class CheckReport(Report):
    """Of shards that have an index."""

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


def check(patterns: Patterns, tokenizer: Tokenizer, config: Config, options: CheckOptions) -> CheckReport:
    """What is in some shards, what is lost, and whether the order keeps its promises.

    Raises:
        ValueError, FileNotFoundError: a missing shard, or no usable sample at all.
    """
    shards, report = expand(patterns), options.report
    if options.inject == "duplicated_shard":
        patterns = [*patterns, shards[0]]
    config = config.model_copy(update={"data": config.data.model_copy(update={"cache_bytes": 0})})
    ensure_all(shards, tokenizer, config.data, options.workers, _indexing(report))
    corpus = Corpus(patterns, tokenizer, config, options.autoencoder)
    bad = list(corpus.bad)
    if options.decode:
        bad += undecodable(corpus, options.workers, report)
    seen, epoch = _epoch(_plan(corpus, 0, options.inject))
    return CheckReport(
        samples=len(corpus.samples),
        shards=len(corpus.dataset.shards),
        fingerprint=corpus.dataset.fingerprint,
        totals=totals(corpus),
        promises=Promises(
            _covered(seen, len(corpus.samples), len(corpus.dataset.counts)), *_same_order(corpus, options.inject)
        ),
        balance=_balance(epoch, options.world, config.data.row_length),
        duplicate_shards=copies(corpus),
        unused_shards=unused(corpus.dataset.shards, config),
        bad_samples=bad,
        duplicate_keys=duplicate_keys(corpus),
    )


def _indexing(report: Progress) -> Callable[[int, int], None]:
    return lambda done, total: report(f"indexed {done} of {total} shards")


def totals(corpus: Corpus) -> Totals:
    """What the samples hold."""
    facts = [corpus.dataset.facts(shard) for shard in range(len(corpus.dataset.shards))]
    text, images, patches = (
        sum(int(getattr(part, name).sum()) for part in facts) for name in ("text", "images", "patches")
    )
    return Totals(text, images, patches)


def duplicate_keys(corpus: Corpus) -> list[str]:
    """Samples whose shard name and key occur more than once, inside a shard or in two of one name."""
    dataset = corpus.dataset
    found = []
    for number, shard in enumerate(dataset.shards):
        found += [f"{store.name(shard)}/{key}" for key in dataset.index(number).meta.duplicates]
    hashes = np.concatenate([dataset.facts(number).hashes for number in range(len(dataset.shards))])
    order = np.argsort(hashes, kind="stable")
    twice = order[1:][hashes[order][1:] == hashes[order][:-1]]
    return found + ["/".join(dataset.name(int(index))) for index in np.sort(twice)]


def copies(corpus: Corpus) -> list[str]:
    """Shards whose bytes equal those of an earlier one."""
    first: dict[str, str] = {}
    return [shard for shard, digest in zip(corpus.dataset.shards, corpus.dataset.hashes, strict=True)
            if first.setdefault(digest, shard) is not shard]  # fmt: skip


def unused(shards: Sequence[str], config: Config) -> list[str]:
    """Tar files that are beside the shards and that no setting names."""
    named = {Path(shard).resolve() for shard in shards}
    for patterns in (config.data.train, config.data.val, config.eval.judge, config.eval.test, config.eval.heldout):
        named |= {Path(shard).resolve() for shard in (expand(patterns) if patterns else [])}
    folders = {Path(shard).resolve().parent for shard in shards if not store.is_url(shard)}
    beside = {path for folder in folders for path in folder.glob("*.tar*") if store.is_shard(path.name)}
    return sorted(str(path) for path in beside - named)


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


def undecodable(corpus: Corpus, workers: int, report: Progress) -> list[BadRecord]:
    """Every sample that the index takes for sound but that cannot be decoded."""
    _CORPUS[:] = [corpus]  # inherited by the workers
    bounds = [*range(0, len(corpus.samples), 2048), len(corpus.samples)]
    spans = list(pairwise(bounds))
    bad: list[BadRecord] = []
    if workers < 2:
        for span in spans:
            bad += _look(span)
            report(f"decoded {span[1]} of {len(corpus.samples)} samples")
        return bad
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        for span, found in zip(spans, pool.map(_look, spans), strict=True):
            bad += found
            report(f"decoded {span[1]} of {len(corpus.samples)} samples")
    return bad


def _plan(corpus: Corpus, rank: int, inject: str | None) -> Plan:
    """The plan as a rank makes it, with a fault where one is injected."""
    plan = corpus.plan
    kind = _Dropping if inject == "dropped_carry" else Plan
    mixture = plan.mixture
    if inject == "per_rank_seed" and rank:
        mixture = type(mixture)(corpus.dataset.counts, corpus.dataset.weights, rank, mixture.block)
    return kind(mixture, plan.window, plan.row_length, plan.lengths)


def _same_order(corpus: Corpus, inject: str | None) -> tuple[bool, bool]:
    """Whether ranks of any number see one global order, and whether resumed runs do."""
    rows, last = corpus.config.train.batch_rows, STEPS
    whole = list(planned_steps(_plan(corpus, 0, inject), rows, 0, last, Position()))
    reference = [_digest(step.rows) for step in whole]
    worlds = []
    for world in WORLDS:
        shares = (_seen(_plan(corpus, rank, inject), rows, last, rank, world) for rank in range(world))
        worlds.append([_dealt(parts) for parts in zip(*shares, strict=True)] == reference)
    resumed = []
    for at in (1, last // 2, last - 1):
        after = whole[at - 1 + (inject == "off_by_one")].after
        rest = planned_steps(_plan(corpus, 0, inject), rows, at, last, after)
        resumed.append([_digest(step.rows) for step in rest] == reference[at:])
    return all(worlds), all(resumed)


def _seen(plan: Plan, rows: int, last: int, rank: int, world: int) -> Iterator[list[PlannedRow]]:
    for step in planned_steps(plan, rows, 0, last, Position()):
        yield step.rows[rank::world]


def _dealt(shares: Sequence[list[PlannedRow]]) -> str:
    """Digest of a global step put together from what each rank holds."""
    world = len(shares)
    return _digest([shares[i % world][i // world] for i in range(sum(map(len, shares)))])


def _digest(rows: Sequence[PlannedRow]) -> str:
    said = repr([[(d.epoch, d.index, d.length, d.images, d.form) for d in row] for row in rows])
    return hashlib.sha256(said.encode()).hexdigest()


def _epoch(plan: Plan) -> tuple[Counter[int], list[PlannedRow]]:
    """How often each sample occurs in an epoch, and its rows (the first part of it where there are very many)."""
    rows, seen = [], Counter[int]()
    for row in plan.epoch_rows(0):
        rows.append(row)
        seen.update(document.index for document in row)
        if len(seen) >= COVERED:
            break
    return seen, rows


def _covered(seen: Counter[int], count: int, sources: int) -> bool:
    if sources > 1:  # a mixture repeats small sources and leaves large ones
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
    """Fill of rows that take documents in the given order and close at the first that does not fit."""
    rows, used = 1, 0
    for length in lengths:
        if used + length > row_length:
            rows, used = rows + 1, 0
        used += length
    return sum(lengths) / (rows * row_length)


@dataclass(frozen=True)
class IndexReport:
    """What `mmgen data index` finds."""

    shards: int
    samples: int
    bad: int
    duplicates: int
    fingerprint: str

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def index_shards(
    patterns: Patterns, tokenizer: Tokenizer, config: Config, workers: int, report: Progress
) -> IndexReport:
    """Index all shards."""
    shards = expand(patterns)
    ensure_all(shards, tokenizer, config.data, workers, _indexing(report))
    found = [ensure(shard, tokenizer, config.data) for shard in shards]
    facts = "\n".join(f"{store.name(s)} {index.meta.sha256}" for s, index in zip(shards, found, strict=True))
    return IndexReport(
        shards=len(shards),
        samples=sum(index.count for index in found),
        bad=sum(len(index.meta.bad) for index in found),
        duplicates=sum(len(index.meta.duplicates) for index in found),
        fingerprint=hashlib.sha256(facts.encode()).hexdigest(),
    )
