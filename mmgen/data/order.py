"""The order of documents, their packing into rows, and keyed randomness: pure functions of seed and content."""

from __future__ import annotations

import bisect
import hashlib
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray


def _digest(parts: tuple[object, ...]) -> bytes:
    return hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=16).digest()


def keyed(*parts: object) -> np.random.Generator:
    """A counter-based generator whose key is a hash of `parts`: equal parts, equal numbers, on any machine."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_digest(parts), "little")))


def chances(*parts: object) -> tuple[float, float]:
    """Two uniform numbers in [0, 1) straight from the hash of `parts`: ten times cheaper than `keyed`."""
    one, two = struct.unpack("<QQ", _digest(parts))
    return (one >> 11) * 2.0**-53, (two >> 11) * 2.0**-53


def epoch_order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of `count` documents in an epoch."""
    return keyed(seed, "order", epoch).permutation(count)


def pack(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Best-fit packing in the given order: indices of `lengths` row by row, each row's sum at most `row_length`.

    A document goes to the fullest open row that still holds it. Deterministic; O(n log n).
    """
    rows: list[list[int]] = []
    space: list[tuple[int, int]] = []  # (free positions, row), sorted
    for index, length in enumerate(lengths):
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
    """Where a run stands in its data: the next row is `row` of `window` of `epoch`."""

    epoch: int = 0
    window: int = 0
    row: int = 0

    def as_dict(self) -> dict[str, int]:
        """For a checkpoint."""
        return asdict(self)


@dataclass(frozen=True)
class PlannedDocument:
    """A document's place in the order, before anything is decoded."""

    epoch: int
    index: int
    """Of the sample in the data set."""
    length: int
    """Positions in its row."""


PlannedRow = list[PlannedDocument]
DocumentLengths = Callable[[int, int], int]
"""(epoch, index) to the document's length in positions."""


class Plan:
    """The endless sequence of packed rows.

    Window w of an epoch is documents [w K, (w + 1) K) of its order, packed alone; so any row can be found
    again from (epoch, window, row) by packing one window.
    """

    def __init__(self, seed: int, window: int, row_length: int, count: int, lengths: DocumentLengths) -> None:
        self.seed, self.window, self.row_length, self.count, self.lengths = seed, window, row_length, count, lengths

    def rows(self, start: Position) -> Iterator[tuple[PlannedRow, Position]]:
        """Rows from `start` on, each with the position that follows it."""
        epoch, window, first = start.epoch, start.window, start.row
        while True:
            order = epoch_order(self.count, self.seed, epoch)
            while window * self.window < self.count:
                chosen = order[window * self.window : (window + 1) * self.window].tolist()
                lengths = [self.lengths(epoch, index) for index in chosen]
                packed = pack(lengths, self.row_length)
                for row in range(first, len(packed)):
                    documents = [PlannedDocument(epoch, chosen[i], lengths[i]) for i in packed[row]]
                    yield documents, Position(epoch, window, row + 1)
                window, first = window + 1, 0
            epoch, window = epoch + 1, 0

    def epoch_rows(self, epoch: int) -> Iterator[PlannedRow]:
        """The rows of one epoch."""
        for row, after in self.rows(Position(epoch)):
            if after.epoch != epoch:
                return
            yield row
