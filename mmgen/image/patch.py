"""Images to rows of patches and back, and how patch rows enter and leave the backbone.

Suffixes: I patches of a batch, N patches of one image, P numbers per patch, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmgen.config import PatcherConfig
from mmgen.image.resize import fit

Grid = tuple[int, int]
Floats = NDArray[np.float32]
Levels = NDArray[np.uint8]
Numbers = TypeVar("Numbers", np.float32, np.uint8)


class Patcher(ABC):
    """Images to patch rows and back."""

    def __init__(self, settings: PatcherConfig) -> None:
        self.settings = settings

    def fit(self, image: Image.Image) -> Image.Image:
        """The image in the model's colour mode at the declared size of nearest aspect ratio.

        An image that has no declared size is scaled to cover it and cropped at the centre. Alpha is put on white.
        """
        return fit(image, self.settings.channels, self.settings.image_sizes)

    def levels(self, image: Image.Image) -> tuple[Levels, Grid]:
        """The image's pixels in 0..255, one row per patch [N, pixels of a patch], and their grid (rows, columns)."""
        pixels = np.asarray(self.fit(image))
        return cut(pixels.reshape(*pixels.shape[:2], -1), self.settings.side)

    @abstractmethod
    def encode(self, image: Image.Image) -> tuple[Floats, Grid]:
        """Patch rows [N, P] of an image and their grid (rows, columns)."""

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

    def encode(self, image: Image.Image) -> tuple[Floats, Grid]:
        levels_NP, grid = self.levels(image)
        return scale(levels_NP), grid

    def pictures(self, x_RNP: Floats, grid: Grid) -> list[Image.Image]:
        return [to_image(join(x_NP, grid, self.settings.patch_size)) for x_NP in x_RNP]


def scale(levels: Levels) -> Floats:
    """Levels in 0..255 to [-1, 1]."""
    scaled: Floats = levels.astype(np.float32) / 127.5 - 1
    return scaled


def to_image(pixels_HWC: Floats) -> Image.Image:
    """An image of pixels in [-1, 1]; values outside are clipped."""
    levels = np.clip(np.rint((pixels_HWC + 1) * 127.5), 0, 255).astype(np.uint8)
    return Image.fromarray(levels.squeeze(-1) if levels.shape[-1] == 1 else levels)


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
