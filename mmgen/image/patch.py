"""Images to rows of patches and back, and how patch rows enter and leave the backbone.

Suffixes: I patches of a batch, N patches of one image, P numbers per patch, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mmgen.config import PatcherConfig
from mmgen.image.resize import fit

Grid = tuple[int, int]
Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]
Numbers = TypeVar("Numbers", np.float32, np.uint8)


@dataclass(frozen=True)
class Patches:
    """What single patches are made of: P numbers of one type."""

    length: int
    dtype: type[np.generic]


class Patcher(ABC):
    """Images to patches and back. `settings` are those of the model."""

    stored: str | None = None
    """Kind of precomputed array in shards that it takes in place of images."""

    def __init__(self, settings: PatcherConfig) -> None:
        self.settings = settings

    @property
    def sent(self) -> Patches:
        """Patches of the image itself, as loader workers send them."""
        return Patches(self.settings.pixel_length, np.uint8)

    @property
    def ready(self) -> Patches:
        """Patches as the model takes them."""
        return Patches(self.settings.patch_length, np.float32)

    def fit(self, image: Image.Image) -> Image.Image:
        """The image in the model's colour mode at the declared size of nearest aspect ratio.

        An image that has no declared size is scaled to cover it and cropped at the centre. Alpha is put on white.
        """
        return fit(image, self.settings.channels, self.settings.image_sizes)

    def pixels(self, image: Image.Image) -> tuple[Pixels, Grid]:
        """The image's pixels in 0..255, one row per patch [N, pixels of a patch], and their grid (rows, columns)."""
        values = np.asarray(self.fit(image))
        return cut(values.reshape(*values.shape[:2], -1), self.settings.side)

    def encode_stored(self, stored: NDArray[Any]) -> tuple[NDArray[Any], Grid]:
        """Ready patches [N, P] of a precomputed array and their grid; raises ValueError where it does not fit."""
        raise ValueError(f"model.patcher.kind '{self.settings.kind}' takes images, not precomputed arrays")

    @abstractmethod
    def encode_pixels(self, pixels_MNL: Tensor, grid: Grid) -> Tensor:
        """Patches [M, N, P] of pixels 0..255 [M, N, L] in raster order, on the patcher's device."""

    def encode(self, image: Image.Image) -> tuple[Floats, Grid]:
        """Patches [N, P] of an image in raster order, and their grid (rows, columns)."""
        pixels_NL, grid = self.pixels(image)
        encoded: Floats = self.encode_pixels(torch.from_numpy(pixels_NL)[None], grid)[0].cpu().numpy()
        return encoded, grid

    @abstractmethod
    def pictures(self, x_RNP: Floats, grid: Grid) -> list[Image.Image]:
        """The inverse of `encode`, for several images of one grid; values that no pixel has are clipped."""

    def decode(self, x_NP: Floats, grid: Grid) -> Image.Image:
        """The inverse of `encode` for one image."""
        return self.pictures(x_NP[None], grid)[0]

    def load(self) -> None:  # noqa: B027  # pixels need nothing
        """Read now what would be read when first needed; raises ValueError where that is not possible."""


class PixelPatcher(Patcher):
    """Pixels in [-1, 1], cut into square patches in raster order; within a patch the order is row, column, channel."""

    def encode_pixels(self, pixels_MNL: Tensor, grid: Grid) -> Tensor:
        return pixels_MNL.to(torch.float32) / 127.5 - 1

    def pictures(self, x_RNP: Floats, grid: Grid) -> list[Image.Image]:
        return [to_image(join(x_NP, grid, self.settings.patch_size)) for x_NP in x_RNP]


def to_image(pixels_HWC: Floats) -> Image.Image:
    """An image of pixels in [-1, 1]; values outside are clipped."""
    values = np.clip(np.rint((pixels_HWC + 1) * 127.5), 0, 255).astype(np.uint8)
    return Image.fromarray(values.squeeze(-1) if values.shape[-1] == 1 else values)


def cut(pixels_HWC: NDArray[Numbers], side: int) -> tuple[NDArray[Numbers], Grid]:
    """Cut [H, W, C] into patch rows [N, side * side * C]; raises ValueError where `side` does not divide H and W."""
    height, width, channels = pixels_HWC.shape
    if height % side or width % side:
        raise ValueError(f"an image of {height}x{width} is not divisible into patches of {side}x{side}")
    rows, columns = height // side, width // side
    blocks = pixels_HWC.reshape(rows, side, columns, side, channels).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(blocks.reshape(rows * columns, -1)), (rows, columns)


def join(x_NP: Floats, grid: Grid, side: int) -> Floats:
    """The inverse of `cut`: patch rows of `grid` back to [H, W, C]."""
    rows, columns = grid
    blocks = x_NP.reshape(rows, columns, side, side, -1).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(blocks.reshape(rows * side, columns * side, -1))


@lru_cache(maxsize=256)
def raster(grid: Grid) -> NDArray[np.int64]:
    """The (row, column) of each patch of a grid in raster order, [N, 2]."""
    return np.stack(np.divmod(np.arange(grid[0] * grid[1]), grid[1]), axis=1)
