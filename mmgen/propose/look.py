"""A look at data before it is trained on: pictures, captions, and what is wrong with them."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median

import numpy as np
from PIL import Image, ImageChops

from mmgen.config import DataConfig
from mmgen.data.shards.pictures import open_image
from mmgen.data.shards.samples import BadSample, Picture, Segment, Text, assemble
from mmgen.image.resize import upright_size

Size = tuple[int, int]
"""(height, width) in pixels."""
KEEP = DataConfig(captionless="keep")


@dataclass(frozen=True)
class Document:
    """One sample: its texts and the sizes of its pictures."""

    texts: tuple[str, ...]
    pictures: tuple[Size, ...]


@dataclass
class Look:
    """What a look at samples found."""

    total: int | None = None
    """Number of items of the source, if it is known; the look may have stopped earlier."""
    documents: list[Document] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """Why items cannot be used."""
    coloured: int = 0
    """Number of pictures that are not grey."""
    digests: Counter[bytes] = field(default_factory=Counter)
    """Hash of each picture's file to the number of such pictures."""

    def add(self, members: Mapping[str, bytes]) -> None:
        """Look at the members of one sample; raises `BadSample` if it cannot be used."""
        sample = assemble("", "", members, KEEP)
        pictures = [self._picture(segment) for segment in sample.segments if isinstance(segment, Picture)]
        self.documents.append(Document(texts(sample.segments), tuple(pictures)))

    def _picture(self, picture: Picture) -> Size:
        if picture.stored:
            raise BadSample(
                "it holds stored latents, for which `mmgen init` cannot choose settings: start from "
                "configs/scenes_latent.yaml"
            )
        image = open_image(picture.data)
        self.coloured += is_coloured(image)
        self.digests[hashlib.sha256(picture.data).digest()] += 1
        return upright_size(image)

    @property
    def sizes(self) -> Counter[Size]:
        """The number of pictures of each size."""
        return Counter(size for document in self.documents for size in document.pictures)

    @property
    def captions(self) -> list[str]:
        """The texts of all documents."""
        return [text for document in self.documents for text in document.texts]

    @property
    def repeated(self) -> int:
        """Number of pictures whose file equals that of an earlier one."""
        return sum(count - 1 for count in self.digests.values())

    def lines(self) -> list[str]:
        """What was found, as lines for people."""
        sizes, captions = self.sizes, self.captions
        seen = f"{len(self.documents):,}" + (f" of {self.total:,}" if self.total else "")
        lines = [f"samples looked at: {seen}, with {sizes.total():,} pictures and {len(captions):,} texts"]
        if sizes:
            common = ", ".join(f"{h}x{w} ({n:,})" for (h, w), n in sizes.most_common(3))
            colour = "grey" if not self.coloured else f"{self.coloured / sizes.total():.0%} coloured"
            lines.append(f"pictures: {colour}; {len(sizes):,} sizes, height x width: {common}")
        if captions:
            lengths = [len(text) for text in captions]
            scripts = ", ".join(f"{name} {share:.0%}" for name, share in alphabets(captions).items())
            lines.append(
                f"texts: {median(lengths):.0f} characters in the median, {max(lengths):,} at most; "
                f"{len(set(captions)):,} different; letters: {scripts or 'none'}"
            )
        if self.repeated:
            lines.append(f"{self.repeated:,} pictures equal an earlier one; equal pictures stay in one split")
        if without := sum(not document.texts for document in self.documents):
            lines.append(f"{without:,} pictures have no text")
        if self.left_out:
            lines.append(f"{len(self.left_out):,} items cannot be used, such as {self.left_out[0]}")
        return lines


def texts(segments: Iterable[Segment]) -> tuple[str, ...]:
    """The texts among segments that are not empty."""
    return tuple(segment.text for segment in segments if isinstance(segment, Text) and segment.text)


def is_coloured(image: Image.Image) -> bool:
    """Whether a pixel of the image has channels that differ by more than rounding."""
    if image.mode in ("1", "L", "LA", "I", "I;16"):
        return False
    red, green, blue = image.convert("RGB").split()
    spread = (ImageChops.difference(red, green), ImageChops.difference(green, blue))
    return any(int(np.asarray(part).max()) > 2 for part in spread)


def alphabets(captions: Iterable[str]) -> dict[str, float]:
    """The share of letters of each script, the most frequent first, from their Unicode names."""
    counts = Counter(
        unicodedata.name(letter, "other").split()[0].split("-")[0].capitalize()
        for text in captions
        for letter in text
        if letter.isalpha()
    )
    return {name: count / counts.total() for name, count in counts.most_common(3)}
