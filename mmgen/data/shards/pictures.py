"""What pictures of shards hold: encoded images, and precomputed arrays that stand for images."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmgen.config import LimitsConfig, PatcherConfig
from mmgen.data.shards.samples import BadSample, Picture
from mmgen.image.resize import upright_size

FORMATS = ("PNG", "JPEG", "WEBP")
# What Pillow's decoders raise for damaged or oversized data.
UNDECODABLE = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class StoredKind:
    """A kind of precomputed array. The last two axes of an array are height and width in cells."""

    number: int
    """In the column `kind_s` of an index, where 0 is text and 1 an image."""
    plural: str
    """Its arrays in messages."""
    form: str
    """What an array looks like, in messages."""
    matches: Callable[[NDArray[Any]], bool]
    """Whether an array is of this kind."""
    dtype: type[np.generic]
    """Type of the opened array."""
    cell_pixels: Callable[[PatcherConfig], int]
    """Pixels of the image that one cell stands for, on each axis."""
    maker: str
    """Key of the safetensors header under which the writer notes a fingerprint of what made the array."""
    remedy: str = ""
    """What a user whose patcher does not take these arrays may do, in front of "name shards of another kind"."""


STORED = {
    "latent": StoredKind(
        2,
        "latents",
        "floating point [channels, height, width]",
        lambda array: array.ndim == 3 and array.dtype.kind == "f",
        np.float32,
        lambda patcher: patcher.vae.factor,
        "vae",
        "set it to vae, or ",
    ),
    "codes": StoredKind(
        3,
        "codes",
        "integers [height, width]",
        lambda array: array.ndim == 2 and array.dtype.kind in "iu",
        np.int64,
        lambda patcher: patcher.side,
        "image_tokenizer",
    ),
}
"""Latents of an autoencoder; codes of a discrete image tokenizer, one per patch."""


@dataclass(frozen=True)
class Stored:
    """An opened array and its kind."""

    kind: str
    array: NDArray[Any]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in cells."""
        height, width = self.array.shape[-2:]
        return height, width


def image_size(picture: Picture, limits: LimitsConfig) -> tuple[int, int]:
    """(height, width) of an image in pixels, from its header, or of an array in cells; raises `BadSample`."""
    if picture.stored:
        return open_stored(picture.data).size
    return upright_size(_header(picture.data, limits))


def _header(data: bytes, limits: LimitsConfig) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        pixels = image.width * image.height
        if pixels > limits.pixels:
            size = f"{image.width}x{image.height}"
            raise BadSample(f"image of {size} has more than {limits.pixels} pixels (data.limits.pixels)")
        upright_size(image)
        return image
    except BadSample:
        raise
    except UNDECODABLE as error:
        raise BadSample(f"image cannot be decoded: {error}") from None


def open_image(data: bytes, limits: LimitsConfig | None = None, draft: Any = None) -> Image.Image:
    """Decode an image, after `draft` was called with it; raises `BadSample` with the reason."""
    image = _header(data, limits or LimitsConfig())
    try:
        if draft:
            draft(image)
        image.load()
        return image
    except UNDECODABLE as error:
        raise BadSample(f"image cannot be decoded: {error}") from None


def _numpy(file: io.BytesIO) -> NDArray[Any]:
    """A `.npy` array of plain numbers; nothing is allocated that the file does not hold."""
    form = np.lib.format
    header = form.read_array_header_1_0 if form.read_magic(file) == (1, 0) else form.read_array_header_2_0
    shape, fortran, dtype = header(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    array = np.frombuffer(file.read(), dtype=dtype)
    return array.reshape(shape, order="F" if fortran else "C")


def _array(data: bytes) -> NDArray[Any]:
    """The array of a `.npy` or `.safetensors` file; of several tensors one named after a kind, else the first."""
    if data[:6] == b"\x93NUMPY":
        return _numpy(io.BytesIO(data))
    from safetensors.numpy import load

    tensors = load(data)
    named = next((name for name in STORED if name in tensors), None)
    array: NDArray[Any] = tensors[named or next(iter(tensors))]
    return array


def open_stored(data: bytes) -> Stored:
    """A precomputed array, in the type of its kind; raises `BadSample`."""
    try:
        array = _array(data)
    except Exception as error:  # safetensors' own error, and whatever a hostile header sets off
        raise BadSample(f"array cannot be read: {error}") from None
    kind = next((name for name, kind in STORED.items() if kind.matches(array)), None)
    if kind is None:
        known = ", ".join(f"{kind.form} ({name})" for name, kind in STORED.items())
        raise BadSample(f"array is {array.dtype} {array.shape}, which is none of: {known}")
    array = array.astype(STORED[kind].dtype)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise BadSample(f"{kind} holds values that are not finite")
    if array.dtype.kind == "i" and array.min(initial=0) < 0:  # also what does not fit into 64 bits with a sign
        raise BadSample(f"{kind} holds values that are negative or too large")
    return Stored(kind, array)


def maker_of(picture: Picture, kind: str) -> str:
    """Fingerprint of what made an array, as its safetensors header notes it; empty where it notes none."""
    try:
        header = json.loads(picture.data[8 : 8 + int.from_bytes(picture.data[:8], "little")])
        return str(header["__metadata__"][STORED[kind].maker])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
