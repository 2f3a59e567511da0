"""What a caller passes to the decoder (`Request`) and what the decoder returns (`Result`, `Event`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmgen.flow.guide import Guide
from mmgen.image.patch import Grid, Patcher, cut

Mode = Literal["image", "text", "auto"]
Prompt = Sequence[str | Image.Image]
BATCH = 64
"""Number of requests that a caller with any number of them gives to the decoder at a time."""
WHITE = 128
"""Smallest grey value of a mask that counts as white."""


@dataclass(frozen=True)
class Inpaint:
    """In-painting: some patches of an image are kept, and the others are drawn again."""

    image: Image.Image
    keep: NDArray[np.bool_]
    """[rows, columns] of the patch grid; true where the patch is kept."""

    @classmethod
    def of_mask(cls, image: Image.Image, mask: Image.Image, patcher: Patcher) -> Inpaint:
        """Keep the patches in which no pixel of a mask is white; the mask is scaled and cropped as the image is.

        Raises:
            ValueError: the sizes of mask and image differ, or the mask keeps all patches.
        """
        if mask.size != image.size:
            raise ValueError(
                f"the mask is {mask.width}x{mask.height} and the picture {image.width}x{image.height}: give a mask of "
                "the same size, white where the picture is redrawn"
            )
        values = np.asarray(patcher.fit(mask.convert("L").convert("RGB")).convert("L"))
        patches, grid = cut(values[..., None], patcher.settings.side)
        keep = np.asarray((patches < WHITE).all(1)).reshape(grid)
        if keep.all():
            raise ValueError("the mask has no white pixel, so nothing would be drawn: make a part of it white")
        return cls(image, keep)


@dataclass(frozen=True)
class Request:
    """One prompt and how to continue it."""

    prompt: Prompt
    """Text and images in order; it may be empty only in mode `image`, which then draws an unconditional image."""
    mode: Mode = "auto"
    """`image`: draw one image and stop; `text`: text only; `auto`: the model chooses text or images until it ends."""
    seed: int = 0
    """The only source of randomness of this request; the other requests of the batch do not affect it."""
    grid: Grid | None = None
    """Patch grid (rows, columns) of the image of mode `image`; by default the first declared one."""
    inpaint: Inpaint | None = None
    """Known patches of the image of mode `image`."""
    negative_prompt: str | None = None
    """Text instead of the text that guidance removes from the prompt; by default `sample.negative_prompt`."""
    image: Image.Image | None = None
    """A picture from which the image of mode `image` starts. It is no part of the prompt."""
    strength: float = 0.8
    """How much of `image` changes: 0 is the picture itself, 1 starts from noise alone."""
    latents: NDArray[np.floating] | None = None
    """Standard normal noise [N, P], the patches of the image of mode `image` in raster order, from which it starts."""
    invert: bool = False
    """Run the flow backwards, from `image` to its noise, which is put into `Result.latents`; nothing is drawn."""
    guide: Guide | None = None
    """Moves the clean estimate of the image of mode `image` at each solver step. Its functions see [1, C, H, W]: pixels
    in [-1, 1], or normalised latents."""
    max_new_tokens: int | None = None
    """Largest number of text tokens; by default `sample.max_new_tokens`."""
    max_images: int | None = None
    """Largest number of images; by default `sample.max_images`."""
    stop: Sequence[str] = ()
    """Strings that end the document when they appear in its text; the result does not contain them."""


@dataclass
class Result:
    """The text and images that the model generated for one request."""

    segments: list[str | Image.Image] = field(default_factory=list)
    """Text and images in the order in which they were generated."""
    latents: NDArray[np.float32] | None = None
    """Of a request with `invert`: the noise [N, P] from which its picture is drawn."""
    finished: bool = False
    """True if the model ended the document, a stop string appeared or the image of mode `image` is done; false if a
    budget ran out."""

    @property
    def text(self) -> str:
        """All generated text, joined."""
        return "".join(segment for segment in self.segments if isinstance(segment, str)).strip()

    @property
    def images(self) -> list[Image.Image]:
        """All generated images."""
        return [segment for segment in self.segments if isinstance(segment, Image.Image)]


@dataclass(frozen=True)
class Event:
    """One item of the decoder's stream."""

    request: int
    """Index of the request in the call of `Decoder.stream`."""
    kind: Literal["token", "preview", "image", "end"]
    token: int | None = None
    """Of a `token`: its id."""
    text: str = ""
    """Of a `token`: the characters that it completes; empty while a character of several bytes is incomplete."""
    image: Image.Image | None = None
    """Of a `preview`: the current estimate of the clean image; of an `image`: the finished image."""
    result: Result | None = None
    """Of an `end`: the whole result of the request."""
