"""`mmgen data check`: what is in the shards, what is lost, and whether the order keeps its promises.

The checks of the order run the planner as every rank would; `FAULTS` make it wrong, to see them fail.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from mmgen.config import Config
from mmgen.data.loader import Corpus, Planned, planned_steps
from mmgen.data.order import Plan, PlannedRow, Position
from mmgen.data.shards import store
from mmgen.data.shards.index import ensure, ensure_all
from mmgen.data.shards.samples import Bad, BadSample
from mmgen.data.shards.store import Patterns, expand
from mmgen.sequence.tokenizer import Tokenizer

FAULTS = ("per_rank_seed", "dropped_carry", "off_by_one", "duplicated_shard")
WORLDS = (1, 2, 3, 4)
STEPS = 24
"""Global steps that are compared between numbers of ranks."""
COVERED = 1 << 20
"""Documents of an epoch that are counted one by one."""
Tell = Callable[[str], None]


class _Dropping(Plan):
    """A fault: what a window leaves over is not carried into the next step."""

    def packed(self, epoch: int, window: int) -> list[PlannedRow]:
        return super().packed(epoch, window)[:-1]


def check(
    patterns: Patterns,
    tokenizer: Tokenizer,
    config: Config,
    tell: Tell,
    decode: bool = True,
    inject: str | None = None,
    workers: int = 1,
    world: int = 8,
) -> dict[str, Any]:
    """A flat report of some shards; its `holds` is False where anything is bad.

    Raises:
        ValueError, FileNotFoundError: an unknown fault, a missing shard, or no usable sample at all.
    """
    if inject is not None and inject not in FAULTS:
        raise ValueError(f"unknown fault '{inject}' (one of: {', '.join(FAULTS)})")
    shards = expand(patterns)
    if inject == "duplicated_shard":
        patterns = [*patterns, shards[0]]
    config = config.model_copy(update={"data": config.data.model_copy(update={"cache_bytes": 0})})
    ensure_all(shards, tokenizer, config.data, workers, lambda done, all_: tell(f"indexed {done} of {all_} shards"))
    corpus = Corpus(patterns, tokenizer, config)
    bad = list(corpus.bad)
    if decode:
        bad += undecodable(corpus, workers, tell)
    duplicates = duplicate_keys(corpus)
    report: dict[str, Any] = {
        "samples": len(corpus.samples),
        "bad": len(bad),
        "duplicates": len(duplicates),
        "shards": len(corpus.dataset.shards),
        "fingerprint": corpus.dataset.fingerprint,
        **totals(corpus),
        **order_of(corpus, world, inject),
        "duplicate_shards": copies(corpus),
        "unused_shards": unused(corpus.dataset.shards, config),
        "bad_samples": bad,
        "duplicate_keys": duplicates[:1000],
    }
    kept = ("coverage_exact", "same_for_any_world", "same_after_resume")
    report["holds"] = (
        not bad and not duplicates and not report["duplicate_shards"] and all(report[name] for name in kept)
    )
    return report


def totals(corpus: Corpus) -> dict[str, int]:
    """What the samples hold."""
    names = {"text": "text_tokens", "images": "images", "patches": "patches"}
    found = dict.fromkeys(names.values(), 0)
    for shard in range(len(corpus.dataset.shards)):
        facts = corpus.dataset.facts(shard)
        for name, label in names.items():
            found[label] += int(vars(facts)[name].sum())
    return found


def duplicate_keys(corpus: Corpus) -> list[str]:
    """Samples whose shard name and key occur more than once, inside a shard or in two of one name."""
    dataset = corpus.dataset
    found = []
    for number, shard in enumerate(dataset.shards):
        found += [f"{store.name(shard)}/{key}" for key in dataset.index(number).meta["duplicates"]]
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
    """Tar files that lie beside the shards and that no setting names."""
    named = {Path(shard).resolve() for shard in shards}
    for patterns in (config.data.train, config.data.val, config.eval.judge, config.eval.test, config.eval.heldout):
        named |= {Path(shard).resolve() for shard in (expand(patterns) if patterns else [])}
    folders = {Path(shard).resolve().parent for shard in shards if not store.is_url(shard)}
    beside = {path for folder in folders for path in folder.glob("*.tar*") if store.is_shard(path.name)}
    return sorted(str(path) for path in beside - named)


_CORPUS: list[Corpus] = []


def _look(span: tuple[int, int]) -> list[Bad]:
    corpus, bad = _CORPUS[0], list[Bad]()
    for index in range(*span):
        try:
            corpus.decoded(0, index)
        except BadSample as error:
            shard, key = corpus.dataset.name(index)
            bad.append({"shard": shard, "key": key, "reason": str(error)})
    return bad


def undecodable(corpus: Corpus, workers: int, tell: Tell) -> list[Bad]:
    """Every sample that the index takes for sound but that cannot be decoded."""
    _CORPUS[:] = [corpus]  # inherited by the workers
    bounds = [*range(0, len(corpus.samples), 2048), len(corpus.samples)]
    spans = list(pairwise(bounds))
    bad: list[Bad] = []
    if workers < 2:
        for span in spans:
            bad += _look(span)
            tell(f"decoded {span[1]} of {len(corpus.samples)} samples")
        return bad
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        for span, found in zip(spans, pool.map(_look, spans), strict=True):
            bad += found
            tell(f"decoded {span[1]} of {len(corpus.samples)} samples")
    return bad


def order_of(corpus: Corpus, world: int, inject: str | None) -> dict[str, Any]:
    """Whether every epoch holds each sample once, and whether ranks and resumed runs see one global order."""
    rows = corpus.config.train.batch_rows
    last = STEPS

    def plan_of(rank: int) -> Plan:
        plan = corpus.plan
        kind = _Dropping if inject == "dropped_carry" else Plan
        mixture = plan.mixture
        if inject == "per_rank_seed" and rank:
            mixture = type(mixture)(corpus.dataset.counts, corpus.dataset.weights, rank, mixture.block)
        return kind(mixture, plan.window, plan.row_length, plan.lengths)

    whole = list(planned_steps(plan_of(0), rows, 0, last, Position()))
    worlds = {n: [_dealt(parts) for parts in zip(*(_seen(plan_of(r), rows, last, r, n) for r in range(n)), strict=True)]
              for n in WORLDS}  # fmt: skip
    reference = [_digest(step[1]) for step in whole]
    resumed = []
    for at in (1, last // 2, last - 1):
        after = whole[at - 1 + (inject == "off_by_one")][2]
        rest = planned_steps(plan_of(0), rows, at, last, after)
        resumed.append([_digest(step[1]) for step in rest] == reference[at:])
    seen, epoch = _epoch(plan_of(0))
    return {
        "same_for_any_world": all(digests == reference for digests in worlds.values()),
        "same_after_resume": all(resumed),
        "coverage_exact": _covered(seen, len(corpus.samples), len(corpus.dataset.counts)),
        **_balance(epoch, world, corpus.config.data.row_length),
    }


def _seen(plan: Plan, rows: int, last: int, rank: int, world: int) -> Iterator[list[PlannedRow]]:
    steps: Iterator[Planned] = planned_steps(plan, rows, 0, last, Position())
    for _, planned, _ in steps:
        yield planned[rank::world]


def _dealt(shares: Sequence[list[PlannedRow]]) -> str:
    """Digest of a global step put together from what each rank holds."""
    world = len(shares)
    return _digest([shares[i % world][i // world] for i in range(sum(map(len, shares)))])


def _digest(rows: Sequence[PlannedRow]) -> str:
    said = repr([[(d.epoch, d.index, d.length, d.images, d.form) for d in row] for row in rows])
    return hashlib.sha256(said.encode()).hexdigest()


def _epoch(plan: Plan) -> tuple[Counter[int], list[PlannedRow]]:
    """How often each sample stands in an epoch, and its rows (the first part of it where there are very many)."""
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


def _balance(rows: list[PlannedRow], world: int, row_length: int) -> dict[str, float]:
    positions = np.array([sum(d.length for d in row) for row in rows])
    images = np.array([sum(d.images for d in row) for row in rows])
    lengths = [length for _, length in sorted((d.index, d.length) for row in rows for d in row)]
    share = [positions[rank::world].sum() for rank in range(world)]
    pictures = [images[rank::world].sum() for rank in range(world)]
    return {
        "rows": len(rows),
        "fill": float(positions.sum() / (len(rows) * row_length)),
        "fill_greedy": greedy_fill(lengths, row_length),
        "fill_padded": float(np.mean(lengths) / max(lengths)),
        "rank_positions_min_over_max": float(min(share) / max(share)) if max(share) else 1.0,
        "rank_images_min_over_max": float(min(pictures) / max(pictures)) if max(pictures) else 1.0,
    }


def greedy_fill(lengths: Sequence[int], row_length: int) -> float:
    """Fill of rows that take documents in the given order and close at the first that does not fit."""
    rows, used = 1, 0
    for length in lengths:
        if used + length > row_length:
            rows, used = rows + 1, 0
        used += length
    return sum(lengths) / (rows * row_length)


def index_shards(patterns: Patterns, tokenizer: Tokenizer, config: Config, workers: int, tell: Tell) -> dict[str, Any]:
    """Index all shards; returns what was found."""
    shards = expand(patterns)
    ensure_all(shards, tokenizer, config.data, workers, lambda done, all_: tell(f"indexed {done} of {all_} shards"))
    found = [ensure(shard, tokenizer, config.data) for shard in shards]
    facts = "\n".join(f"{store.name(s)} {index.meta['sha256']}" for s, index in zip(shards, found, strict=True))
    return {
        "shards": len(shards),
        "samples": sum(index.count for index in found),
        "bad": sum(len(index.meta["bad"]) for index in found),
        "duplicates": sum(len(index.meta["duplicates"]) for index in found),
        "fingerprint": hashlib.sha256(facts.encode()).hexdigest(),
    }
