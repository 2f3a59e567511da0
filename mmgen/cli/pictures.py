"""Picture files on the command line: opening them, finding them in folders, and notes on how they are fitted."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

    from mmgen.image.patch import Patcher

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""Ends of the names of files in a folder that count as pictures."""


def opened(path: Path) -> Image.Image:
    """Read a picture.

    Raises:
        ValueError: the file does not exist, cannot be read or is no picture; the message states which.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.copy()
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not an image: give a PNG, JPEG or another picture file") from None
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        why = (
            "does not exist: correct the path" if missing else f"cannot be read as an image: {error.strerror or error}"
        )
        raise ValueError(f"{path} {why}") from None


def files(paths: Sequence[Path]) -> list[Path]:
    """The given files, and the pictures of the given folders (not of folders inside them) in order of their names.

    Raises:
        ValueError: a folder holds no picture.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        if not inside:
            raise ValueError(f"the folder {path} holds no picture ({', '.join(SUFFIXES)}): name another one")
        found += inside
    return found


def note_changes(path: Path, image: Image.Image, patcher: Patcher) -> None:
    """Print a line on standard error if the picture is scaled, cropped or recoloured for the model."""
    if changes := describe_changes(image, patcher):
        print(f"{path} {changes}", file=sys.stderr, flush=True)


def describe_changes(image: Image.Image, patcher: Patcher) -> str:
    """Describe how an image is fitted to a declared size and to the model's colours; empty if it does not change."""
    from mmgen.image.resize import upright_size

    fitted = patcher.fit(image)
    (height, width), (new_height, new_width) = upright_size(image), (fitted.height, fitted.width)
    changes = []
    if (height, width) != (new_height, new_width):
        same_shape = height * new_width == width * new_height
        changes.append(f"{'scaled' if same_shape else 'scaled and cropped'} to {new_width}x{new_height}")
    if fitted.mode == "L" and image.mode not in ("1", "L", "LA", "La") and not image.mode.startswith("I"):
        changes.append("converted to grey")
    return f"is {width}x{height}; it was {' and '.join(changes)}" if changes else ""


def numbered(folder: Path, start: int, count: int) -> list[Path]:
    """Paths of `count` PNG files in a folder, with numbers from `start` up."""
    return [folder / f"{start + i:04d}.png" for i in range(count)]


def is_file(text: str) -> bool:
    """Whether a text is the path of a file that exists."""
    try:
        return Path(text).is_file()
    except OSError:  # too long for a path
        return False


def is_folder(text: str) -> bool:
    """Whether a text is the path of a folder that exists."""
    try:
        return Path(text).is_dir()
    except OSError:
        return False
