"""Documents to packed rows, and the attention rule.

A document is an ordered list of text and image segments. Written out it is BOS segments EOS, an image being
BOI size patches EOI, where `patches` is one block per copy of the image. Rows hold whole documents.

Suffixes: B rows, S positions, I patches in the batch, M images in the batch, N patches of one image, P patch length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmgen.patch import Floats, Grid, Places, raster
from mmgen.tokenizer import Tokenizer

IGNORE = -100
"""Label of a position without cross-entropy."""


@dataclass(frozen=True)
class Block:
    """One copy of an image in a row."""

    order_N: NDArray[np.int64]
    """Raster index of the patch at each place."""
    draws: dict[str, NDArray[np.float32]]
    """What the objective drew for the patches, first axis N in the order of the places (t, eps, masks...)."""
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


@dataclass(frozen=True)
class ImageSegment:
    """One image: its patch rows in raster order, its grid and the blocks it becomes."""

    x_NP: Floats
    grid: Grid
    blocks: Sequence[Block]


Document = Sequence[TextSegment | ImageSegment]


class Sites(NamedTuple):
    """What the attention rule asks of a position; all tensors have one shape."""

    slot: Tensor
    """Order in the row."""
    document: Tensor
    block: Tensor
    """Number of the image block, -1 for tokens."""
    bidirectional: Tensor
    noised: Tensor


def visible(q: Sites, k: Sites) -> Tensor:
    """THE attention rule: may position q attend to position k? Shapes broadcast; the result is boolean.

    Causal inside a document, both ways inside a bidirectional image block, and a noised copy of an image
    is hidden from everything outside that copy.
    """
    same_block = (q.block == k.block) & (k.block >= 0)
    reachable = (k.slot <= q.slot) | (same_block & q.bidirectional)
    return (q.document == k.document) & reachable & ~(k.noised & ~same_block)


def dense_visible(q: Sites, k: Sites | None = None) -> Tensor:
    """The rule for every pair: sites of shape [B, Q] and [B, K] (by default the same) to [B, Q, K]."""
    k = q if k is None else k
    return visible(Sites(*(a.unsqueeze(2) for a in q)), Sites(*(a.unsqueeze(1) for a in k)))


def flex_rule(sites: Sites) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The rule as a FlexAttention `mask_mod` over sites of shape [B, S]."""

    def mask_mod(b: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return visible(Sites(*(a[b, q] for a in sites)), Sites(*(a[b, k] for a in sites)))

    return mask_mod


@dataclass
class Strip:
    """A stretch of one written document: per position lists, and the patches that stand in it."""

    ids: list[int] = field(default_factory=list)
    position: list[int] = field(default_factory=list)
    block: list[int] = field(default_factory=list)
    bidirectional: list[bool] = field(default_factory=list)
    noised: list[bool] = field(default_factory=list)
    patches: list[tuple[int, Floats, NDArray[np.int64], Block]] = field(default_factory=list)
    """(offset, x_NP and (row, column) in the order of the places, block) of each block."""
    openings: list[tuple[int, tuple[int, int]]] = field(default_factory=list)
    """(offset of the size token, place of the first patch generated) of each image."""

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
        """Append the size token; `first` is the place of the patch that is generated first."""
        if grid not in self.tokenizer.size:
            declared = ", ".join(f"{rows}x{columns}" for rows, columns in self.tokenizer.size)
            raise ValueError(f"patch grid {grid[0]}x{grid[1]} was never declared (declared: {declared})")
        self.tokens([self.tokenizer.size[grid]])
        self._strip.openings.append((len(self._strip) - 1, first))

    def patches(self, x_NP: Floats, grid: Grid, blocks: Sequence[Block]) -> None:
        """Append the blocks of an image; all of them share one position."""
        places = raster(grid)
        for block in blocks:
            n = len(block.order_N)
            here = (len(self._strip), x_NP[block.order_N], places[block.order_N], block)
            self._strip.patches.append(here)
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
        if isinstance(segment, TextSegment):
            self.tokens(segment.ids)
        else:
            row, column = raster(segment.grid)[segment.blocks[-1].order_N[0]]
            self.open_image(segment.grid, (int(row), int(column)))
            self.patches(segment.x_NP, segment.grid, segment.blocks)
            self.close_image()

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


@dataclass
class Batch:
    """B packed rows of S positions, and the I patches that stand in them."""

    ids_BS: Tensor
    """Token ids; PAD at patches and padding."""
    position_BS: Tensor
    """Position for the backbone's rotary embedding; restarts at 0 in each document."""
    document_BS: Tensor
    block_BS: Tensor
    """Image block at each position, -1 at tokens."""
    bidirectional_BS: Tensor
    noised_BS: Tensor
    label_BS: Tensor
    """Id of the next token where cross-entropy stands, else `IGNORE`."""
    label_at_L: Tensor
    """Flat positions that carry a label."""
    x_IP: Tensor
    """Clean patch rows, of pixels in [-1, 1] or of latents; uint8, and P pixels of the image, while a VAE has yet to
    encode them (`mmgen.latent.encoded`)."""
    at_I: Tensor
    """Flat position (row * S + position) of each patch."""
    image_I: Tensor
    """Number of the block that each patch belongs to, unique in the batch."""
    place_I2: Tensor
    """(row, column) of each patch in its image."""
    loss_at_J: Tensor
    """Indices into I of the patches that are learned."""
    draws: dict[str, Tensor]
    """The objective's draws, first axis I."""
    size_at_M: Tensor
    """Flat position of each image's size token."""
    first_M2: Tensor
    """Place of the patch of each image that is generated first."""

    @property
    def sites(self) -> Sites:
        """The rule's view of all positions, shape [B, S]."""
        slot = torch.arange(self.ids_BS.shape[1], device=self.ids_BS.device).expand_as(self.ids_BS)
        return Sites(slot, self.document_BS, self.block_BS, self.bidirectional_BS, self.noised_BS)

    @property
    def places(self) -> Places:
        """Where the patches stand in their images."""
        return Places(self.image_I, self.place_I2)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """A copy on another device; `dtype`, where given, is that of patches and draws."""

        def move(value: Tensor) -> Tensor:
            return value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)

        moved = {f.name: move(getattr(self, f.name)) for f in fields(self) if f.name != "draws"}
        return Batch(**moved, draws={name: move(value) for name, value in self.draws.items()})


def collate(
    rows: Sequence[Sequence[Strip | int]],
    row_length: int,
    tokenizer: Tokenizer,
    nothing: Block,
    patch_length: int,
    dtype: type = np.float32,
) -> Batch:
    """Pack written documents into rows; `patch_length` and `dtype` are those of their patch rows.

    `nothing` is the objective's block of an image without patches: it gives every draw its name and shape
    also where the rows hold no image.

    Each row is a list of strips, or of integers for empty slots of that many positions (a sample that
    could not be read keeps its slot, so nothing else moves). What is left of a row becomes padding.

    Raises:
        ValueError: a row's documents are longer than `row_length`.
    """
    shape = (len(rows), row_length)
    ids = np.full(shape, tokenizer.pad, dtype=np.int64)
    position = np.zeros(shape, dtype=np.int64)
    document = np.full(shape, -1, dtype=np.int64)
    block = np.full(shape, -1, dtype=np.int64)
    bidirectional = np.zeros(shape, dtype=bool)
    noised = np.zeros(shape, dtype=bool)
    empty: Floats = np.zeros((0, patch_length), dtype)
    placed = [(0, empty, np.zeros((0, 2), np.int64), nothing)]
    openings: list[tuple[int, tuple[int, int]]] = []
    for b, row in enumerate(rows):
        start = blocks = 0
        for number, strip in enumerate(row):
            if isinstance(strip, int):
                start += strip
                continue
            end = start + len(strip)
            if end > row_length:
                raise ValueError(f"documents of {end} positions do not fit a row of {row_length} (data.row_length)")
            here = (b, slice(start, end))
            ids[here], position[here], document[here] = strip.ids, strip.position, number
            local = np.array(strip.block, dtype=np.int64)
            block[here] = np.where(local >= 0, local + blocks, -1)
            blocks += int(local.max(initial=-1)) + 1
            bidirectional[here], noised[here] = strip.bidirectional, strip.noised
            origin = b * row_length + start
            placed += [(origin + offset, x, place, copy) for offset, x, place, copy in strip.patches]
            openings += [(origin + offset, first) for offset, first in strip.openings]
            start = end
        padding = document[b] < 0
        position[b][padding] = np.arange(padding.sum())

    label = next_tokens(ids, document, block, tokenizer)
    counts = [len(x) for _, x, _, _ in placed]
    loss = np.concatenate([np.broadcast_to(copy.loss, n) for (*_, copy), n in zip(placed, counts, strict=True)])
    at = [np.arange(at, at + n) for (at, *_), n in zip(placed, counts, strict=True)]
    return Batch(
        ids_BS=torch.from_numpy(ids),
        position_BS=torch.from_numpy(position),
        document_BS=torch.from_numpy(document),
        block_BS=torch.from_numpy(block),
        bidirectional_BS=torch.from_numpy(bidirectional),
        noised_BS=torch.from_numpy(noised),
        label_BS=torch.from_numpy(label),
        label_at_L=torch.from_numpy(np.flatnonzero(label != IGNORE)),
        x_IP=_stack([x for _, x, _, _ in placed], dtype),
        at_I=_stack(at, np.int64),
        image_I=torch.from_numpy(np.repeat(np.arange(len(placed)) - 1, counts)),  # `nothing` is number -1
        place_I2=_stack([place for _, _, place, _ in placed], np.int64),
        loss_at_J=torch.from_numpy(np.flatnonzero(loss)),
        draws={name: _stack([copy.draws[name] for *_, copy in placed], np.float32) for name in nothing.draws},
        size_at_M=torch.tensor([at for at, _ in openings], dtype=torch.int64),
        first_M2=torch.tensor([first for _, first in openings], dtype=torch.int64).reshape(-1, 2),
    )


def next_tokens(
    ids: NDArray[np.int64], document: NDArray[np.int64], block: NDArray[np.int64], tokenizer: Tokenizer
) -> NDArray[np.int64]:
    """The label of every position of [B, S]: the next token, or `IGNORE`.

    Cross-entropy stands where this position is a token and the next one is a token of the same document,
    except EOI (the decoder closes images itself) and the size token where only one size is declared.
    """
    label = np.full_like(ids, IGNORE)
    following = ids[:, 1:]
    target = (document[:, 1:] == document[:, :-1]) & (document[:, 1:] >= 0)
    target &= (block[:, 1:] < 0) & (block[:, :-1] < 0) & (following != tokenizer.eoi)
    if len(tokenizer.size) == 1:
        target &= ~np.isin(following, list(tokenizer.grid))
    label[:, :-1][target] = following[target]
    return label


def _stack(parts: Sequence[NDArray[np.generic]], dtype: type) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.concatenate(parts), dtype=dtype))
