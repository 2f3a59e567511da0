"""All shards of all sources as one numbered set of samples, with what planning needs to know of them."""

from __future__ import annotations

import hashlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mmgen.config import Config, PatcherConfig, SourceConfig
from mmgen.data.order import Hashes, Ints, uniform
from mmgen.data.shards import store
from mmgen.data.shards.index import TEXT, ShardIndex, ensure, ensure_all, load, tokens_column
from mmgen.data.shards.pictures import STORED
from mmgen.data.shards.samples import BadRecord, Sample
from mmgen.data.shards.store import Patterns, expand
from mmgen.image.resize import nearest_size
from mmgen.objective import build_layout
from mmgen.sequence.tokenizer import Tokenizer

OPEN_SHARDS = 256
"""Shards whose facts a process keeps."""
CHECKED = 1 << 20
"""Samples up to which lengths are checked before a run; beyond, a document that is too long stops it when planned."""
AS_WRITTEN, CAPTION_FIRST, IMAGE_FIRST, DROPPED = range(4)


@dataclass(frozen=True)
class Facts:
    """Per sample what its length follows from; arrays of shape [n]."""

    hashes: Hashes
    paired: NDArray[np.bool_]
    text: Ints
    """Tokens of all its text."""
    tail: Ints
    """Tokens of the text behind its last image."""
    images: Ints
    patches: Ints
    learned_images: Ints
    """Images that have a loss."""
    learned_patches: Ints

    def take(self, places: Ints) -> Facts:
        """Those of some samples."""
        return Facts(*(column[places] for column in vars(self).values()))


class Columns(Protocol):
    """What facts are computed from: the columns of an index, in a file or in memory."""

    count: int

    def column(self, name: str) -> NDArray[Any]:
        """One column."""


def patch_grids(index: Columns, patcher: PatcherConfig) -> Ints:
    """The patch grid [s, 2] of each segment, (0, 0) at text."""
    sizes = np.stack([index.column("height_s"), index.column("width_s")], axis=1).astype(np.int64)
    declared = np.array(patcher.grids, dtype=np.int64)
    grids = np.zeros_like(sizes)
    kinds = index.column("kind_s")
    for stored in STORED.values():
        sizes[kinds == stored.number] *= stored.cell_pixels(patcher)
    image = sizes[:, 0] > 0
    if image.any():
        grids[image] = declared[nearest_size(sizes[image], patcher.image_sizes)]
    return grids


def facts_of(index: Columns, tokens: str, grids: Ints) -> Facts:
    """Facts of all samples of an index; `tokens` names its column of text lengths."""
    kind, lengths = index.column("kind_s"), index.column(tokens).astype(np.int64)
    ends = index.column("segment_end_n")
    sample = np.repeat(np.arange(index.count), np.diff(ends, prepend=0))
    image = kind != TEXT
    last = np.full(index.count, -1)
    np.maximum.at(last, sample[image], np.flatnonzero(image))
    behind = (np.arange(len(kind)) > last[sample]) & ~image
    patches = grids.prod(axis=1)
    learned = image & (index.column("learn_s") > 0)

    def summed(values: NDArray[np.int64]) -> Ints:
        return np.bincount(sample, values, index.count).astype(np.int64)

    return Facts(
        index.column("key_hash_n"), index.column("paired_n").astype(bool),
        summed(lengths), summed(lengths * behind), summed(image.astype(np.int64)), summed(patches),
        summed(learned.astype(np.int64)), summed(patches * learned),
    )  # fmt: skip


class Measured(ABC):
    """Numbered samples whose documents have a form and a length in each epoch."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.copies = build_layout(config.objective, config.model.patcher).copies

    @abstractmethod
    def gather(self, indices: Ints) -> Facts:
        """Facts of any samples, in the order of `indices`."""

    @abstractmethod
    def name(self, index: int) -> tuple[str, str]:
        """Name of the shard, and key, of a sample."""

    def forms(self, epochs: Ints, facts: Facts) -> Ints:
        """The form of each sample in its epoch: decided before packing, by the sample's key."""
        data, seed = self.config.data, self.config.run.seed
        flip, drop = np.empty(len(epochs)), np.empty(len(epochs))
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            flip[here] = uniform(facts.hashes[here], seed, "flip", epoch)
            drop[here] = uniform(facts.hashes[here], seed, "drop", epoch)
        dropped = (facts.learned_images > 0) & ((drop < data.caption_drop) | (facts.text == 0))
        forms = np.where(dropped, DROPPED, np.where(facts.paired, CAPTION_FIRST, AS_WRITTEN))
        return np.where(facts.paired & (flip < data.image_first), IMAGE_FIRST, forms).astype(np.int64)

    def lengths(self, epochs: Ints, indices: Ints) -> tuple[Ints, Ints, Ints]:
        """(positions, learned images, form) of documents in their epochs; raises ValueError where one is too long."""
        facts = self.gather(indices)
        forms = self.forms(epochs, facts)
        text = np.where(forms == DROPPED, facts.tail, facts.text)
        return self._fit(indices, facts, text), facts.learned_images, forms

    def _fit(self, indices: Ints, facts: Facts, text: Ints) -> Ints:
        row_length = self.config.data.row_length
        # An image that is not learned has one copy, a clean one.
        around = 2 + 3 * facts.images + facts.patches + (self.copies - 1) * facts.learned_patches
        length = around + text
        worst = around if self.config.data.overlong == "truncate" else length
        if (worst > row_length).any():
            first = int(np.argmax(worst > row_length))
            shard, key = self.name(int(indices[first]))
            raise ValueError(
                f"sample {shard}/{key} needs {length[first]} positions but data.row_length is {row_length}: "
                "lengthen the row, shorten the caption, or set data.overlong to truncate"
            )
        fitted: Ints = np.minimum(length, row_length)
        return fitted


class Sources:
    """Shards with their weights."""

    def __init__(self, patterns: Patterns) -> None:
        plain = [pattern for pattern in patterns if isinstance(pattern, str)]
        parts = [SourceConfig(shards=plain)] if plain else []
        parts += [pattern for pattern in patterns if isinstance(pattern, SourceConfig)]
        self.shards = [expand(part.shards) for part in parts] if parts else [expand([])]
        self.weights = [part.weight for part in parts]


class Dataset(Measured):
    """The samples of some shards, through their indexes, which are made where they are missing.

    Raises:
        FileNotFoundError, ValueError: a shard is missing, holds no usable sample, or one too long for a row.
    """

    def __init__(self, patterns: Patterns, tokenizer: Tokenizer, config: Config) -> None:
        super().__init__(config)
        self.tokenizer = tokenizer
        sources = Sources(patterns)
        self.shards = [shard for part in sources.shards for shard in part]
        self.weights = sources.weights
        ensure_all(self.shards, tokenizer, config.data, report=_report)
        self.bad: list[BadRecord] = []
        self.hashes: list[str] = []
        self.pictures: str | None = None
        """A shard that holds images as pixels."""
        self.stored: dict[str, dict[str, str]] = {}
        """Kind of precomputed arrays to the fingerprint of what made them (empty where unknown) to a shard of such."""
        counts = []
        for shard in self.shards:
            index = ensure(shard, tokenizer, config.data)
            counts.append(index.count)
            self.bad += index.meta.bad
            self.hashes.append(index.meta.sha256)
            if index.meta.pictures:
                self.pictures = self.pictures or shard
            for kind, makers in index.meta.stored.items():
                for maker in makers:
                    self.stored.setdefault(kind, {}).setdefault(maker, shard)
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        ends = np.cumsum([0] + [len(part) for part in sources.shards])
        self.counts = [int(self.starts[b] - self.starts[a]) for a, b in pairwise(ends)]
        if not all(self.counts):
            why = ""
            if self.bad:
                first = self.bad[0]
                why = f": the first of {len(self.bad)} bad ones is {first.shard}/{first.key}: {first.reason}"
            raise ValueError(f"no usable sample in {', '.join(map(str, patterns))}{why}")
        self.index = lru_cache(OPEN_SHARDS)(self._index)
        self.facts = lru_cache(OPEN_SHARDS)(self._facts)
        self.grids = lru_cache(OPEN_SHARDS)(self._grids)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def fingerprint(self) -> str:
        """A name for the content of all shards in their order."""
        facts = (f"{store.name(shard)} {digest}" for shard, digest in zip(self.shards, self.hashes, strict=True))
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()

    def _index(self, shard: int) -> ShardIndex:
        return ensure(self.shards[shard], self.tokenizer, self.config.data)

    def _facts(self, shard: int) -> Facts:
        """Facts of all samples of one shard."""
        return facts_of(self.index(shard), tokens_column(self.tokenizer), self.grids(shard))

    def _grids(self, shard: int) -> Ints:
        """The patch grid [s, 2] of each segment of a shard, (0, 0) at text."""
        return patch_grids(self.index(shard), self.config.model.patcher)

    def where(self, index: int) -> tuple[int, int]:
        """Shard and place in it of a sample."""
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        return shard, index - int(self.starts[shard])

    def name(self, index: int) -> tuple[str, str]:
        """Name of the shard, and key, of a sample."""
        shard, place = self.where(index)
        return store.name(self.shards[shard]), self.index(shard).key(place)

    def sample(self, index: int) -> Sample:
        """A sample, its images still encoded; raises `BadSample`."""
        shard, place = self.where(index)
        return load(self.shards[shard], self.index(shard), place, self.config.data)

    def grids_of(self, index: int) -> list[tuple[int, int]]:
        """Patch grids of the images of a sample."""
        shard, place = self.where(index)
        ends = self.index(shard).column("segment_end_n")
        here = slice(int(ends[place - 1]) if place else 0, int(ends[place]))
        return [(rows, columns) for rows, columns in self.grids(shard)[here].tolist() if rows]

    def gather(self, indices: Ints) -> Facts:
        """Facts of any samples, in the order of `indices`."""
        shards = np.searchsorted(self.starts, indices, side="right") - 1
        order = np.argsort(shards, kind="stable")
        found, bounds = np.unique(shards[order], return_index=True)
        parts = [
            self.facts(int(shard)).take(indices[places] - self.starts[shard])
            for shard, places in zip(found, np.split(order, bounds[1:]), strict=True)
        ]
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return Facts(*(np.concatenate([vars(part)[name] for part in parts])[back] for name in vars(parts[0])))

    def refuse_overlong(self) -> None:
        """Raise ValueError for the first document that is longer than a row, where samples are few enough to look."""
        for shard in range(len(self.shards)) if len(self) <= CHECKED else ():
            facts = self.facts(shard)
            self._fit(np.arange(len(facts.text)) + self.starts[shard], facts, facts.text)


def _report(done: int, total: int) -> None:
    if total > 1 and (done == total or done % max(1, total // 10) == 0):
        print(f"indexed {done} of {total} shards (`mmgen data index` does it ahead)", file=sys.stderr, flush=True)


class Samples(Sequence[Sample]):
    """The samples of a data set, each read when it is asked for."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._dataset.sample(index)
