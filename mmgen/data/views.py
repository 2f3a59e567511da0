"""Documents as validation scores them: context as at inference, fixed noise, and each image at a fixed grid of times.

A view is one document in which a part is scored. The views of a sample are

* its text, with all images clean; a captioned image gives two of them, caption first and image first;
* each learned image at each of the times `GRID`, after the part of the document before it, whose images are clean.

Nothing of this depends on the seed, the context policy, the shares of forms or the batch size of a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmgen.config import Config, TimeConfig
from mmgen.data.documents import Decoded, DecodedImage, cut
from mmgen.data.loader import Corpus
from mmgen.data.order import keyed, pack
from mmgen.data.shards.samples import BadSample
from mmgen.image.latent import AutoencoderFacts
from mmgen.image.patch import Patcher
from mmgen.objective import ImageSite, build_layout
from mmgen.sequence.batch import RawBatch, RowFormat, collate
from mmgen.sequence.document import Block, Document, ImageSegment, Strip, TextSegment, Writer
from mmgen.sequence.tokenizer import Tokenizer

SEED = 0
"""Seed of validation, instead of `run.seed`."""
GRID = tuple((k + 0.5) / 8 for k in range(8))
"""Times at which each image is scored: the midpoints of eight equal ranges of t."""
BEFORE, AFTER, PLAIN, STRUCTURE = range(4)
TEXT = ("text_before_image", "text_after_image", "text_plain", "text_structure")
"""Kinds of text targets: text that no image precedes, though one follows; text after an image; text of a document
without images; BOI, size and EOS."""
KINDS = len(TEXT) + len(GRID)
"""Kinds of scored items: those of `TEXT`, then learned patches at each time of `GRID`."""


def validation_corpus(config: Config, tokenizer: Tokenizer, autoencoder: AutoencoderFacts | None = None) -> Corpus:
    """The documents of `data.val`, with the draws of seed `SEED` whatever `run.seed` is."""
    run = config.run.model_copy(update={"seed": SEED})
    return Corpus(config.data.val, tokenizer, config.model_copy(update={"run": run}), autoencoder)


@dataclass(frozen=True)
class View:
    """A written document, and what is scored in it."""

    sample: int
    """Number of its sample among those that are scored together."""
    strip: Strip
    kind_S: Sequence[int]
    """Kind of the token or patch at each position; `KINDS` where nothing is scored."""


@dataclass(frozen=True)
class ViewBatch:
    """Packed views, and the sample and kind of each of their positions."""

    raw: RawBatch
    cell_BS: Tensor
    """sample * KINDS + kind of the token or patch at each position; samples * KINDS where nothing is scored."""


class Views:
    """Makes the views of the samples of a corpus.

    The patcher encodes images on its device, each once for all its views.
    """

    def __init__(self, corpus: Corpus, patcher: Patcher) -> None:
        self.corpus, self.patcher = corpus, patcher
        # Draws of t, which the views replace, come before those of masks: with the default settings, masks do not
        # depend on how a run draws t.
        self.layout = build_layout(corpus.config.objective.model_copy(update={"time": TimeConfig()}))
        nothing = self.layout.context((0, 0))
        self.times = GRID if "t" in nothing.draws else GRID[:1]
        """Times at which images are scored; an objective without t scores each image once."""
        length, tokenizer = corpus.config.data.row_length, corpus.tokenizer
        self._framing = tokenizer.framing
        self.form = RowFormat(length, tokenizer, nothing, corpus.patcher.ready, self.layout.noise_draws)

    def batches(self, samples: range, rows: int) -> list[ViewBatch]:
        """The views of some samples, packed into batches of `rows` rows; samples that cannot be read are left out."""
        views = [view for number, index in enumerate(samples) for view in self.of_sample(number, index)]
        return self.packed(views, len(samples), rows)

    def packed(self, views: Sequence[View], samples: int, rows: int) -> list[ViewBatch]:
        """Views of `samples` numbered samples, packed into batches of `rows` rows."""
        packed = pack([len(view.strip) for view in views], self.form.row_length)
        packed = [[*row] for row in packed] + [[]] * (-len(packed) % rows)
        chosen = [[views[i] for i in row] for row in packed]
        return [self._batch(chosen[i : i + rows], samples) for i in range(0, len(chosen), rows)]

    def empty(self, rows: int) -> ViewBatch:
        """A batch without documents, for a rank that takes part in the forward passes of others."""
        return self._batch([[]] * rows, 0)

    def of_sample(self, number: int, index: int) -> Iterator[View]:
        """The views of sample `index` of the corpus; `number` is stored in them."""
        try:
            decoded = self.corpus.decoded(0, index)
        except BadSample:
            return
        paired = bool(self.corpus.dataset.gather(np.array([index])).paired[0])
        segments = [self._encoded(segment) for segment in decoded.segments]
        written = self._fitted(segments)
        yield self._text(number, written)
        if paired:
            yield self._text(number, self._fitted(segments[::-1]))
        images = [i for i, segment in enumerate(written) if isinstance(segment, DecodedImage)]
        for image, last in enumerate(images):
            if written[last].learn:
                yield from self._image(number, written[: last + 1], decoded, image)

    def text_view(self, number: int, segments: Sequence[TextSegment | DecodedImage]) -> View:
        """The view of a document of these segments in which its text is scored, given clean images."""
        return self._text(number, self._fitted([self._encoded(segment) for segment in segments]))

    def image_views(
        self, number: int, segments: Sequence[TextSegment | DecodedImage], decoded: Decoded, image: int
    ) -> Iterator[View]:
        """The views in which the last segment is scored at each time; noise and masks are those of `decoded`."""
        yield from self._image(number, self._fitted([self._encoded(s) for s in segments]), decoded, image)

    def _encoded(self, segment: TextSegment | DecodedImage) -> TextSegment | DecodedImage:
        if isinstance(segment, TextSegment) or not self.corpus.unencoded:
            return segment
        encoded_1NP = self.patcher.encode_pixels(torch.from_numpy(segment.x_NP)[None], segment.grid)
        return replace(segment, x_NP=encoded_1NP[0].cpu().numpy())

    def _fitted(self, segments: Sequence[TextSegment | DecodedImage]) -> list[TextSegment | DecodedImage]:
        """The segments, with text cut from the end if they are longer than a row with one copy of each image."""
        return cut(segments, self._framing + sum(map(_positions, segments)) - self.form.row_length)

    def _text(self, number: int, segments: Sequence[TextSegment | DecodedImage]) -> View:
        """The view in which text and structure tokens are scored, and all images are clean."""
        document: list[TextSegment | ImageSegment] = []
        kinds = [STRUCTURE] * (self._framing - 1)
        plain = all(isinstance(segment, TextSegment) for segment in segments)
        kind = PLAIN if plain else BEFORE
        for segment in segments:
            if isinstance(segment, TextSegment):
                document.append(segment)
                kinds += [kind] * len(segment.ids)
            else:
                document.append(self._clean(segment))
                kinds += [STRUCTURE] * _positions(segment)
                kind = AFTER
        return self._view(number, document, [*kinds, STRUCTURE])

    def _image(
        self, number: int, segments: Sequence[TextSegment | DecodedImage], decoded: Decoded, image: int
    ) -> Iterator[View]:
        """The views in which the last segment, image number `image` of its document, is scored at each time."""
        *before, last = segments
        assert isinstance(last, DecodedImage)
        context = [self._clean(segment) for segment in before]
        rng = keyed("validation", SEED, decoded.shard, decoded.key, image)
        text_before = any(isinstance(segment, TextSegment) for segment in before)
        site = ImageSite(last.grid, text_before, text_after=False, quantile=rng.random(), key=0)
        # One draw of masks and order for all times; the noise of each time is its own.
        block = self.layout.blocks(site, rng)[0]
        keys = rng.integers(-(2**63), 2**63, size=len(self.times))
        for k, (t, key) in enumerate(zip(self.times, keys.tolist(), strict=True)):
            segment = ImageSegment(last.x_NP, last.grid, [_at(block, t, key)], last.learn)
            kinds = [KINDS] * (self._framing - 1 + sum(map(_positions, before)) + 2)
            kinds += [len(TEXT) + k] * len(last.x_NP) + [KINDS] * 2
            yield self._view(number, [*context, segment], kinds)

    def _clean(self, segment: TextSegment | DecodedImage) -> TextSegment | ImageSegment:
        """A segment as context: an image as at inference, without a loss."""
        if isinstance(segment, TextSegment):
            return segment
        return ImageSegment(segment.x_NP, segment.grid, [self.layout.context(segment.grid)], segment.learn)

    def _view(self, number: int, document: Document, kinds: Sequence[int]) -> View:
        strip = Writer(self.corpus.tokenizer, self.corpus.config.model.chosen_positions).document(document)
        assert len(strip) == len(kinds), (len(strip), len(kinds))
        return View(number, strip, kinds)

    def _batch(self, rows: Sequence[Sequence[View]], samples: int) -> ViewBatch:
        cells = np.full((len(rows), self.form.row_length), samples * KINDS, dtype=np.int64)
        for b, row in enumerate(rows):
            at = 0
            for view in row:
                kind_S: NDArray[Any] = np.array(view.kind_S)
                cells[b, at : at + len(kind_S)] = np.where(
                    kind_S == KINDS, samples * KINDS, view.sample * KINDS + kind_S
                )
                at += len(kind_S)
        return ViewBatch(collate([[view.strip for view in row] for row in rows], self.form), torch.from_numpy(cells))


def _positions(segment: TextSegment | DecodedImage) -> int:
    """Number of positions of a segment with one copy of each image."""
    return len(segment.ids) if isinstance(segment, TextSegment) else 3 + len(segment.x_NP)


def _at(block: Block, t: float, key: int) -> Block:
    """A learned block with all its draws of t at one time, and its own noise."""
    draws = {name: np.full_like(drawn, t) if name == "t" else drawn for name, drawn in block.draws.items()}
    return replace(block, draws=draws, key=key)
