"""Images to rows of patches and back, and how patch rows enter and leave the backbone.

Suffixes: I patches of a batch, N patches of one image, P numbers per patch, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from mmgen.config import PatcherConfig, choose
from mmgen.frame import fit

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


class Places(NamedTuple):
    """Where each patch row stands: which image copy it belongs to, and its (row, column) there."""

    image_I: Tensor
    place_I2: Tensor


class PlaceEmbedding(nn.Module):
    """Sin-cos features of row and column, projected to the width; defined for grids never seen.

    Features per axis as in Vaswani et al. 2017, section 3.5, with the longest wavelength cut to 1,000 patches.
    """

    def __init__(self, width: int, features: int = 64) -> None:
        super().__init__()
        self.features = features
        self.project = nn.Linear(features, width, bias=False)

    def forward(self, place_I2: Tensor) -> Tensor:
        """[..., 2] integer places to [..., D]."""
        weight = self.project.weight
        quarter = self.features // 4
        exponent = torch.arange(quarter, device=weight.device, dtype=weight.dtype) / quarter
        angle = place_I2.to(weight.dtype).unsqueeze(-1) * 1000.0**-exponent
        embedded: Tensor = self.project(torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(-2))
        return embedded


class PatchProjection(nn.Module, ABC):
    """The two maps between patch rows and the backbone's width.

    `encode` may return a memory, first axis I (for example the skip connections of a U-Net); `decode` is given
    its entries of the patches it decodes, always whole images. Time and places are passed for projections that
    need them.
    """

    @abstractmethod
    def encode(self, x_IP: Tensor, t_I: Tensor, places: Places) -> tuple[Tensor, Tensor | None]:
        """Patch rows [I, P] to [I, D], and a memory for `decode`."""

    @abstractmethod
    def decode(self, hidden_ID: Tensor, memory: Tensor | None, t_I: Tensor, places: Places) -> Tensor:
        """Hidden states [I, D] to patch rows [I, P]; zero at initialisation."""


class OutputLinear(nn.Linear):
    """A linear map that is zero at initialisation, so that a fresh model predicts zero."""


def _bottleneck(settings: PatcherConfig, width: int) -> nn.Module:
    """Two linear maps through a narrow layer (Li and He 2025, JiT, section 4.3)."""
    narrow = nn.Linear(settings.patch_length, settings.bottleneck, bias=False)
    return nn.Sequential(narrow, nn.Linear(settings.bottleneck, width))


ENTRIES: dict[str, Callable[[PatcherConfig, int], nn.Module]] = {
    "linear": lambda settings, width: nn.Linear(settings.patch_length, width),
    "bottleneck": _bottleneck,
}
"""Maps of single patch rows into the backbone's width, by name of the projection."""


class LinearProjection(PatchProjection):
    """A map of single patch rows on the way in, and one linear map on the way out."""

    def __init__(self, settings: PatcherConfig, width: int) -> None:
        super().__init__()
        self.enter = ENTRIES[settings.projection](settings, width)
        self.leave = OutputLinear(width, settings.patch_length)

    def encode(self, x_IP: Tensor, t_I: Tensor, places: Places) -> tuple[Tensor, Tensor | None]:
        return self.enter(x_IP), None

    def decode(self, hidden_ID: Tensor, memory: Tensor | None, t_I: Tensor, places: Places) -> Tensor:
        leave: Tensor = self.leave(hidden_ID)
        return leave


PROJECTIONS: dict[str, Callable[[PatcherConfig, int], PatchProjection]] = {
    "linear": LinearProjection,
    "bottleneck": LinearProjection,
}


def build_projection(settings: PatcherConfig, width: int) -> PatchProjection:
    """The projection that `model.patcher.projection` names."""
    projection: PatchProjection = choose(PROJECTIONS, settings.projection, "model.patcher.projection")(settings, width)
    return projection
