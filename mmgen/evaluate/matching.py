"""Which of K captions fits a picture, by the model's own likelihoods: of the text, and of the picture.

Both need no labels. The likelihood of the text given the picture tests captioning. The image loss given the text, with
equal noise for all captions, tests drawing (a diffusion classifier: Li et al. 2023, arXiv:2303.16203).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmgen.data.documents import Decoded, DecodedImage
from mmgen.data.loader import Corpus
from mmgen.data.order import keyed
from mmgen.data.progress import Progress
from mmgen.data.shards.samples import BadSample
from mmgen.data.views import AFTER, KINDS, SEED, TEXT, View, Views
from mmgen.evaluate.words import share
from mmgen.image.patch import Grid
from mmgen.model import MMGenModel
from mmgen.sequence.document import TextSegment
from mmgen.train.estimate import Estimate
from mmgen.train.validate import add_losses

TOGETHER = 16
"""Pictures whose captions are scored together."""


@dataclass(frozen=True)
class Matches:
    """Whether each picture's own caption was chosen among `choices`."""

    n: int
    """Number of pictures."""
    choices: int
    by_text: Estimate
    """By the likelihood of the caption given the picture."""
    by_image: Estimate | None = None
    """By the image loss of the picture given the caption."""

    def flat(self, prefix: str) -> dict[str, float]:
        """The values under `PREFIX_by_text` and `PREFIX_by_image`, with intervals and chance."""
        flat = {f"{prefix}_n": self.n, f"{prefix}_choices": self.choices, f"{prefix}_chance": 1 / self.choices}
        flat |= self.by_text.flat(f"{prefix}_by_text")
        return flat | (self.by_image.flat(f"{prefix}_by_image") if self.by_image else {})


@dataclass(frozen=True)
class Pair:
    """A picture, its caption's ids and those of other captions."""

    decoded: Decoded
    picture: DecodedImage
    captions: list[TextSegment]
    """Its own first."""


def pairs(corpus: Corpus, count: int, choices: int, grid: Grid) -> list[Pair]:
    """Up to `count` captioned pictures of one patch grid, each with `choices` captions that differ from each other.

    The pictures are the same random ones in every call. The other captions are drawn from the corpus by the key of the
    picture. Fewer are used if the corpus has fewer different captions; without a second caption the list is empty.
    """
    found: list[tuple[Decoded, DecodedImage, TextSegment]] = []
    for index in np.random.default_rng(SEED).permutation(len(corpus.samples)).tolist():
        if len(found) == count:
            break
        try:
            decoded = corpus.decoded(0, index)
        except BadSample:
            continue
        texts = [segment for segment in decoded.segments if isinstance(segment, TextSegment)]
        pictures = [segment for segment in decoded.segments if isinstance(segment, DecodedImage)]
        if len(texts) == len(pictures) == 1 and pictures[0].grid == grid:
            found.append((decoded, pictures[0], texts[0]))
    different = {tuple(text.ids): text for _, _, text in found}
    choices = min(choices, len(different))
    if choices < 2:
        return []
    listed = []
    for decoded, picture, own in found:
        others = [text for ids, text in different.items() if ids != tuple(own.ids)]
        rng = keyed("matching", SEED, decoded.shard, decoded.key)
        chosen = [others[i] for i in rng.choice(len(others), choices - 1, replace=False)]
        listed.append(Pair(decoded, picture, [own, *chosen]))
    return listed


def with_pictures(asked: Sequence[Pair], images: Sequence[Image.Image], corpus: Corpus) -> list[Pair]:
    """The same captions with other pictures, such as those that a model drew for the first caption of each."""
    patches = corpus.patcher.pixels if corpus.unencoded else corpus.patcher.encode
    cut = [patches(image) for image in images]
    return [replace(pair, picture=DecodedImage(x_NP, grid)) for pair, (x_NP, grid) in zip(asked, cut, strict=True)]


@torch.no_grad()
def match(
    model: MMGenModel,
    corpus: Corpus,
    asked: Sequence[Pair],
    by_image: bool,
    report: Callable[[str], None] = lambda line: None,
) -> Matches:
    """Let the model choose the caption of each picture.

    Raises:
        ValueError: `asked` is empty.
    """
    model.eval()
    views = Views(corpus, model.build_patcher())
    choices = len(asked[0].captions)
    right_text, right_image = list[bool](), list[bool]()
    parts = range(0, len(asked), TOGETHER)
    for start in Progress("matching captions", f"batches of {TOGETHER} pictures", len(parts), report).over(parts):
        part = asked[start : start + TOGETHER]
        scored = [view for number, pair in enumerate(part) for view in _views(views, pair, number * choices, by_image)]
        sums, counts = torch.zeros(2, len(part) * choices, KINDS, dtype=torch.float64)
        for batch in views.packed(scored, len(part) * choices, corpus.config.train.batch_rows):
            add_losses(model, views.patcher, batch, sums, counts)
        right_text += _lowest(sums[:, AFTER], choices)
        if by_image:
            right_image += _lowest(sums[:, len(TEXT) :].sum(1), choices)
    return Matches(len(asked), choices, share(right_text), share(right_image) if by_image else None)


def _views(views: Views, pair: Pair, first: int, by_image: bool) -> Iterator[View]:
    for number, caption in enumerate(pair.captions, first):
        yield views.text_view(number, [pair.picture, caption])
        if by_image:
            yield from views.image_views(number, [caption, pair.picture], pair.decoded, 0)


def _lowest(losses: Tensor, choices: int) -> list[bool]:
    """Whether the first of each `choices` losses is the smallest."""
    table = losses.view(-1, choices).numpy()
    return [bool(row.argmin() == 0) for row in np.asarray(table)]
