"""The order of documents, their packing into rows, and keyed random numbers: pure functions of seed and content.

Nothing here depends on the number of processes or workers, and no state is kept between calls: any window of any epoch
is computed alone, in time and memory that do not grow with the data set.
"""

from __future__ import annotations

import bisect
import hashlib
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, field

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]
PATTERN = 1 << 14
"""Period of the sequence of a mixture's sources, in documents; weights are exact to 1 in this number."""
ROUNDS = 6
LEAST_BITS = 4
"""Half the bits of the smallest network of `permuted`."""


def _digest(parts: tuple[object, ...]) -> bytes:
    return hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=16).digest()


def keyed(*parts: object) -> np.random.Generator:
    """A counter-based generator whose key is a hash of `parts`: equal parts give equal numbers on any machine."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_digest(parts), "little")))


def chances(*parts: object) -> tuple[float, float]:
    """Two uniform numbers in [0, 1), taken directly from the hash of `parts`: ten times cheaper than `keyed`."""
    one, two = struct.unpack("<QQ", _digest(parts))
    return (one >> 11) * 2.0**-53, (two >> 11) * 2.0**-53


def mix(values: Hashes) -> Hashes:
    """A bijection on 64-bit numbers that scrambles their bits (the finaliser of SplitMix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _salts(parts: tuple[object, ...]) -> tuple[np.uint64, np.uint64]:
    one, two = struct.unpack("<QQ", _digest(parts))
    return np.uint64(one), np.uint64(two)


def uniform(keys: Hashes, *parts: object) -> NDArray[np.float64]:
    """A uniform number in [0, 1) for each 64-bit key and `parts`, for thousands of samples in one call."""
    one, two = _salts(parts)
    bits = mix(mix(keys ^ one) ^ two)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permuted(numbers: Ints, count: int, *parts: object) -> Ints:
    """The images of `numbers` under a permutation of [0, count) that is keyed by `parts` and never stored.

    A Feistel network on the next larger power of four, applied until the result is below `count` (cycle walking,
    Black and Rogaway 2002).
    """
    half = np.uint64(max(LEAST_BITS, ((max(count, 2) - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = [_salts((*parts, r))[0] for r in range(ROUNDS)]

    def once(values: Hashes) -> Hashes:
        left, right = values >> half, values & mask
        for key in keys:
            left, right = right, left ^ (mix(right ^ key) & mask)
        return (left << half) | right

    if half == LEAST_BITS:  # a short range may take hundreds of rounds, so each is one look-up
        table = once(np.arange(1 << (2 * int(half)), dtype=np.uint64)).tolist()
        return np.array([_walked(table, number, count) for number in numbers.tolist()], dtype=np.int64)
    values = once(numbers.astype(np.uint64))
    while (outside := values >= np.uint64(count)).any():
        values[outside] = once(values[outside])
    return values.astype(np.int64)


def _walked(table: Sequence[int], number: int, count: int) -> int:
    """Follow a permutation from `number` to the first value below `count`."""
    number = table[number]
    while number >= count:
        number = table[number]
    return number


def epoch_order(count: int, seed: object, epoch: int, where: range | None = None, block: int = 1) -> Ints:
    """The order of `count` documents in an epoch, or the range `where` of it.

    Blocks of `block` neighbours are permuted. The offset of the blocks changes from epoch to epoch.
    """
    where = range(count) if where is None else where
    numbers = np.arange(where.start, where.stop, dtype=np.int64)
    whole = count // block
    if not whole:
        block, whole = 1, count
    inside = numbers < whole * block
    moved = numbers.copy()
    moved[inside] = permuted(numbers[inside] // block, whole, seed, "order", epoch) * block + numbers[inside] % block
    shift = int(chances(seed, "shift", epoch)[0] * count)
    return (moved + shift) % count


def pack(lengths: Sequence[int] | Ints, row_length: int) -> list[list[int]]:
    """Best-fit-decreasing packing: the indices of each row, whose lengths sum to at most `row_length`.

    Documents are taken from long to short, ties in the given order. Each goes into the fullest open row that still has
    space for it. Deterministic; O(n log n).
    """
    rows: list[list[int]] = []
    space: list[tuple[int, int]] = []  # (free positions, row), sorted
    values = np.asarray(lengths, dtype=np.int64)
    for index in np.argsort(-values, kind="stable").tolist():
        length = int(values[index])
        at = bisect.bisect_left(space, (length, -1))
        if at == len(space):
            row, free = len(rows), row_length
            rows.append([])
        else:
            free, row = space.pop(at)
        rows[row].append(index)
        bisect.insort(space, (free - length, row))
    return rows


@dataclass(frozen=True)
class Position:
    """Position of a run in its data: the next row is row `row` of window `window` of epoch `epoch`."""

    epoch: int = 0
    window: int = 0
    row: int = 0

    def as_dict(self) -> dict[str, int]:
        """The position as a checkpoint stores it."""
        return asdict(self)


@dataclass(frozen=True)
class Cursor:
    """Position of one stream: the next row is row `row` of window `window`, which begins at `shard` and `group`."""

    epoch: int = 0
    window: int = 0
    row: int = 0
    shard: int = 0
    """Index of the shard in the stream's list of this epoch."""
    group: int = 0
    """Index of the sample in its shard, bad ones included."""
    met: int = 0
    """Samples of the first epoch that were read before this window, bad ones included."""


@dataclass(frozen=True)
class Cursors:
    """Position of a run without an index: a cursor for each stream of one rank or of all ranks."""

    streams: dict[int, Cursor] = field(default_factory=dict)
    """Number of a stream to its cursor; a stream that is missing is at its beginning."""

    def as_dict(self) -> dict[str, list[list[int]]]:
        """The number and the cursor of each stream, for a checkpoint."""
        return {"streams": [[number, *astuple(self.streams[number])] for number in sorted(self.streams)]}

    def of_stream(self, number: int) -> Cursor:
        """Position of a stream."""
        return self.streams.get(number, Cursor())

    @staticmethod
    def union(parts: Iterable[Cursors]) -> Cursors:
        """The cursors of several ranks in one object."""
        return Cursors({number: cursor for part in parts for number, cursor in part.streams.items()})

    @staticmethod
    def of(stored: dict[str, list[list[int]]]) -> Cursors:
        """The cursors from the output of `as_dict`."""
        return Cursors({number: Cursor(*rest) for number, *rest in stored["streams"]})


@dataclass(frozen=True)
class PlannedDocument:
    """A document in the planned order, before its sample is read or decoded."""

    epoch: int
    """Epoch of its source."""
    index: int
    """Index of the sample in the data set."""
    length: int
    """Positions in its row."""
    images: int = 0
    """Number of learned images."""
    form: int = 0
    """Order of text and images, one of the forms in `mmgen.data.dataset`."""


PlannedRow = list[PlannedDocument]
Lengths = Callable[[Ints, Ints], tuple[Ints, Ints, Ints]]
"""(epochs, indices) to each document's length in positions, number of learned images, and form."""


class Mixture:
    """Sources with weights, drawn in a fixed pattern, so that the n-th document is computed without the ones before it.

    Samples of all sources are numbered consecutively. With a single source the sequence is its epochs in turn.
    """

    def __init__(self, counts: Sequence[int], weights: Sequence[float], seed: int, block: int = 1) -> None:
        self.counts, self.seed, self.block = list(counts), seed, block
        self.total = sum(counts)
        self.starts = [sum(counts[:s]) for s in range(len(counts))]
        self.pattern = smooth(weights, PATTERN) if len(counts) > 1 else np.zeros(1, dtype=np.int64)
        hits = self.pattern[:, None] == np.arange(len(counts))
        self._before = np.concatenate([np.zeros((1, len(counts)), dtype=np.int64), np.cumsum(hits, axis=0)])

    def drawn(self, first: int) -> Ints:
        """The number of documents among the first `first` that come from each source."""
        turns, rest = divmod(first, len(self.pattern))
        counted: Ints = turns * self._before[-1] + self._before[rest]
        return counted

    def documents(self, first: int, last: int) -> tuple[Ints, Ints]:
        """(epoch of its source, index) of documents [first, last) of the endless sequence."""
        where = self.pattern[np.arange(first, last) % len(self.pattern)]
        epochs, indices = np.zeros(last - first, dtype=np.int64), np.zeros(last - first, dtype=np.int64)
        for source, (begin, end) in enumerate(zip(self.drawn(first).tolist(), self.drawn(last).tolist(), strict=True)):
            here = np.flatnonzero(where == source)
            count = self.counts[source]
            name = self.seed if not source else f"{self.seed} {source}"
            at = begin
            while at < end:
                epoch, offset = divmod(at, count)
                n = min(end - at, count - offset)
                part = here[at - begin : at - begin + n]
                epochs[part] = epoch
                order = epoch_order(count, name, epoch, range(offset, offset + n), self.block)
                indices[part] = order + self.starts[source]
                at += n
        return epochs, indices


def smooth(weights: Sequence[float], length: int) -> Ints:
    """A sequence of `length` source numbers in which each source has its share and is evenly spread."""
    shares = np.asarray(weights, dtype=np.float64) / sum(weights) * length
    counts = np.maximum(1, np.floor(shares)).astype(np.int64)
    for source in np.argsort(counts - shares, kind="stable")[: max(0, length - int(counts.sum()))]:
        counts[source] += 1
    when = np.concatenate([(np.arange(n) + 0.5) / n for n in counts])
    who = np.repeat(np.arange(len(counts)), counts)
    return np.asarray(who[np.argsort(when, kind="stable")], dtype=np.int64)


class Plan:
    """The endless sequence of packed rows.

    Window w of an epoch holds documents [w K, (w + 1) K) of its order and is packed alone. So any row is recomputed
    from (epoch, window, row) by packing one window. An epoch of a mixture has as many documents as there are samples.
    """

    def __init__(self, mixture: Mixture, window: int, row_length: int, lengths: Lengths) -> None:
        self.mixture, self.window, self.row_length, self.lengths = mixture, window, row_length, lengths
        self.count = mixture.total

    def packed(self, epoch: int, window: int) -> list[PlannedRow]:
        """The rows of one window, in an order that does not depend on their lengths."""
        start = epoch * self.count
        first, last = window * self.window, min((window + 1) * self.window, self.count)
        epochs, indices = self.mixture.documents(start + first, start + last)
        rng = keyed(self.mixture.seed, "window", epoch, window)
        shuffled = rng.permutation(last - first)
        epochs, indices = epochs[shuffled], indices[shuffled]
        lengths, *rest = self.lengths(epochs, indices)
        rows = pack(lengths, self.row_length)
        columns = (column.tolist() for column in (epochs, indices, lengths, *rest))
        documents = [PlannedDocument(*facts) for facts in zip(*columns, strict=True)]
        return [[documents[i] for i in rows[r]] for r in rng.permutation(len(rows))]

    def rows(self, start: Position) -> Iterator[tuple[PlannedRow, Position]]:
        """Rows from `start`, each with the position that follows it."""
        epoch, window, first = start.epoch, start.window, start.row
        while True:
            while window * self.window < self.count:
                packed = self.packed(epoch, window)
                for row in range(first, len(packed)):
                    yield packed[row], Position(epoch, window, row + 1)
                window, first = window + 1, 0
            epoch, window = epoch + 1, 0

    def epoch_rows(self, epoch: int) -> Iterator[PlannedRow]:
        """The rows of one epoch."""
        for row, after in self.rows(Position(epoch)):
            if after.epoch != epoch:
                return
            yield row
