"""Batches of packed rows: `RawBatch` from loader workers, and `Batch`, the input of the model.

Suffixes: B rows, S positions, I patches in the batch, J learned patches, K draws of noise for each of them, M images in
the batch, C image copies, N patches of one image, U patches of all images (each image once), P patch length, L pixel
values of a patch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmgen.config import ImageLoss
from mmgen.flow.philox import compiled_normal, keyed_normal
from mmgen.image.patch import Grid, Patcher, Patches, raster
from mmgen.sequence.attention import Sites
from mmgen.sequence.document import Block, ImagePatches, Opening, PlacedBlock, Strip
from mmgen.sequence.tokenizer import Tokenizer
from mmgen.sequence.wire import pack, unpack


class Cells(NamedTuple):
    """For each patch, the number of its image copy, and its cell (row, column) in the patch grid."""

    image_I: Tensor
    cell_I2: Tensor
    grids: Sequence[Grid | None] = ()
    """Patch grid of each image copy by its number, on the host; None for a copy whose patches are not among these."""


class Copy(NamedTuple):
    """An image copy of a batch, as the host knows it without waiting for the device."""

    grid: Grid
    learned: bool
    """Whether patches of it are learned."""


IGNORE = -100
"""Label of a position without cross-entropy."""


@dataclass(kw_only=True)
class Rows:
    """B packed rows of S positions: the fields that `RawBatch` and `Batch` share."""

    ids_BS: Tensor
    """Token ids; PAD at patches and padding."""
    position_BS: Tensor
    """Position for the rotary embedding of the backbone; it restarts at 0 in each document."""
    document_BS: Tensor
    """Number of the document in its row, -1 at padding."""
    block_BS: Tensor
    """Number of the image block in its row, -1 at tokens and padding."""
    bidirectional_BS: Tensor
    """Whether positions of the block attend to each other in both directions."""
    noised_BS: Tensor
    """Whether the block is hidden from all positions outside it."""
    label_BS: Tensor
    """Id of the next token where there is a cross-entropy loss, else `IGNORE`."""
    label_at_L: Tensor
    """Flat positions with a label."""
    at_I: Tensor
    """Flat position (row * S + position) of each patch."""
    image_I: Tensor
    """Number of the block to which each patch belongs, unique in the batch."""
    cell_I2: Tensor
    """Cell (row, column) of each patch in its image."""
    loss_at_J: Tensor
    """Indices into I of the patches that are learned."""
    draws: dict[str, Tensor]
    """What the objective drew for the patches (t, masks), first axis I."""
    grid_C2: Tensor
    """Patch grid (rows, columns) of each image copy."""
    size_at_M: Tensor
    """Flat position of each image's size token."""
    first_M2: Tensor
    """Cell of the patch of each image that is generated first."""
    copies: list[Copy]
    """Every image copy, by its number in `image_I`."""

    @property
    def sites(self) -> Sites:
        """The facts about all positions [B, S] that the attention rule uses."""
        slot = torch.arange(self.ids_BS.shape[1], device=self.ids_BS.device).expand_as(self.ids_BS)
        return Sites(slot, self.document_BS, self.block_BS, self.bidirectional_BS, self.noised_BS)

    def image_terms(self, image_loss: ImageLoss) -> int:
        """Number of terms of the image loss: learned patches, or learned images."""
        return sum(copy.learned for copy in self.copies) if image_loss == "image" else len(self.loss_at_J)

    def fields_as(self, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """All fields by name, with `change` applied to each tensor."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        changed = {name: change(value) for name, value in plain.items() if isinstance(value, Tensor)}
        return {**plain, **changed, "draws": {name: change(value) for name, value in self.draws.items()}}


@dataclass(kw_only=True)
class RawBatch(Rows):
    """A batch as loader workers send it: each image once, in raster order, as it was stored."""

    patches_UP: Tensor
    """Patches of all images, one image after another: pixel values 0..255 as uint8, which `prepare` scales or encodes,
    or latents or codes of another type, which are ready."""
    grids: list[Grid]
    """Patch grid of each image."""
    source_I: Tensor
    """Index into U of each patch."""
    noise_key_C: Tensor
    """Key of the noise of each image copy, int64."""
    noise_draws: int
    """Number of draws of noise for each learned patch, K."""

    def __getstate__(self) -> dict[str, Any]:
        """What a loader worker sends: the patches as they are, everything else in a few bytes per patch."""
        plain = vars(self)
        tensors = {name: value for name, value in plain.items() if isinstance(value, Tensor)}
        patches_UP = tensors.pop("patches_UP")
        rest = {name: value for name, value in plain.items() if not isinstance(value, Tensor) and name != "draws"}
        return {"patches_UP": patches_UP, "tensors": pack(tensors), "draws": pack(self.draws), **rest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        tensors, draws = unpack(state.pop("tensors")), unpack(state.pop("draws"))
        vars(self).update(state | tensors, draws=draws)

    def pin_memory(self) -> RawBatch:
        """A copy in page-locked memory, which a GPU can copy while it computes."""
        return RawBatch(**self.fields_as(Tensor.pin_memory))


@dataclass(kw_only=True)
class Batch(Rows):
    """The input of the model, as `prepare` makes it."""

    x_IP: Tensor
    """Clean patches: pixels in [-1, 1], latents of unit variance, or integer codes."""
    eps_JKP: Tensor
    """Standard normal noise of the learned patches, K draws for each."""

    @property
    def modality(self) -> Tensor:
        """1 at patches, 0 at tokens and padding, [B, S]."""
        return (self.block_BS >= 0).long()

    @property
    def cells(self) -> Cells:
        """The image copies and cells of the patches."""
        return Cells(self.image_I, self.cell_I2, [copy.grid for copy in self.copies])

    @property
    def learned_cells(self) -> Cells:
        """The image copies and cells of the learned patches."""
        return self.cells_at(self.loss_at_J, {number for number, copy in enumerate(self.copies) if copy.learned})

    def cells_at(self, at: Tensor, numbers: Collection[int]) -> Cells:
        """The image copies and cells of the patches `at`, which belong to the copies of these numbers."""
        grids = [copy.grid if number in numbers else None for number, copy in enumerate(self.copies)]
        return Cells(self.image_I[at], self.cell_I2[at], grids)

    @property
    def image_patches(self) -> Tensor:
        """For each learned patch, the number of patches of its image, [J]."""
        return self.grid_C2.prod(1)[self.image_I[self.loss_at_J]]

    @property
    def image_learned(self) -> Tensor:
        """For each learned patch, the number of learned patches of its image copy, [J]."""
        image_J = self.image_I[self.loss_at_J]
        return image_J.new_zeros(len(self.grid_C2)).index_add(0, image_J, torch.ones_like(image_J))[image_J]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """A copy on another device. `dtype`, if not None, is the type of patches and draws."""
        return Batch(**self.fields_as(lambda value: _moved(value, device, dtype)))


def _moved(value: Tensor, device: torch.device | str, dtype: torch.dtype | None) -> Tensor:
    return value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)


def prepare(
    raw: RawBatch,
    patcher: Patcher,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    compiled: bool = False,
) -> Batch:
    """Move a batch to a device, scale or encode its pixels there, and draw its noise there.

    No other function scales or encodes pixels, or draws noise for training. `patcher` must be on that device.
    `dtype`, if not None, is the type of patches, draws and noise. With `compiled`, one compiled kernel draws the noise
    on a GPU.
    """
    shared = raw.fields_as(lambda value: _moved(value, device, dtype))
    patches_UP, source_I = shared.pop("patches_UP"), shared.pop("source_I")
    key_C, draws = shared.pop("noise_key_C"), shared.pop("noise_draws")
    del shared["grids"]
    if patches_UP.dtype == torch.uint8:
        patches_UP = _encoded(patches_UP, raw.grids, patcher)
    if dtype is not None and patches_UP.is_floating_point():
        patches_UP = patches_UP.to(dtype)
    at_J = shared["loss_at_J"]
    normal = compiled_normal if compiled and at_J.is_cuda else keyed_normal
    eps_JKP = normal(key_C[shared["image_I"][at_J]], shared["cell_I2"][at_J], draws, patches_UP.shape[1])
    return Batch(**shared, x_IP=patches_UP[source_I], eps_JKP=eps_JKP if dtype is None else eps_JKP.to(dtype))


def _encoded(pixels_UL: Tensor, grids: Sequence[Grid], patcher: Patcher) -> Tensor:
    """Patches [U, P] of the pixel values of whole images. Images of the same grid are encoded together."""
    if len(set(grids)) == 1:
        whole_MNL = pixels_UL.view(len(grids), -1, pixels_UL.shape[1])
        return patcher.encode_pixels(whole_MNL, grids[0]).flatten(0, 1)
    counts = [rows * columns for rows, columns in grids]
    images = pixels_UL.split(counts)
    encoded: list[Tensor | None] = [None] * len(grids)
    for grid in dict.fromkeys(grids):
        of_grid = [number for number, other in enumerate(grids) if other == grid]
        encoded_MNP = patcher.encode_pixels(torch.stack([images[number] for number in of_grid]), grid)
        for number, x_NP in zip(of_grid, encoded_MNP, strict=True):
            encoded[number] = x_NP
    ready = patcher.ready
    nothing = torch.from_numpy(np.zeros((0, ready.length), ready.dtype)).to(pixels_UL.device)
    return torch.cat([nothing, *(x_NP for x_NP in encoded if x_NP is not None)])


@dataclass(frozen=True)
class RowFormat:
    """What all packed rows of a run have in common."""

    row_length: int
    tokenizer: Tokenizer
    nothing: Block
    """The block of an image without patches. It gives every draw a name and a shape, also if rows contain no image."""
    patches: Patches
    """Length and type of the patches that are packed."""
    noise_draws: int = 1
    """Number of draws of noise for each learned patch."""


def collate(rows: Sequence[Sequence[Strip | int]], form: RowFormat) -> RawBatch:
    """Pack written documents into rows.

    Each row is a list of strips and integers. An integer is an empty slot of that many positions: a sample that could
    not be read keeps its slot, so that all other samples stay where they are. The rest of a row is padding.

    Raises:
        ValueError: the documents of a row are longer than `row_length`.
    """
    shape, tokenizer = (len(rows), form.row_length), form.tokenizer
    ids = np.full(shape, tokenizer.pad, dtype=np.int64)
    position = np.zeros(shape, dtype=np.int64)
    document = np.full(shape, -1, dtype=np.int64)
    block = np.full(shape, -1, dtype=np.int64)
    bidirectional = np.zeros(shape, dtype=bool)
    noised = np.zeros(shape, dtype=bool)
    learned = np.ones(shape, dtype=bool)
    images: list[ImagePatches] = []
    placed: list[PlacedBlock] = []
    openings: list[Opening] = []
    for b, row in enumerate(rows):
        start = blocks = 0
        for number, strip in enumerate(row):
            if isinstance(strip, int):
                start += strip
                continue
            end = start + len(strip)
            if end > form.row_length:
                raise ValueError(
                    f"documents of {end} positions do not fit a row of {form.row_length} (data.row_length)"
                )
            here = (b, slice(start, end))
            ids[here], position[here], document[here] = strip.ids, strip.position, number
            local = np.array(strip.block, dtype=np.int64)
            block[here] = np.where(local >= 0, local + blocks, -1)
            blocks += int(local.max(initial=-1)) + 1
            bidirectional[here], noised[here], learned[here] = strip.bidirectional, strip.noised, strip.learned
            origin = b * form.row_length + start
            placed += [PlacedBlock(origin + p.offset, len(images) + p.image, p.block) for p in strip.blocks]
            openings += [Opening(origin + opening.offset, opening.first) for opening in strip.openings]
            images += strip.images
            start = end
        padding = document[b] < 0
        position[b][padding] = np.arange(padding.sum())

    label = next_tokens(ids, document, block, learned, tokenizer)
    starts = np.cumsum([0] + [len(image.x_NP) for image in images])
    counts = [len(p.block.order_N) for p in placed]
    losses = [
        p.block.loss if isinstance(p.block.loss, np.ndarray) else np.full(n, p.block.loss)
        for p, n in zip(placed, counts, strict=True)
    ]
    empty = np.zeros((0, form.patches.length), form.patches.dtype)
    drawn = [form.nothing.draws, *(p.block.draws for p in placed)]
    return RawBatch(
        ids_BS=torch.from_numpy(ids),
        position_BS=torch.from_numpy(position),
        document_BS=torch.from_numpy(document),
        block_BS=torch.from_numpy(block),
        bidirectional_BS=torch.from_numpy(bidirectional),
        noised_BS=torch.from_numpy(noised),
        label_BS=torch.from_numpy(label),
        label_at_L=torch.from_numpy(np.flatnonzero(label != IGNORE)),
        patches_UP=_stack([empty, *(image.x_NP for image in images)], form.patches.dtype),
        grids=[image.grid for image in images],
        source_I=_stack([np.zeros(0), *(starts[p.image] + p.block.order_N for p in placed)], np.int64),
        at_I=_stack([np.zeros(0), *(p.offset + np.arange(n) for p, n in zip(placed, counts, strict=True))], np.int64),
        image_I=torch.from_numpy(np.repeat(np.arange(len(placed)), counts)),
        cell_I2=_stack([np.zeros((0, 2)), *(raster(images[p.image].grid)[p.block.order_N] for p in placed)], np.int64),
        loss_at_J=torch.from_numpy(np.flatnonzero(np.concatenate([np.zeros(0, dtype=bool), *losses]))),
        draws={name: _stack([draws[name] for draws in drawn], np.float32) for name in form.nothing.draws},
        noise_key_C=torch.tensor([p.block.key for p in placed], dtype=torch.int64),
        noise_draws=form.noise_draws,
        grid_C2=torch.tensor([images[p.image].grid for p in placed], dtype=torch.int64).reshape(-1, 2),
        size_at_M=torch.tensor([opening.offset for opening in openings], dtype=torch.int64),
        first_M2=torch.tensor([opening.first for opening in openings], dtype=torch.int64).reshape(-1, 2),
        copies=[Copy(images[p.image].grid, bool(np.any(p.block.loss))) for p in placed],
    )


def next_tokens(
    ids: NDArray[np.int64],
    document: NDArray[np.int64],
    block: NDArray[np.int64],
    learned: NDArray[np.bool_],
    tokenizer: Tokenizer,
) -> NDArray[np.int64]:
    """The label of every position [B, S]: the id of the next token, or `IGNORE`.

    A position has a label if it is a token and the next position is a learned token of the same document. EOI is never
    a label, because the decoder closes images itself. The size token is one only where several sizes are declared.
    """
    label = np.full_like(ids, IGNORE)
    following = ids[:, 1:]
    target = (document[:, 1:] == document[:, :-1]) & (document[:, 1:] >= 0)
    target &= (block[:, 1:] < 0) & (block[:, :-1] < 0) & (following != tokenizer.eoi) & learned[:, 1:]
    if len(tokenizer.size) == 1:
        target &= ~np.isin(following, list(tokenizer.grid))
    label[:, :-1][target] = following[target]
    return label


def _stack(parts: Sequence[NDArray[Any]], dtype: type[np.generic]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.concatenate(parts), dtype=dtype))
