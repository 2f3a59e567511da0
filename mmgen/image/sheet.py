"""Captioned grids of small images."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont


def grid(images: Sequence[Image.Image], captions: Sequence[str], columns: int = 6, tile: int = 128) -> Image.Image:
    """One picture of all images, each enlarged to `tile` pixels without smoothing, above its caption."""
    font = ImageFont.load_default(11)
    lines = [textwrap.wrap(caption, tile // 6) or [""] for caption in captions]
    band = 14 * max((len(wrapped) for wrapped in lines), default=1) + 6
    gap = 8
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (tile + gap) + gap, rows * (tile + band + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, wrapped) in enumerate(zip(images, lines, strict=True)):
        left, top = gap + (i % columns) * (tile + gap), gap + (i // columns) * (tile + band + gap)
        scale = tile / max(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        sheet.paste(image.convert("RGB").resize(size, Image.Resampling.NEAREST), (left, top))
        draw.multiline_text((left, top + tile + 3), "\n".join(wrapped), fill="black", font=font, spacing=2)
    return sheet


def save(image: Image.Image, path: Path) -> None:
    """Write a PNG, and create its folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
