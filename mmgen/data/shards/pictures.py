"""Decoding the images of shards, and the precomputed arrays (latents, codes) that replace them."""

from __future__ import annotations

import io
import json
import struct
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from mmgen.config import LimitsConfig, PatcherConfig
from mmgen.data.shards.samples import BadSample, Picture
from mmgen.image.resize import upright_size

FORMATS = ("PNG", "JPEG", "WEBP")
# Exceptions that Pillow's decoders raise for damaged or oversized data.
UNDECODABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    LookupError,
    ArithmeticError,
    TypeError,
    AttributeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
# Warnings about damaged metadata and large images repeat, in other words, the reasons that bad samples have.
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True)
class StoredKind:
    """A kind of precomputed array. The last two axes of an array are height and width in cells."""

    number: int
    """Its number in the column `kind_s` of an index, in which 0 is text and 1 an image."""
    plural: str
    """Its name in messages."""
    form: str
    """Type and shape of an array, for messages."""
    matches: Callable[[NDArray[Any]], bool]
    """Returns whether an array is of this kind."""
    dtype: type[np.generic]
    """Type of the opened array."""
    cell_pixels: Callable[[PatcherConfig], int]
    """Returns the side in pixels of the image region that one cell represents."""
    maker: str
    """Key of the safetensors header that holds a fingerprint of the array's maker."""
    remedy: str = ""
    """A remedy for a patcher that does not accept these arrays, printed before "name shards of another kind"."""


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
"""Kinds of precomputed arrays: latents of an autoencoder; codes of a discrete image tokenizer, one per patch."""


@dataclass(frozen=True)
class Stored:
    """A precomputed array and its kind."""

    kind: str
    array: NDArray[Any]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in cells."""
        height, width = self.array.shape[-2:]
        return height, width


def image_size(picture: Picture, limits: LimitsConfig) -> tuple[int, int]:
    """(height, width) of an image in pixels, read from its header, or of an array in cells; raises `BadSample`."""
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
        raise BadSample(undecodable(error)) from None


def undecodable(error: Exception, formats: Sequence[str] = FORMATS) -> str:
    """The reason for an image on which Pillow raised `error`."""
    if isinstance(error, UnidentifiedImageError):  # its message is the address of a Python object
        known = f", or not one of {', '.join(formats)}" if formats else ""
        return f"image cannot be decoded: its header is damaged{known}"
    return f"image cannot be decoded: {error or type(error).__name__}"


def open_image(data: bytes, limits: LimitsConfig | None = None, draft: Any = None) -> Image.Image:
    """Decode an image; `draft` is called with it before. Raises `BadSample` with the reason."""
    image = _header(data, limits or LimitsConfig())
    try:
        if draft:
            draft(image)
        image.load()
        return image
    except UNDECODABLE as error:
        raise BadSample(undecodable(error)) from None


def _numpy(file: io.BytesIO) -> NDArray[Any]:
    """A `.npy` array of plain numbers. Memory is allocated for the file's bytes, not for the shape in its header."""
    form = np.lib.format
    header = form.read_array_header_1_0 if form.read_magic(file) == (1, 0) else form.read_array_header_2_0
    shape, fortran, dtype = header(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not loaded")
    array = np.frombuffer(file.read(), dtype=dtype)
    return array.reshape(shape, order="F" if fortran else "C")


def _array(data: bytes) -> NDArray[Any]:
    """The array of a `.npy` or `.safetensors` file; among several tensors, one named like a kind, else the first."""
    if data[:6] == b"\x93NUMPY":
        return _numpy(io.BytesIO(data))
    from safetensors.numpy import load

    tensors = load(data)
    named = next((name for name in STORED if name in tensors), None)
    array: NDArray[Any] = tensors[named or next(iter(tensors))]
    return array


def open_stored(data: bytes) -> Stored:
    """A precomputed array in the type of its kind; raises `BadSample`."""
    try:
        array = _array(data)
    except Exception as error:  # safetensors has its own error, and a hostile header causes many others
        raise BadSample(f"array cannot be read: {error or 'it holds no tensor'}") from None
    kind = next((name for name, kind in STORED.items() if kind.matches(array)), None)
    if kind is None:
        known = ", ".join(f"{kind.form} ({name})" for name, kind in STORED.items())
        raise BadSample(f"array is {array.dtype} {array.shape}, which is none of: {known}")
    array = array.astype(STORED[kind].dtype)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise BadSample(f"{kind} holds values that are not finite")
    if (
        array.dtype.kind == "i" and array.min(initial=0) < 0
    ):  # also unsigned values that overflow a signed 64-bit number
        raise BadSample(f"{kind} holds values that are negative or too large")
    return Stored(kind, array)


def maker_of(picture: Picture, kind: str) -> str:
    """Fingerprint of an array's maker from its safetensors header; empty if the header has none."""
    try:
        header = json.loads(picture.data[8 : 8 + int.from_bytes(picture.data[:8], "little")])
        return str(header["__metadata__"][STORED[kind].maker])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
