"""Resizing and colour conversion of images to a declared size of the model.

Sizes are (height, width) in pixels, after the EXIF orientation.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""EXIF orientation to the operation that turns the image upright."""
FILTERS = {"lanczos": Image.Resampling.LANCZOS, "area": Image.Resampling.BOX}
Centering = tuple[float, float]
CENTRE: Centering = (0.5, 0.5)
_TRANSPOSED = (5, 6, 7, 8)


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8, read from the header at the first call and kept in `image.info`.

    Data after the pixels of a PNG is ignored, because the index of a shard reads only headers and must agree.
    """
    if "orientation" not in image.info:
        # The method of the base class, because that of a PNG image would decode the whole file.
        value = Image.Image.getexif(image).get(ORIENTATION, 1)
        image.info["orientation"] = int(value) if value in range(1, 9) else 1
    return int(image.info["orientation"])


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) of the upright image. Only the header is read."""
    turned = orientation(image) in _TRANSPOSED
    return (image.width, image.height) if turned else (image.height, image.width)


def nearest_size(sizes_N2: NDArray[np.int64], declared: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """For each (height, width), the index of the declared size to which an image is scaled and cropped.

    An image of a declared size keeps it. Otherwise the size with the nearest aspect ratio is chosen: of several, the
    largest one that the image covers, or the smallest if it covers none.
    """
    sizes = np.asarray(sizes_N2, dtype=np.float64).reshape(-1, 1, 2)
    offered = np.asarray(declared, dtype=np.float64).reshape(1, -1, 2)
    distance = np.abs(np.log(sizes[..., 0] / sizes[..., 1]) - np.log(offered[..., 0] / offered[..., 1]))
    close = distance <= distance.min(axis=1, keepdims=True) + 1e-9
    area = offered.prod(axis=2)
    covered = (sizes >= offered).all(axis=2)
    choice = np.where(covered, area, -area)
    choice = np.where(close, choice, -np.inf)
    choice = np.where((sizes == offered).all(axis=2), np.inf, choice)
    return np.asarray(choice.argmax(axis=1), dtype=np.int64)


@lru_cache(maxsize=1 << 14)
def target(size: tuple[int, int], declared: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The declared size to which an image of `size` is scaled and cropped."""
    return declared[int(nearest_size(np.array([size]), declared)[0])]


def flatten(image: Image.Image, channels: int) -> Image.Image:
    """Convert to grey (1) or RGB (3) with 8 bits. Transparency becomes white, and 16 bits are scaled to 8."""
    mode = "L" if channels == 1 else "RGB"
    if image.mode == mode and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
    elif image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def fit(
    image: Image.Image,
    channels: int,
    declared: Sequence[tuple[int, int]],
    resize: str = "lanczos",
    centering: Centering = CENTRE,
) -> Image.Image:
    """The upright image in the colours of the model, scaled to cover its declared size and cropped to it.

    `centering` selects the part that is kept: (0, 0) is the top left, (0.5, 0.5) the centre.
    """
    size = target(upright_size(image), tuple(declared))
    turn = TURNS.get(orientation(image))
    image = flatten(image, channels)
    if turn is not None:
        image = image.transpose(turn)
        image.info["orientation"] = 1
    if (image.height, image.width) == size:
        return image
    return ImageOps.fit(image, (size[1], size[0]), FILTERS[resize], centering=centering)


def draft(image: Image.Image, declared: Sequence[tuple[int, int]]) -> None:
    """Let a JPEG decode at 1/2, 1/4 or 1/8 of its size, if the result is at least twice as large as needed."""
    if image.format != "JPEG":
        return
    height, width = target(upright_size(image), tuple(declared))
    if upright_size(image) != (image.height, image.width):
        height, width = width, height
    image.draft(None, (2 * width, 2 * height))
