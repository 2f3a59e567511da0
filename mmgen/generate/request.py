"""What a caller gives the decoder and gets back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmgen.image.patch import Grid

Mode = Literal["image", "text", "auto"]
Prompt = Sequence[str | Image.Image]


@dataclass(frozen=True)
class Inpaint:
    """An image of which some patches are kept while the others are drawn anew."""

    image: Image.Image
    keep: NDArray[np.bool_]
    """[rows, columns] of the patch grid, true where the patch stays."""


@dataclass(frozen=True)
class Request:
    """One prompt and what to make of it."""

    prompt: Prompt
    """Text and images in order; may be empty only for an unconditional image."""
    mode: Mode = "auto"
    """`image`: draw one image now and stop; `text`: words only; `auto`: the model chooses until it ends."""
    seed: int = 0
    """All randomness of this request comes from its seed, whatever else is in the batch."""
    grid: Grid | None = None
    """Patch grid of a forced image; by default the first declared one."""
    inpaint: Inpaint | None = None
    """Known patches of a forced image."""
    max_new_tokens: int | None = None
    """Text tokens; by default `sample.max_new_tokens`."""
    max_images: int | None = None
    """Images; by default `sample.max_images`."""
    stop: Sequence[str] = ()
    """Text that ends the document; it is left out of the result."""


@dataclass
class Result:
    """What the model added to a prompt."""

    segments: list[str | Image.Image] = field(default_factory=list)
    finished: bool = False
    """The model ended the document itself (or the forced image is done); else a budget ran out."""

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
    """Something that happened to one request while it is served."""

    row: int
    """Index of the request."""
    kind: Literal["token", "preview", "image", "end"]
    token: int | None = None
    """`token`: its id."""
    text: str = ""
    """`token`: what it adds to the text; empty inside a character of several bytes."""
    image: Image.Image | None = None
    """`preview`: the clean estimate of the image being drawn; `image`: the finished one."""
    result: Result | None = None
    """`end`: everything that the request gave."""
