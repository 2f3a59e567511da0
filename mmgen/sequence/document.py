"""Documents, and their text and images written out position by position.

A document is an ordered list of text and image segments. Written out it is BOS segments EOS, an image being
BOI size patches EOI, where `patches` is one block per copy of the image. `mmgen.sequence.batch` packs documents into
rows, and `mmgen.sequence.attention` has the attention rule.

Suffixes: N patches of one image, P patch length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmgen.image.patch import Grid, raster
from mmgen.sequence.tokenizer import Tokenizer


@dataclass(frozen=True)
class Block:
    """One copy of an image in a row."""

    order_N: NDArray[np.int64]
    """Raster index of each patch, in the order in which the block holds them."""
    draws: dict[str, NDArray[np.float32]]
    """What the objective drew for the patches, first axis N in the order of `order_N` (t, eps, masks...)."""
    bidirectional: bool = True
    """Patches of the block see each other both ways."""
    noised: bool = False
    """Positions outside the block never see it."""
    loss: bool | NDArray[np.bool_] = True
    """Its patches are learned; [N] where only some are."""


@dataclass(frozen=True)
class TextSegment:
    """Token ids of one stretch of text."""

    ids: Sequence[int]
    learn: bool = True
    """Its tokens have cross-entropy."""


@dataclass(frozen=True)
class ImageSegment:
    """One image: its patch rows in raster order, its grid and the blocks it becomes."""

    x_NP: NDArray[Any]
    grid: Grid
    blocks: Sequence[Block]
    learn: bool = True
    """Its opening tokens have cross-entropy; the loss of its patches is set by `blocks`."""


Document = Sequence[TextSegment | ImageSegment]


@dataclass(frozen=True)
class ImagePatches:
    """The patches [N, P] of one image in raster order, and their grid; its copies share them."""

    x_NP: NDArray[Any]
    grid: Grid


@dataclass(frozen=True)
class PlacedBlock:
    """A block and where it begins."""

    offset: int
    """Position of its first patch, counted from the start of the strip."""
    image: int
    """Index of its image among those of the strip."""
    block: Block


@dataclass(frozen=True)
class Opening:
    """The size token of an image."""

    offset: int
    """Its position, counted from the start of the strip."""
    first: tuple[int, int]
    """(row, column) of the patch that is generated first."""


@dataclass
class Strip:
    """A stretch of one written document: per position lists, and its patches."""

    ids: list[int] = field(default_factory=list)
    position: list[int] = field(default_factory=list)
    block: list[int] = field(default_factory=list)
    bidirectional: list[bool] = field(default_factory=list)
    noised: list[bool] = field(default_factory=list)
    learned: list[bool] = field(default_factory=list)
    """Belongs to a segment that is learned, or to none."""
    images: list[ImagePatches] = field(default_factory=list)
    blocks: list[PlacedBlock] = field(default_factory=list)
    openings: list[Opening] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)


class Writer:
    """Writes one document position by position; `take` hands over what was written since the last call.

    Training writes whole documents; the decoder writes what it has just generated. Both therefore number
    positions and blocks by the same code.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.position = 0
        """Position of what is written next."""
        self._strip = Strip()
        self._blocks = 0
        self._learn = True

    def tokens(self, ids: Sequence[int]) -> None:
        """Append tokens; each counts one position up."""
        n = len(ids)
        self._append(list(ids), list(range(self.position, self.position + n)), -1, False, False)
        self.position += n

    def open_image(self, grid: Grid, first: tuple[int, int] = (0, 0)) -> None:
        """Append BOI and the size token."""
        self.tokens([self.tokenizer.boi])
        self.size(grid, first)

    def size(self, grid: Grid, first: tuple[int, int] = (0, 0)) -> None:
        """Append the size token; `first` is the cell of the patch that is generated first."""
        if grid not in self.tokenizer.size:
            declared = ", ".join(f"{rows}x{columns}" for rows, columns in self.tokenizer.size)
            raise ValueError(f"patch grid {grid[0]}x{grid[1]} was never declared (declared: {declared})")
        self.tokens([self.tokenizer.size[grid]])
        self._strip.openings.append(Opening(len(self._strip) - 1, first))

    def patches(self, x_NP: NDArray[Any], grid: Grid, blocks: Sequence[Block]) -> None:
        """Append the blocks of an image; all of them share one position."""
        self._strip.images.append(ImagePatches(x_NP, grid))
        for block in blocks:
            n = len(block.order_N)
            self._strip.blocks.append(PlacedBlock(len(self._strip), len(self._strip.images) - 1, block))
            ids, position = [self.tokenizer.pad] * n, [self.position] * n
            self._append(ids, position, self._blocks, block.bidirectional, block.noised)
            self._blocks += 1
        self.position += 1

    def close_image(self) -> None:
        """Append EOI."""
        self.tokens([self.tokenizer.eoi])

    def document(self, document: Document) -> Strip:
        """Write BOS, all segments and EOS, and take the result."""
        self.tokens([self.tokenizer.bos])
        for segment in document:
            self.segment(segment)
        self.tokens([self.tokenizer.eos])
        return self.take()

    def segment(self, segment: TextSegment | ImageSegment) -> None:
        """Append one whole segment."""
        self._learn = segment.learn
        if isinstance(segment, TextSegment):
            self.tokens(segment.ids)
        else:
            row, column = raster(segment.grid)[segment.blocks[-1].order_N[0]]
            self.open_image(segment.grid, (int(row), int(column)))
            self.patches(segment.x_NP, segment.grid, segment.blocks)
            self.close_image()
        self._learn = True

    def take(self) -> Strip:
        """What was written since the last `take`."""
        strip, self._strip = self._strip, Strip()
        return strip

    def _append(self, ids: list[int], position: list[int], block: int, bidirectional: bool, noised: bool) -> None:
        n = len(ids)
        self._strip.ids += ids
        self._strip.position += position
        self._strip.block += [block] * n
        self._strip.bidirectional += [bidirectional] * n
        self._strip.noised += [noised] * n
        self._strip.learned += [self._learn] * n
