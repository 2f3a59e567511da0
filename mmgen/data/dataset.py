"""All shards of all sources as one numbered set of samples, with the facts that planning needs."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mmgen.config import Config, DataConfig, PatcherConfig, SourceConfig
from mmgen.data.order import Hashes, Ints, uniform
from mmgen.data.progress import Progress
from mmgen.data.shards import store
from mmgen.data.shards.index import TEXT, ShardIndex, ensure, ensure_all, load, tokens_column
from mmgen.data.shards.pictures import STORED
from mmgen.data.shards.samples import BadRecord, Sample
from mmgen.data.shards.store import Patterns, expand
from mmgen.image.resize import nearest_size
from mmgen.objective import build_layout
from mmgen.sequence.tokenizer import Tokenizer

OPEN_SHARDS = 256
"""Number of shards whose facts a process caches."""
CHECKED = 1 << 20
"""Largest data set whose document lengths are checked before a run, in samples. In a larger one, a document that is too
long stops the run when it is planned."""
(
    AS_WRITTEN, CAPTION_FIRST, IMAGE_FIRST, DROPPED, IMAGES_DROPPED, ALONE, CAPTION_FIRST_COPIED, DROPPED_COPIED,
) = range(8)  # fmt: skip
"""Forms of a document: three orders, without its text, with only its last learned image, and that image alone; and,
where images have clean copies, two forms in which also the last image of a captioned image has one."""
ONE_IMAGE = (IMAGES_DROPPED, ALONE)
"""Forms that keep one image."""
NO_TEXT = (DROPPED, DROPPED_COPIED, ALONE)
"""Forms that keep no text."""
SHORT = (CAPTION_FIRST, DROPPED)
"""Forms in which the last image has no clean copy. Only EOS would read it, and EOS is not learned there."""
COPIED = 0.125
"""Share of captioned images whose last image has a clean copy, as in sampling, so that EOS is learned after it."""


@dataclass(frozen=True)
class Facts:
    """The numbers from which the document lengths of n samples are computed; arrays of shape [n]."""

    hashes: Hashes
    paired: NDArray[np.bool_]
    text: Ints
    """Tokens of all text."""
    images: Ints
    patches: Ints
    learned_images: Ints
    """Images that have a loss."""
    learned_patches: Ints
    target_patches: Ints
    """Patches of the last learned image; 0 if there is none."""

    def take(self, selected: Ints) -> Facts:
        """The facts of the selected samples."""
        return Facts(*(column[selected] for column in vars(self).values()))


class Columns(Protocol):
    """The columns of an index, in a file or in memory, from which facts are computed."""

    count: int

    def column(self, name: str) -> NDArray[Any]:
        """The column of this name."""


def patch_grids(index: Columns, patcher: PatcherConfig) -> Ints:
    """The patch grid (rows, columns) of each segment as an array [s, 2]; (0, 0) for text."""
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
    """The facts of all samples of an index; `tokens` is the name of its column of text lengths."""
    kind, lengths = index.column("kind_s"), index.column(tokens).astype(np.int64)
    ends = index.column("segment_end_n")
    sample = np.repeat(np.arange(index.count), np.diff(ends, prepend=0))
    image = kind != TEXT
    patches = grids.prod(axis=1)
    learned = image & (index.column("learn_s") > 0)
    target = np.full(index.count, -1)
    np.maximum.at(target, sample[learned], np.flatnonzero(learned))
    target_patches = np.where(target < 0, 0, patches[target] if len(kind) else 0)

    def summed(values: NDArray[np.int64]) -> Ints:
        return np.bincount(sample, values, index.count).astype(np.int64)

    return Facts(
        index.column("key_hash_n"), index.column("paired_n").astype(bool),
        summed(lengths), summed(image.astype(np.int64)), summed(patches),
        summed(learned.astype(np.int64)), summed(patches * learned), target_patches.astype(np.int64),
    )  # fmt: skip


class Measured(ABC):
    """Numbered samples whose documents have a form and a length in each epoch.

    `framing` is the number of positions of BOS and EOS. With `cut_overlong`, a document that is longer than a row has
    the length of a row instead of raising ValueError.
    """

    def __init__(self, config: Config, framing: int, cut_overlong: bool = False) -> None:
        self.config, self.framing, self.cut_overlong = config, framing, cut_overlong
        layout = build_layout(config.objective)
        self.copies, self.lead = layout.copies, layout.lead

    @abstractmethod
    def gather(self, indices: Ints) -> Facts:
        """The facts of some samples, in the order of `indices`."""

    @abstractmethod
    def name(self, index: int) -> tuple[str, str]:
        """Shard name and key of a sample."""

    def forms(self, epochs: Ints, facts: Facts) -> Ints:
        """The form of each sample in its epoch. It depends on the sample's key and is drawn before packing."""
        data, seed = self.config.data, self.config.run.seed
        flip, drop, ending = np.zeros((3, len(epochs)))
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            flip[here] = uniform(facts.hashes[here], seed, "flip", epoch)
            drop[here] = uniform(facts.hashes[here], seed, "drop", epoch)
            if self.copies > 1:
                ending[here] = uniform(facts.hashes[here], seed, "ending", epoch)
        # What is dropped: text (0), the other images (1), both (2) or nothing (3).
        kind = np.searchsorted(np.cumsum([data.caption_drop, data.image_drop, data.prompt_drop]), drop, side="right")
        learned, several = facts.learned_images > 0, facts.images > 1
        forms = np.where(facts.paired, CAPTION_FIRST, AS_WRITTEN)
        forms = np.where(learned & several & (kind == 1), IMAGES_DROPPED, forms)
        forms = np.where(learned & ((kind == 0) | (kind == 2) | (facts.text == 0)), DROPPED, forms)
        forms = np.where(learned & several & (kind == 2), ALONE, forms)
        if self.copies > 1:
            # Only EOS follows the image of a caption. Elsewhere text or an image may follow, and EOS is learned no less
            # often.
            single = facts.paired | ((facts.images == 1) & (facts.text == 0))
            copied = ~single | (ending < COPIED)
            forms = np.where(copied & (forms == CAPTION_FIRST), CAPTION_FIRST_COPIED, forms)
            forms = np.where(copied & (forms == DROPPED), DROPPED_COPIED, forms)
        return np.where(facts.paired & (flip < data.image_first), IMAGE_FIRST, forms).astype(np.int64)

    def lengths(self, epochs: Ints, indices: Ints) -> tuple[Ints, Ints, Ints]:
        """(positions, learned images, form) of documents in their epochs.

        Raises:
            ValueError: a document is longer than a row and is not to be cut.
        """
        facts = self.gather(indices)
        forms = self.forms(epochs, facts)
        text = np.where(np.isin(forms, NO_TEXT), 0, facts.text)
        if not self.cut_overlong and (documents := self.overlong(indices, facts, text, forms)):
            raise ValueError(refusal(documents, self.config.data))
        fitted: Ints = np.minimum(self._around_text(facts, forms) + text, self.config.data.row_length)
        return fitted, np.where(np.isin(forms, ONE_IMAGE), 1, facts.learned_images), forms

    def overlong(
        self, indices: Ints, facts: Facts, text: Ints | None = None, forms: Ints | None = None
    ) -> list[Overlong]:
        """The documents that do not fit into a row with `text` tokens of text and these forms.

        By default they have all their text and the form that needs the most positions.

        With `data.overlong: truncate`, these are the documents that do not fit without any text.
        """
        around = self._around_text(facts, forms)
        length = around + (facts.text if text is None else text)
        least = around if self.config.data.overlong == "truncate" else length
        too_long = np.flatnonzero(least > self.config.data.row_length).tolist()
        return [Overlong(*self.name(int(indices[i])), int(least[i])) for i in too_long]

    def _around_text(self, facts: Facts, forms: Ints | None) -> Ints:
        """Positions of each document without its text, by default in the form that needs the most."""
        images, patches = facts.images, facts.patches
        copied, learned = facts.learned_patches, facts.learned_images
        if forms is not None:
            one, short = np.isin(forms, ONE_IMAGE), np.isin(forms, SHORT)
            images, patches = np.where(one, 1, images), np.where(one, facts.target_patches, patches)
            copied, learned = np.where(one, patches, copied), np.where(one, 1, learned)
            copied, learned = np.where(short, 0, copied), np.where(short, 0, learned)  # they have one image
        # An image that is not learned has one copy, a clean one.
        positions: Ints = self.framing + (3 + self.lead) * images + patches
        return positions + (self.copies - 1) * (copied + self.lead * learned)


@dataclass(frozen=True)
class Overlong:
    """A document that does not fit into a row."""

    shard: str
    key: str
    positions: int
    """Positions that it needs."""


def refusal(documents: Sequence[Overlong], data: DataConfig) -> str:
    """The error message for documents that are longer than a row."""
    first, longest = documents[0], max(document.positions for document in documents)
    others = (
        f" ({len(documents)} documents are longer than a row; the longest needs {longest})"
        if len(documents) > 1
        else ""
    )
    return (
        f"sample {first.shard}/{first.key} needs {first.positions} positions, but data.row_length is "
        f"{data.row_length}{others}: {overlong_remedy(data)}"
    )


def overlong_remedy(data: DataConfig) -> str:
    """What a user can do about documents that are longer than a row."""
    if data.overlong == "truncate":
        return "its images alone are too long; raise data.row_length, or declare smaller model.patcher.image_sizes"
    return "raise data.row_length, shorten the text, or set data.overlong to truncate"


def shown_counts(counts: Mapping[str, int]) -> str:
    """Reasons and their counts in words, the commonest first: `12 samples, because data.where is false`."""
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return "; ".join(f"{count:,} samples, because {reason}" for reason, count in ordered)


class Sources:
    """The shards, weights and names of the sources."""

    def __init__(self, patterns: Patterns) -> None:
        plain = [pattern for pattern in patterns if isinstance(pattern, str)]
        parts = [SourceConfig(shards=plain)] if plain else []
        parts += [pattern for pattern in patterns if isinstance(pattern, SourceConfig)]
        self.shards = [expand(part.shards) for part in parts] if parts else [expand([])]
        self.weights = [part.weight for part in parts]
        self.names = [part.name for part in parts]


class Dataset(Measured):
    """The samples of some shards, read through their indexes. Missing indexes are made.

    Raises:
        FileNotFoundError: a shard does not exist.
        ValueError: a source holds no usable sample.
    """

    def __init__(self, patterns: Patterns, tokenizer: Tokenizer, config: Config, cut_overlong: bool = False) -> None:
        super().__init__(config, tokenizer.framing, cut_overlong)
        self.tokenizer = tokenizer
        sources = Sources(patterns)
        self.shards = [shard for part in sources.shards for shard in part]
        self.weights, self.names = sources.weights, sources.names
        ensure_all(self.shards, tokenizer, config.data)
        self.bad: list[BadRecord] = []
        self.unwanted = Counter[str]()
        """Why `data.where` leaves samples out, and how many."""
        self.hashes: list[str] = []
        self.pictures: str | None = None
        """A shard that holds images as pixels."""
        self.stored: dict[str, dict[str, str]] = {}
        """Kind of precomputed arrays to the fingerprint of their maker (empty if unknown) to an example shard."""
        counts = []
        for shard in Progress("reading indexes", "shards", len(self.shards), quiet=True).over(self.shards):
            index = ensure(shard, tokenizer, config.data)
            counts.append(index.count)
            self.bad += index.meta.bad
            self.unwanted.update(index.meta.unwanted)
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
            why = ": the shards are empty"
            if self.bad:
                first = self.bad[0]
                why = f". Bad samples: {len(self.bad)}, the first is {first.name}: {first.reason}"
            if self.unwanted:
                why += f". Left out: {shown_counts(self.unwanted)}"
            raise ValueError(f"no usable sample in {', '.join(map(str, patterns))}{why}")
        self.index = lru_cache(OPEN_SHARDS)(self._index)
        self.facts = lru_cache(OPEN_SHARDS)(self._facts)
        self.grids = lru_cache(OPEN_SHARDS)(self._grids)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def fingerprint(self) -> str:
        """A hash of the names and contents of all shards in their order."""
        facts = (f"{store.name(shard)} {digest}" for shard, digest in zip(self.shards, self.hashes, strict=True))
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()

    def _index(self, shard: int) -> ShardIndex:
        return ensure(self.shards[shard], self.tokenizer, self.config.data)

    def _facts(self, shard: int) -> Facts:
        """The facts of all samples of one shard."""
        return facts_of(self.index(shard), tokens_column(self.tokenizer), self.grids(shard))

    def _grids(self, shard: int) -> Ints:
        """The patch grids [s, 2] of the segments of one shard; (0, 0) for text."""
        return patch_grids(self.index(shard), self.config.model.patcher)

    def where(self, index: int) -> tuple[int, int]:
        """The number of a sample's shard, and its number in that shard."""
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        return shard, index - int(self.starts[shard])

    def name(self, index: int) -> tuple[str, str]:
        """Shard name and key of a sample."""
        shard, number = self.where(index)
        return store.name(self.shards[shard]), self.index(shard).key(number)

    def sample(self, index: int) -> Sample:
        """A sample whose images are still encoded; raises `BadSample`."""
        shard, number = self.where(index)
        return load(self.shards[shard], self.index(shard), number, self.config.data)

    def grids_of(self, index: int) -> list[tuple[int, int]]:
        """The patch grids of the images of a sample."""
        shard, number = self.where(index)
        ends = self.index(shard).column("segment_end_n")
        here = slice(int(ends[number - 1]) if number else 0, int(ends[number]))
        return [(rows, columns) for rows, columns in self.grids(shard)[here].tolist() if rows]

    def gather(self, indices: Ints) -> Facts:
        """The facts of some samples, in the order of `indices`."""
        shards = np.searchsorted(self.starts, indices, side="right") - 1
        order = np.argsort(shards, kind="stable")
        numbers, bounds = np.unique(shards[order], return_index=True)
        parts = [
            self.facts(int(shard)).take(indices[selected] - self.starts[shard])
            for shard, selected in zip(numbers, np.split(order, bounds[1:]), strict=True)
        ]
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return Facts(*(np.concatenate([vars(part)[name] for part in parts])[back] for name in vars(parts[0])))

    def refuse_overlong(self) -> None:
        """Raise ValueError if a document is longer than a row; a data set of more than `CHECKED` samples is skipped."""
        if len(self) <= CHECKED and (documents := self.overlong_documents()):
            raise ValueError(refusal(documents, self.config.data))

    def shortened(self) -> tuple[int, int]:
        """The number of documents whose text `data.overlong: truncate` cuts, and the longest length before.

        Both are 0 for a data set of more than `CHECKED` samples, which is not searched.
        """
        row, lengths = self.config.data.row_length, [np.zeros(0, dtype=np.int64)]
        if self.config.data.overlong == "truncate" and len(self) <= CHECKED:
            for shard in range(len(self.shards)):
                facts = self.facts(shard)
                lengths.append(self._around_text(facts, None) + facts.text)
        every = np.concatenate(lengths)
        return int((every > row).sum()), int(every.max(initial=0))

    def overlong_documents(self) -> list[Overlong]:
        """All documents that do not fit into a row with all their text."""
        documents: list[Overlong] = []
        for shard in range(len(self.shards)):
            facts = self.facts(shard)
            documents += self.overlong(np.arange(len(facts.text)) + self.starts[shard], facts)
        return documents


class Samples(Sequence[Sample]):
    """The samples of a data set as a sequence; a sample is read when it is accessed."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._dataset.sample(index)
