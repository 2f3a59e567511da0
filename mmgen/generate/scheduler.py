"""Many decoder rows over one backbone: one call per tick, whatever mode or solver step each row is in.

A row is a coroutine that yields `Feed` or `Draw` and is sent the answer. All rows share a cache with one length
per lane. A row has one lane, and a second one for the unconditional branch of classifier-free guidance.

Suffixes: R rows, L lanes, W positions fed to a lane in one tick, N patches of one image, G guidance lanes,
P patch length, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from mmgen.backbone import RowCache, additive
from mmgen.config import SampleConfig
from mmgen.image.patch import Floats, Grid, Patcher
from mmgen.model import MMGenModel
from mmgen.objective import BackboneCall, Drawing, Given, ImageSpec
from mmgen.sequence.attention import Sites, dense_visible
from mmgen.sequence.batch import RowFormat, collate, prepare
from mmgen.sequence.document import Strip, Writer
from mmgen.sequence.tokenizer import Tokenizer

# Block number of an image that is being drawn; finished images are numbered from 0 by the writer.
DRAWN = 1 << 30


@dataclass(frozen=True)
class Feed:
    """Put these positions into the cache; answer with the best allowed next token and the last hidden state."""

    strip: Strip
    allowed_V: NDArray[np.bool_]
    gumbel_V: NDArray[np.float64] | None = None
    """Makes the best token a sample; absent: greedy."""


@dataclass(frozen=True)
class Draw:
    """Draw an image at `position`; answer with it and its patch rows."""

    grid: Grid
    order_N: NDArray[np.int64]
    first: tuple[int, int]
    """Place of the patch that comes first in that order."""
    rng: np.random.Generator
    """The row's own randomness."""
    position: int
    opening_D: Tensor
    given: tuple[Floats, NDArray[np.bool_]] | None = None
    """Known patch rows [N, P], and which of them are known [N]."""

    @property
    def kind(self) -> tuple[Grid, int]:
        """Draws of one kind may share a canvas."""
        return self.grid, 0 if self.given is None else int(self.given[1].sum())


class Drawn(NamedTuple):
    """An image that a row asked for."""

    x_NP: Floats
    image: Image.Image


Answer = tuple[int, Tensor] | Drawn
Row = Generator[Feed | Draw, Any, Any]
"""Is sent the `Answer` to what it yields: (token, hidden state) to a `Feed`, `Drawn` to a `Draw`."""


@dataclass
class Canvas:
    """Images of one grid that are drawn together, and the call that they wait for."""

    grid: Grid
    lanes: list[list[int]]
    """[G][R] lanes."""
    positions: list[list[int]]
    """[G][R] position of the image in each lane."""
    start: Tensor
    """Committed length of each lane, [G * R], when drawing began."""
    drawing: Drawing
    call: BackboneCall


class Schedule:
    """Rows being served: the lanes, what each row waits for, and the tick that serves them all.

    `tokens` and `images` are the largest budgets among the rows; they bound the cache.
    """

    def __init__(
        self,
        model: MMGenModel,
        tokenizer: Tokenizer,
        patcher: Patcher,
        sample: SampleConfig,
        rows: Sequence[Row],
        guided: bool,
        tokens: int,
        images: int,
        previews: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.sample, self.guided = model, tokenizer, sample, guided
        self.patcher = patcher
        weight = model.get_input_embeddings().weight
        self.device, self.dtype = weight.device, weight.dtype
        self.warpers = _warpers(sample)
        self.feeds: dict[int, Feed] = {}
        self.draws: dict[int, Draw] = {}
        self.canvases: list[Canvas] = []
        self.wants_previews = previews
        self.rows = rows
        for r, row in enumerate(rows):
            self._wish(r, next(row))
        image = max(grid[0] * grid[1] for grid in tokenizer.size) + 3
        prefix = max((len(feed.strip) for feed in self.feeds.values()), default=0)
        # One image more than the budget: the widest feed is padding on the lanes that wait for less.
        capacity = 2 * prefix + tokens + (2 + images) * image
        lanes = len(rows) * (2 if guided else 1)
        self.cache = RowCache(model.backbone.config.num_hidden_layers, lanes, capacity, self.device)
        blank = torch.zeros(lanes, capacity, dtype=torch.long, device=self.device)
        slot = torch.arange(capacity, device=self.device).expand(lanes, -1)
        self.sites = Sites(slot, blank - 1, blank - 1, blank > 0, blank > 0)

    @property
    def busy(self) -> bool:
        """Some row still waits for an answer."""
        return bool(self.feeds or self.canvases)

    def previews(self) -> Iterator[tuple[int, Image.Image]]:
        """(row, clean estimate) of each image being drawn, where previews were asked for."""
        for canvas in self.canvases:
            if canvas.call.preview_RNP is not None:
                x_RNP = canvas.call.preview_RNP.float().cpu().numpy()
                yield from zip(canvas.lanes[0], self.patcher.pictures(x_RNP, canvas.grid), strict=True)

    def _wish(self, r: int, wish: Feed | Draw) -> None:
        if isinstance(wish, Feed):
            self.feeds[r] = wish
        else:
            self.draws[r] = wish

    def _answer(self, r: int, answer: Answer) -> None:
        try:
            self._wish(r, self.rows[r].send(answer))
        except StopIteration:
            return

    def tick(self) -> None:
        """One backbone call that serves everything pending, and the start of images that rows now wish for."""
        feeds, self.feeds = self.feeds, {}
        canvases, self.canvases = self.canvases, []
        hidden = self._forward({r: feed.strip for r, feed in feeds.items()}, canvases)
        for canvas in canvases:
            self._advance(canvas, hidden)
        if feeds:
            last_RD = torch.stack([hidden[r][len(feed.strip) - 1] for r, feed in feeds.items()])
            tokens = self._choose(last_RD, list(feeds.values()))
            for r, token, state_D in zip(feeds, tokens, last_RD, strict=True):
                self._answer(r, (token, state_D))
        draws, self.draws = self.draws, {}
        for kind in dict.fromkeys(draw.kind for draw in draws.values()):
            self._open(kind[0], {r: draw for r, draw in draws.items() if draw.kind == kind})

    def _lanes(self, rows: Sequence[int]) -> list[list[int]]:
        """The lanes of these rows: conditional ones, then unconditional ones where guidance asks for them."""
        return [list(rows), [len(self.rows) + r for r in rows]] if self.guided else [list(rows)]

    def _open(self, grid: Grid, draws: dict[int, Draw]) -> None:
        """Start drawing images of one grid together; the unconditional prefix is BOS BOI size."""
        lanes = self._lanes(list(draws))
        openings = [torch.stack([draw.opening_D for draw in draws.values()])]
        positions = [[draw.position for draw in draws.values()]]
        for shadows in lanes[1:]:
            self.cache.length[shadows] = 0
            prefixes = [self._unconditional(draw) for draw in draws.values()]
            hidden = self._forward(dict(zip(shadows, (writer.take() for writer in prefixes), strict=True)), [])
            openings.append(torch.stack([hidden[lane][-1] for lane in shadows]))
            positions.append([writer.position for writer in prefixes])
        sources = [draw.rng for draw in draws.values()]

        def noise(like: Tensor) -> Tensor:
            drawn = np.stack([rng.standard_normal(like.shape[1:], dtype=np.float32) for rng in sources])
            return self._upload(drawn).to(self.dtype)

        shape = (len(draws), grid[0] * grid[1], self.model.patcher.patch_length)
        given = [draw.given for draw in draws.values() if draw.given is not None]
        spec = ImageSpec(
            grid,
            noise(torch.empty(shape, device="meta")),
            self.sample,
            torch.stack(openings),
            self._upload(np.stack([draw.order_N for draw in draws.values()])),
            noise,
            Given(
                self._upload(np.stack([known for _, known in given])),
                self._upload(np.stack([x_NP for x_NP, _ in given])).to(self.dtype),
            )
            if given
            else None,
            self.wants_previews,
        )
        drawing = self.model.objective.generate(spec)
        start = self.cache.length[[*chain(*lanes)]].clone()
        self.canvases.append(Canvas(grid, lanes, positions, start, drawing, next(drawing)))

    def _unconditional(self, draw: Draw) -> Writer:
        """A document that opens the image without a prompt."""
        prefix = Writer(self.tokenizer)
        prefix.tokens([self.tokenizer.bos])
        prefix.open_image(draw.grid, draw.first)
        return prefix

    def _upload(self, values: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(values)
        tensor = tensor.pin_memory() if self.device.type == "cuda" else tensor
        return tensor.to(self.device, non_blocking=True)

    def _advance(self, canvas: Canvas, hidden: dict[int, Tensor]) -> None:
        """Hand a canvas what it asked for; a finished image goes back to its row."""
        n = canvas.call.inputs_RND.shape[1]
        states_GRND = torch.stack([torch.stack([hidden[lane][:n] for lane in lanes]) for lanes in canvas.lanes])
        try:
            canvas.call = canvas.drawing.send(states_GRND)
            self.canvases.append(canvas)
        except StopIteration as stop:
            # Later positions see the finished image as `context` writes it, so whatever was kept goes.
            self.cache.length[[*chain(*canvas.lanes)]] = canvas.start
            x_RNP = _numbers(stop.value)
            images = self.patcher.pictures(x_RNP, canvas.grid)
            for r, x_NP, image in zip(canvas.lanes[0], x_RNP, images, strict=True):
                self._answer(r, Drawn(x_NP, image))

    def _choose(self, last_RD: Tensor, feeds: list[Feed]) -> list[int]:
        """The best allowed token of each row; Gumbel noise turns the best into a sample."""
        scores_RV = self.model.logits(last_RD).cpu().double()  # one copy a tick; some devices have no float64
        allowed_RV = torch.from_numpy(np.stack([feed.allowed_V for feed in feeds]))
        scores_RV = scores_RV.masked_fill(~allowed_RV, -torch.inf)
        gumbel = [feed.gumbel_V for feed in feeds if feed.gumbel_V is not None]
        if gumbel:
            warped: Tensor = self.warpers(None, scores_RV / self.sample.temperature)  # type: ignore[arg-type]
            scores_RV = warped + torch.from_numpy(np.stack(gumbel))
        chosen: list[int] = scores_RV.argmax(-1).tolist()
        return chosen

    def _forward(self, strips: dict[int, Strip], canvases: list[Canvas]) -> dict[int, Tensor]:
        """Run the backbone on strips and canvas calls, one lane each; returns hidden states [W, D] by lane."""
        drawn = {lane: canvas for canvas in canvases for lanes in canvas.lanes for lane in lanes}
        order = sorted([*strips, *drawn])
        row_of = {lane: row for row, lane in enumerate(order)}
        width = max([len(strip) for strip in strips.values()] + [c.call.inputs_RND.shape[1] for c in canvases])
        shape = (len(order), width)
        position = torch.zeros(shape, dtype=torch.long, device=self.device)
        sites = [position - 1, position - 1, position > 0, position > 0]  # document, block, bidirectional, noised
        if strips:
            rows = [[strips[lane]] if lane in strips else [] for lane in order]
            nothing = self.model.objective.layout.context((0, 0))
            raw = collate(rows, RowFormat(width, self.tokenizer, nothing, self.patcher.ready))
            batch = prepare(raw, self.patcher, self.device, self.dtype)
            inputs_LWD, _ = self.model.embed(batch)
            position, sites = batch.position_BS, list(batch.sites[1:])
        else:  # most calls of a long drawing
            inputs_LWD = canvases[0].call.inputs_RND.new_zeros(*shape, canvases[0].call.inputs_RND.shape[-1])
        document, block, bidirectional, _ = sites
        counts = torch.tensor([len(strips[lane]) if lane in strips else 0 for lane in order], device=self.device)
        for canvas in canvases:
            n = canvas.call.inputs_RND.shape[1]
            for lanes, positions in zip(canvas.lanes, canvas.positions, strict=True):
                at = torch.tensor([row_of[lane] for lane in lanes], device=self.device)
                inputs_LWD[at, :n] = canvas.call.inputs_RND
                position[at, :n] = torch.tensor(positions, device=self.device).unsqueeze(1)
                document[at, :n] = 0
                block[at, :n] = DRAWN
                bidirectional[at, :n] = canvas.call.bidirectional
                counts[at] = n if canvas.call.keep else 0

        lanes_L = torch.tensor(order, device=self.device)
        slots_LW = self.cache.begin(lanes_L, width)
        here = (lanes_L.unsqueeze(1), slots_LW)
        query = Sites(slots_LW, *sites)
        for stored, new in zip(self.sites[1:], query[1:], strict=True):
            stored[here] = new
        keys = Sites(*(stored[lanes_L, : self.cache.reach] for stored in self.sites))
        hidden_LWD = self._run(here, inputs_LWD, position, query, keys)
        self.cache.commit(counts)
        forgotten = torch.arange(width, device=self.device) >= counts.unsqueeze(1)
        self.sites.document[here] = torch.where(forgotten, -1, document)
        return dict(zip(order, hidden_LWD, strict=True))

    def _run(
        self, here: tuple[Tensor, Tensor], inputs_LWD: Tensor, position_LW: Tensor, query: Sites, keys: Sites
    ) -> Tensor:
        """Hidden states of new positions, whose lanes [L, 1] and slots [L, W] are `here`, over the cache."""
        mask = additive(dense_visible(query, keys))
        return self.model.hidden(inputs_LWD, position_LW, mask, (query.block >= 0).long(), self.cache)


def _numbers(x_RNP: Tensor) -> NDArray[Any]:
    """Patches on the host: float32, or integers where they are codes."""
    numbers: NDArray[Any] = (x_RNP.float() if x_RNP.is_floating_point() else x_RNP).cpu().numpy()
    return numbers


def _warpers(sample: SampleConfig) -> LogitsProcessorList:
    """What narrows the choice of a sampled token; the warpers look at scores alone."""
    warpers = LogitsProcessorList()
    if sample.top_k:
        warpers.append(TopKLogitsWarper(sample.top_k))
    if sample.top_p < 1:
        warpers.append(TopPLogitsWarper(sample.top_p))
    if sample.min_p > 0:
        warpers.append(MinPLogitsWarper(sample.min_p))
    return warpers
