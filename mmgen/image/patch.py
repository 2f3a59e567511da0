"""Patchers: images cut into patches and joined again, here with patches of pixels.

Suffixes: M images, R drawn images, N patches of one image, P values of a patch, L pixel values of a patch,
H height, W width, C channels.
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
"""Number of rows and columns of patches."""
Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]
"""Pixel values 0..255."""
Numbers = TypeVar("Numbers", np.float32, np.uint8)


@dataclass(frozen=True)
class Patches:
    """The format of a patch: its number of values and their type."""

    length: int
    dtype: type[np.generic]


class Patcher(ABC):
    """Base class of patchers, which turn images into patches and back. `settings` are `model.patcher`."""

    stored: str | None = None
    """Kind of precomputed array that the patcher reads from shards instead of images; None for images only."""

    def __init__(self, settings: PatcherConfig) -> None:
        self.settings = settings

    @property
    def sent(self) -> Patches:
        """Format of the patches that loader workers send: pixel values of the image."""
        return Patches(self.settings.pixel_length, np.uint8)

    @property
    def ready(self) -> Patches:
        """Format of the patches that the model reads."""
        return Patches(self.settings.patch_length, np.float32)

    def fit(self, image: Image.Image) -> Image.Image:
        """The image in the colour mode of the model, at the declared size with the nearest aspect ratio.

        An image of another size is scaled to cover that size and cropped at the centre. Transparency becomes white.
        """
        return fit(image, self.settings.channels, self.settings.image_sizes)

    def pixels(self, image: Image.Image) -> tuple[Pixels, Grid]:
        """Pixel values 0..255 of the patches of an image [N, L] in raster order, and the patch grid (rows, columns)."""
        values = np.asarray(self.fit(image))
        return cut(values.reshape(*values.shape[:2], -1), self.settings.side)

    def encode_stored(self, stored: NDArray[Any]) -> tuple[NDArray[Any], Grid]:
        """Patches [N, P] of a precomputed array, and the patch grid. A wrong shape raises a ValueError."""
        raise ValueError(f"model.patcher.kind '{self.settings.kind}' reads images, not precomputed arrays")

    @abstractmethod
    def encode_pixels(self, pixels_MNL: Tensor, grid: Grid) -> Tensor:
        """Patches [M, N, P] on the device of the patcher, from pixel values 0..255 [M, N, L] in raster order."""

    def encode(self, image: Image.Image) -> tuple[Floats, Grid]:
        """Patches [N, P] of an image in raster order, and the patch grid (rows, columns)."""
        pixels_NL, grid = self.pixels(image)
        encoded: Floats = self.encode_pixels(torch.from_numpy(pixels_NL)[None], grid)[0].cpu().numpy()
        return encoded, grid

    @abstractmethod
    def pictures(self, x_RNP: Floats, grid: Grid) -> list[Image.Image]:
        """The inverse of `encode`: patches [R, N, P] of one grid to R images. Values outside the range are clipped."""

    def decode(self, x_NP: Floats, grid: Grid) -> Image.Image:
        """The inverse of `encode` for one image."""
        return self.pictures(x_NP[None], grid)[0]

    def load(self) -> None:  # noqa: B027  # a patcher of pixels has no files
        """Load files now instead of at first use. It raises ValueError if that fails."""


class PixelPatcher(Patcher):
    """Square patches of pixels, scaled to [-1, 1]. The values of a patch are ordered by row, column and channel."""

    def encode_pixels(self, pixels_MNL: Tensor, grid: Grid) -> Tensor:
        return pixels_MNL.to(torch.float32) / 127.5 - 1

    def pictures(self, x_RNP: Floats, grid: Grid) -> list[Image.Image]:
        return [to_image(join(x_NP, grid, self.settings.patch_size)) for x_NP in x_RNP]


def to_image(pixels_HWC: Floats) -> Image.Image:
    """An image from values in [-1, 1] of shape [H, W, C]. Values outside the range are clipped."""
    values = np.clip(np.rint((pixels_HWC + 1) * 127.5), 0, 255).astype(np.uint8)
    return Image.fromarray(values.squeeze(-1) if values.shape[-1] == 1 else values)


def cut(pixels_HWC: NDArray[Numbers], side: int) -> tuple[NDArray[Numbers], Grid]:
    """Cut an image [H, W, C] into patches [N, side * side * C] in raster order, and return their grid too.

    Raises:
        ValueError: `side` does not divide H and W.
    """
    height, width, channels = pixels_HWC.shape
    if height % side or width % side:
        raise ValueError(f"an image of {height}x{width} is not divisible into patches of {side}x{side}")
    rows, columns = height // side, width // side
    blocks = pixels_HWC.reshape(rows, side, columns, side, channels).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(blocks.reshape(rows * columns, -1)), (rows, columns)


def join(x_NP: Floats, grid: Grid, side: int) -> Floats:
    """The inverse of `cut`: patches [N, P] of a grid to an image [H, W, C]."""
    rows, columns = grid
    blocks = x_NP.reshape(rows, columns, side, side, -1).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(blocks.reshape(rows * side, columns * side, -1))


def joined(patches_MNP: Tensor, grid: Grid, side: int) -> Tensor:
    """Patches [M, N, P] in raster order to [M, C, H, W]: `join` for a batch on any device, differentiable."""
    (rows, columns), m = grid, len(patches_MNP)
    blocks = patches_MNP.view(m, rows, columns, side, side, -1).permute(0, 5, 1, 3, 2, 4)
    return blocks.reshape(m, -1, rows * side, columns * side)


@lru_cache(maxsize=256)
def raster(grid: Grid) -> NDArray[np.int64]:
    """The cells (row, column) of a grid in raster order, [N, 2]."""
    return np.stack(np.divmod(np.arange(grid[0] * grid[1]), grid[1]), axis=1)
