"""`mmgen data show`: packed rows as the model sees them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmgen.data.loader import Corpus, planned_steps
from mmgen.data.order import Position
from mmgen.sequence.attention import dense_visible
from mmgen.sequence.batch import Batch, prepare

SCALE = 4
SIDE = 128
"""Smallest side of a decoded image in the picture."""


def show(corpus: Corpus, count: int, out: Path) -> list[dict[str, Any]]:
    """Write a PNG for each of the first `count` rows, its mask beside its images, and say what stands in it."""
    out.mkdir(parents=True, exist_ok=True)
    shown: list[dict[str, Any]] = []
    number, rows, after = next(planned_steps(corpus.plan, count, 0, 1, Position()))
    for i, row in enumerate(rows):
        step = corpus.step(number, [row], after)
        batch = prepare(step.micro[0], corpus.patcher)
        images = decoded(corpus, batch)
        path = out / f"row-{i:03d}.png"
        picture(batch, images).save(path)
        names = ["/".join(corpus.dataset.name(document.index)) for document in row]
        facts = {"picture": str(path), "samples": names, "row": spelled(corpus, batch), "images": len(images)}
        shown.append({**facts, "positions": step.positions, "bad": step.bad})
    return shown


def decoded(corpus: Corpus, batch: Batch) -> list[Image.Image]:
    """The images of a row, from its patch rows in raster order."""
    images = []
    for block in batch.image_I.unique().tolist():
        here = batch.image_I == block
        place, x = batch.place_I2[here].numpy(), batch.x_IP[here].numpy()
        grid = (int(place[:, 0].max()) + 1, int(place[:, 1].max()) + 1)
        raster = np.empty_like(x)
        raster[place[:, 0] * grid[1] + place[:, 1]] = x
        images.append(corpus.patcher.decode(raster, grid))
    return images


def spelled(corpus: Corpus, batch: Batch) -> str:
    """A row in words: text as text, special tokens by name, patches as their number."""
    tokenizer = corpus.tokenizer
    names = {tokenizer.bos: "BOS", tokenizer.eos: "EOS", tokenizer.boi: "BOI", tokenizer.eoi: "EOI"}
    names |= {token: f"{rows}x{columns}" for token, (rows, columns) in tokenizer.grid.items()}
    ids, block, document = (a[0].tolist() for a in (batch.ids_BS, batch.block_BS, batch.document_BS))
    parts: list[str] = []
    text: list[int] = []
    i = 0
    while i < len(ids):
        special = document[i] < 0 or block[i] >= 0 or ids[i] in names
        if not special:
            text.append(ids[i])
        if text and (special or i + 1 == len(ids)):
            parts.append(repr(tokenizer.decode(text)))
            text = []
        run = 1
        if special and (document[i] < 0 or block[i] >= 0):
            while i + run < len(ids) and (document[i + run], block[i + run]) == (document[i], block[i]):
                run += 1
            parts.append(f"[{run} {'empty' if document[i] < 0 else 'patches'}]")
        elif special:
            parts.append(names[ids[i]])
        i += run
    return " ".join(parts).replace("EOS BOS", "EOS | BOS")


def picture(batch: Batch, images: list[Image.Image]) -> Image.Image:
    """The attention mask (white: query row sees key column), and the images at its right."""
    seen = dense_visible(batch.sites)[0].numpy()
    mask = Image.fromarray((seen * 255).astype(np.uint8)).resize((seen.shape[0] * SCALE,) * 2, Image.Resampling.NEAREST)
    large = []
    for image in images:
        factor = max(1, SIDE // max(image.size))
        large.append(image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST))
    width = max((image.width for image in large), default=0)
    height = max(mask.height, sum(image.height + 4 for image in large))
    sheet = Image.new("RGB", (mask.width + 8 + width, height), (90, 90, 90))
    sheet.paste(mask, (0, 0))
    top = 0
    for image in large:
        sheet.paste(image, (mask.width + 8, top))
        top += image.height + 4
    return sheet
