"""`mmgen data show`: pictures of packed rows as the model sees them, with their text and attention mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from mmgen.data.loader import Corpus, planned_steps
from mmgen.data.order import Position
from mmgen.data.shards.samples import BadRecord
from mmgen.sequence.attention import dense_visible
from mmgen.sequence.batch import IGNORE, Batch, prepare
from mmgen.sequence.tokenizer import Tokenizer

SCALE = 4
SIDE = 128
"""Smallest side in pixels of a decoded image in the picture."""
FRAME = 4
GIVEN = (255, 140, 0)
"""Colour of segments that are given and not learned."""


@dataclass(frozen=True)
class ShownRow:
    """The content of a row."""

    picture: Path
    samples: list[str]
    row: str
    """The content in words."""
    images: int
    """Number of copies of images."""
    positions: int
    bad: Sequence[BadRecord]

    def as_dict(self) -> dict[str, object]:
        """The fields as a dictionary, for JSON."""
        return {**asdict(self), "picture": str(self.picture)}


def show(corpus: Corpus, count: int, out: Path) -> list[ShownRow]:
    """Write a PNG with the mask and the images of each of the first `count` rows, and describe the rows.

    Raises:
        ValueError: `count` is less than 1, or `out` is a file.
    """
    if count < 1:
        raise ValueError(f"{count} rows are requested: ask for at least one")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: name a folder")
    out.mkdir(parents=True, exist_ok=True)
    shown: list[ShownRow] = []
    planned = next(planned_steps(corpus.plan, count, 0, 1, Position()))
    for i, row in enumerate(planned.rows):
        step = corpus.step(planned.number, [row], planned.after)
        batch = prepare(step.micro[0], corpus.patcher)
        given_S = given(batch, corpus.tokenizer)
        images = decoded(corpus, batch, given_S)
        path = out / f"row-{i:03d}.png"
        picture(batch, images, given_S).save(path)
        names = ["/".join(corpus.dataset.name(document.index)) for document in row]
        words = in_words(batch, corpus.tokenizer, given_S)
        shown.append(ShownRow(path, names, words, len(images), step.positions, step.bad))
    return shown


def given(batch: Batch, tokenizer: Tokenizer) -> NDArray[np.bool_]:
    """Whether each position [S] of the first row belongs to a segment that is given and not learned.

    This follows from the labels: a text token is learned if it is the label of the previous position, and an image is
    learned if its BOI is.
    """
    ids, label, document, block = (
        a[0].tolist() for a in (batch.ids_BS, batch.label_BS, batch.document_BS, batch.block_BS)
    )
    given_S = np.zeros(len(ids), dtype=bool)
    for i in range(1, len(ids)):
        if document[i] < 0 or document[i] != document[i - 1]:
            continue
        inside = block[i] >= 0 or ids[i] == tokenizer.eoi or ids[i - 1] == tokenizer.boi
        given_S[i] = given_S[i - 1] if inside else label[i - 1] == IGNORE
    return given_S


def decoded(corpus: Corpus, batch: Batch, given_S: NDArray[np.bool_]) -> list[Image.Image]:
    """The images of a row, one for each copy; given images have a frame."""
    images = []
    for block in batch.image_I.unique().tolist():
        here = batch.image_I == block
        cell, x = batch.cell_I2[here].numpy(), batch.x_IP[here].numpy()
        grid = (int(cell[:, 0].max()) + 1, int(cell[:, 1].max()) + 1)
        raster = np.empty_like(x)
        raster[cell[:, 0] * grid[1] + cell[:, 1]] = x
        image = enlarged(corpus.patcher.decode(raster, grid))
        framed = given_S[int(batch.at_I[here][0])]
        images.append(ImageOps.expand(image.convert("RGB"), FRAME, GIVEN) if framed else image)
    return images


def enlarged(image: Image.Image) -> Image.Image:
    """A small image, enlarged to at least `SIDE` pixels, its pixels as squares."""
    factor = max(1, SIDE // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def in_words(batch: Batch, tokenizer: Tokenizer, given_S: NDArray[np.bool_]) -> str:
    """A row in words: text, names of special tokens, and numbers of patches; `given(...)` marks what is not learned."""
    names = dict.fromkeys(tokenizer.start, "BOS")
    names |= {tokenizer.eos: "EOS", tokenizer.boi: "BOI", tokenizer.eoi: "EOI"}
    names |= {token: f"{rows}x{columns}" for token, (rows, columns) in tokenizer.grid.items()}
    ids, block, document = (a[0].tolist() for a in (batch.ids_BS, batch.block_BS, batch.document_BS))

    def run_of(i: int) -> tuple[int, int, str, bool]:
        """A value that is equal for adjacent positions that are described together."""
        if document[i] < 0:
            return -1, -1, "empty", False
        special = f"{names[ids[i]]} {i}" if block[i] < 0 and ids[i] in names else ""
        return document[i], block[i], special, bool(given_S[i])

    parts = []
    for (_, image, special, is_given), run in groupby(range(len(ids)), run_of):
        positions = list(run)
        if special == "empty":
            part = f"[{len(positions)} empty]"
        elif special:
            part = names[ids[positions[0]]]
        elif image >= 0:
            part = f"[{len(positions)} patches]"
        else:
            part = repr(tokenizer.decode([ids[i] for i in positions]))
        parts.append(f"given({part})" if is_given and not special else part)
    return " ".join(parts).replace("EOS BOS", "EOS | BOS")


def picture(batch: Batch, images: Sequence[Image.Image], given_S: NDArray[np.bool_]) -> Image.Image:
    """The attention mask with the images on its right.

    A point is white if the query (its row) sees the key (its column), and orange if the query is also given.
    """
    seen = dense_visible(batch.sites)[0].numpy()
    colours = np.where(given_S[:, None, None], np.array(GIVEN), np.array([255, 255, 255]))
    mask = Image.fromarray((seen[..., None] * colours).astype(np.uint8))
    mask = mask.resize((mask.width * SCALE, mask.height * SCALE), Image.Resampling.NEAREST)
    width = max((image.width for image in images), default=0)
    height = max(mask.height, sum(image.height + 4 for image in images))
    sheet = Image.new("RGB", (mask.width + 8 + width, height), (90, 90, 90))
    sheet.paste(mask, (0, 0))
    top = 0
    for image in images:
        sheet.paste(image, (mask.width + 8, top))
        top += image.height + 4
    return sheet
