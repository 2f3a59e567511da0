"""Images of any origin to the size and colours that a model sees.

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
"""What makes an image of each EXIF orientation upright."""
FILTERS = {"lanczos": Image.Resampling.LANCZOS, "area": Image.Resampling.BOX}
Centering = tuple[float, float]
CENTRE: Centering = (0.5, 0.5)
_TRANSPOSED = (5, 6, 7, 8)


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8, as the header tells it when first asked.

    What follows the pixels of a PNG is ignored: the index, which reads headers alone, cannot know it.
    """
    if "orientation" not in image.info:
        found = Image.Image.getexif(image).get(ORIENTATION, 1)  # not the method of a PNG, which would decode it
        image.info["orientation"] = int(found) if found in range(1, 9) else 1
    return int(image.info["orientation"])


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) as the image is meant to be seen; reads its header alone."""
    turned = orientation(image) in _TRANSPOSED
    return (image.width, image.height) if turned else (image.height, image.width)


def nearest_size(sizes_N2: NDArray[np.int64], declared: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """For each (height, width) the index of the declared size that it is scaled and cropped to.

    A declared size itself; else the one of nearest aspect ratio, of several the largest that the image covers,
    else the smallest.
    """
    given = np.asarray(sizes_N2, dtype=np.float64).reshape(-1, 1, 2)
    offered = np.asarray(declared, dtype=np.float64).reshape(1, -1, 2)
    distance = np.abs(np.log(given[..., 0] / given[..., 1]) - np.log(offered[..., 0] / offered[..., 1]))
    close = distance <= distance.min(axis=1, keepdims=True) + 1e-9
    area = offered.prod(axis=2)
    covered = (given >= offered).all(axis=2)
    choice = np.where(covered, area, -area)
    choice = np.where(close, choice, -np.inf)
    choice = np.where((given == offered).all(axis=2), np.inf, choice)
    return np.asarray(choice.argmax(axis=1), dtype=np.int64)


@lru_cache(maxsize=1 << 14)
def target(size: tuple[int, int], declared: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The declared size that an image of `size` is scaled and cropped to."""
    return declared[int(nearest_size(np.array([size]), declared)[0])]


def flatten(image: Image.Image, channels: int) -> Image.Image:
    """Grey (1) or RGB (3) at 8 bits: alpha is put on white, 16 bits are scaled, CMYK and palettes are converted."""
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
    """The image upright, in the model's colours, scaled to cover its declared size and cropped to it.

    `centering` says which part is kept, (0, 0) the top left one, (0.5, 0.5) the centre.
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
    """Let a JPEG decode at a half, a quarter or an eighth of its size where that covers twice what is needed."""
    if image.format != "JPEG":
        return
    height, width = target(upright_size(image), tuple(declared))
    if upright_size(image) != (image.height, image.width):
        height, width = width, height
    image.draft(None, (2 * width, 2 * height))
