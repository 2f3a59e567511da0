"""Written documents as packed rows: what the model is given.

Suffixes: B rows, S positions, I patches in the batch, M images in the batch, N patches of one image, P patch length.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmgen.image.latent import LatentPatcher
from mmgen.image.patch import Floats, Grid, Patcher
from mmgen.sequence.attention import Sites
from mmgen.sequence.document import Block, Strip
from mmgen.sequence.tokenizer import Tokenizer


class Places(NamedTuple):
    """Where each patch row stands: which image copy it belongs to, and its (row, column) there."""

    image_I: Tensor
    place_I2: Tensor


IGNORE = -100
"""Label of a position without cross-entropy."""


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


def encoded(batch: Batch, patcher: Patcher) -> Batch:
    """A batch, still on the CPU, with the pixels of its images turned into latents on the patcher's device.

    Copies of an image in a row are encoded once. A batch of patch rows that are ready stays as it is.
    """
    if batch.x_IP.dtype != torch.uint8 or not isinstance(patcher, LatentPatcher):
        return batch
    copies: dict[tuple[int, int, int], list[Tensor]] = defaultdict(list)
    document, position = batch.document_BS.flatten(), batch.position_BS.flatten()
    for here in torch.arange(len(batch.image_I)).split(_runs(batch.image_I)):
        at = int(batch.at_I[here[0]])  # all copies of an image share row, document and position
        copies[at // batch.ids_BS.shape[1], int(document[at]), int(position[at])].append(here)
    grids: dict[Grid, list[list[Tensor]]] = defaultdict(list)
    for blocks in copies.values():
        rows, columns = (batch.place_I2[blocks[0]].amax(0) + 1).tolist()
        grids[rows, columns].append(blocks)
    source_I = torch.zeros(len(batch.image_I), dtype=torch.long)
    parts, done = [torch.zeros(0, patcher.settings.patch_length, device=patcher.device)], 0
    for grid, images in grids.items():
        raster = batch.place_I2[:, 0] * grid[1] + batch.place_I2[:, 1]
        levels_MNL = torch.stack([batch.x_IP[blocks[0]][raster[blocks[0]].argsort()] for blocks in images])
        parts.append(patcher.encode_rows(levels_MNL, grid).flatten(0, 1))
        for blocks in images:
            for here in blocks:
                source_I[here] = done + raster[here]
            done += grid[0] * grid[1]
    return replace(batch, x_IP=torch.cat(parts)[source_I.to(patcher.device)])


def _runs(image_I: Tensor) -> list[int]:
    """How many patches each block has, in their order."""
    counts: list[int] = torch.unique_consecutive(image_I, return_counts=True)[1].tolist()
    return counts
