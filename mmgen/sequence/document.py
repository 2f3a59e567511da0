"""Documents of text and image segments, and the writer that turns them into positions.

A document is an ordered list of text and image segments. It is written as BOS, its segments and EOS. An image is
written as BOI, a size token, one block of patches per copy of the image, and EOI. `mmgen.sequence.batch` packs written
documents into rows, and `mmgen.sequence.attention` has the attention rule.

Suffixes: N patches of one image, P patch length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmgen.config import Positions
from mmgen.image.patch import Grid, raster
from mmgen.sequence.position import offsets, taken
from mmgen.sequence.tokenizer import Tokenizer


@dataclass(frozen=True)
class Block:
    """One copy of an image in a row."""

    order_N: NDArray[np.int64]
    """Raster index of each patch, in the order in which the block holds them."""
    draws: dict[str, NDArray[np.float32]]
    """What the objective drew for the patches, first axis N in the order of `order_N` (t, masks, ...)."""
    bidirectional: bool = True
    """Whether patches of the block attend to each other in both directions."""
    noised: bool = False
    """Whether the block is hidden from all positions outside it."""
    loss: bool | NDArray[np.bool_] = True
    """Whether its patches are learned; an array [N] if only some of them are."""
    key: int = 0
    """The key of its noise, 64 bits as a signed integer."""
    lead: int = 0
    """Number of positions of the block in front of its patches, such as that of a time token."""


@dataclass(frozen=True)
class TextSegment:
    """Token ids of one stretch of text."""

    ids: Sequence[int]
    learn: bool = True
    """Whether its tokens have a cross-entropy loss."""


@dataclass(frozen=True)
class ImageSegment:
    """One image: its patches in raster order, its grid, and the blocks that are written for it."""

    x_NP: NDArray[Any]
    grid: Grid
    blocks: Sequence[Block]
    learn: bool = True
    """Whether its BOI and size token have a cross-entropy loss. The loss of its patches is set by `blocks`."""


Document = Sequence[TextSegment | ImageSegment]


@dataclass(frozen=True)
class ImagePatches:
    """The patches [N, P] of one image in raster order, and their grid; its copies share them."""

    x_NP: NDArray[Any]
    grid: Grid


@dataclass(frozen=True)
class PlacedBlock:
    """A block, and the position at which it begins."""

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
    """A written part of a document: lists with one item per position, and the patches."""

    ids: list[int] = field(default_factory=list)
    position: list[int] = field(default_factory=list)
    block: list[int] = field(default_factory=list)
    bidirectional: list[bool] = field(default_factory=list)
    noised: list[bool] = field(default_factory=list)
    learned: list[bool] = field(default_factory=list)
    """False for positions of a segment that is not learned, else True."""
    images: list[ImagePatches] = field(default_factory=list)
    blocks: list[PlacedBlock] = field(default_factory=list)
    openings: list[Opening] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)


class Writer:
    """Writes one document, position by position. `take` returns the part written since the last call.

    Training writes whole documents, and the decoder writes each part that it has generated. Both number positions and
    blocks by this class, so they agree.
    """

    def __init__(self, tokenizer: Tokenizer, positions: Positions) -> None:
        self.tokenizer, self.positions = tokenizer, positions
        self.position = 0
        """Position of the next item."""
        self._strip = Strip()
        self._blocks = 0
        self._learn = True

    def tokens(self, ids: Sequence[int]) -> None:
        """Append tokens. Each token takes one position."""
        n = len(ids)
        self._append(list(ids), list(range(self.position, self.position + n)), -1, False, False)
        self.position += n

    def open_image(self, grid: Grid, first: tuple[int, int] = (0, 0)) -> None:
        """Append BOI and the size token."""
        self.tokens([self.tokenizer.boi])
        self.size(grid, first)

    def size(self, grid: Grid, first: tuple[int, int] = (0, 0)) -> None:
        """Append the size token of a grid. `first` is the cell of the patch that is generated first."""
        if grid not in self.tokenizer.size:
            declared = ", ".join(f"{rows}x{columns}" for rows, columns in self.tokenizer.size)
            raise ValueError(
                f"patch grid {grid[0]}x{grid[1]} is not one of the declared grids ({declared}): add its image size to "
                "model.patcher.image_sizes"
            )
        self.tokens([self.tokenizer.size[grid]])
        self._strip.openings.append(Opening(len(self._strip) - 1, first))

    def patches(self, x_NP: NDArray[Any], grid: Grid, blocks: Sequence[Block]) -> None:
        """Append the blocks of an image. Its copies have the same positions."""
        self._strip.images.append(ImagePatches(x_NP, grid))
        lead = blocks[0].lead
        offset = offsets(self.positions, grid, lead)
        for block in blocks:
            at = np.concatenate([np.arange(lead), lead + block.order_N])
            self._strip.blocks.append(PlacedBlock(len(self._strip) + lead, len(self._strip.images) - 1, block))
            position = (self.position + offset[at]).tolist()
            self._append([self.tokenizer.pad] * len(at), position, self._blocks, block.bidirectional, block.noised)
            self._blocks += 1
        self.position += lead + taken(self.positions, grid)

    def close_image(self) -> None:
        """Append EOI."""
        self.tokens([self.tokenizer.eoi])

    def document(self, document: Document) -> Strip:
        """Write BOS, all segments and EOS, and return the result."""
        self.tokens(self.tokenizer.start)
        for segment in document:
            self.segment(segment)
        last = document[-1] if document else None
        # EOS reads the last image in sampling. It is not learned where the image has only a copy that EOS cannot see.
        self._learn = not (isinstance(last, ImageSegment) and last.blocks[-1].noised)
        self.tokens([self.tokenizer.eos])
        self._learn = True
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
        """The part that was written since the last call of `take`."""
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
