"""The decoder: a state machine per prompt (text -> BOI -> image -> EOI -> text) over one batched backbone.

Each prompt is a coroutine that asks for what it needs next: positions to be fed, or an image to be drawn.
The scheduler answers all of them with one backbone call per tick, whatever mode or solver step each is in,
over a cache with one length per lane. A prompt has one lane, and a second one for the unconditional branch
of classifier-free guidance.

Suffixes: R prompts, L lanes, W positions fed to a lane in one tick, N patches of one image, G guidance lanes,
P patch length, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mmgen.backbone import RowCache, additive
from mmgen.config import SampleConfig
from mmgen.model import MMGenModel
from mmgen.objective import BackboneCall, Drawing, ImageSpec
from mmgen.patch import Floats, Grid, PixelPatcher
from mmgen.sequence import ImageSegment, Sites, Strip, TextSegment, Writer, collate, dense_visible
from mmgen.tokenizer import Tokenizer

Mode = Literal["image", "text", "auto"]
Prompt = Sequence[str | Image.Image]
# Block number of an image that is being drawn; finished images are numbered from 0 by the writer.
DRAWN = 1 << 30


@dataclass(frozen=True)
class Request:
    """One prompt and what to make of it."""

    prompt: Prompt
    """Text and images in order; may be empty only for an unconditional image."""
    mode: Mode = "auto"
    """`image`: draw one image now and stop; `text`: words only; `auto`: the model chooses until it ends."""
    seed: int = 0
    """Everything random in this row comes from it, whatever the other rows are."""
    grid: Grid | None = None
    """Patch grid of a forced image; absent: the first declared one."""


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
class _Feed:
    """Put these positions into the cache; answer with the best allowed next token and the last hidden state."""

    strip: Strip
    allowed_V: NDArray[np.bool_]
    gumbel_V: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class _Draw:
    """Draw an image at `position`; answer with its patch rows."""

    grid: Grid
    rng: np.random.Generator
    """The row's own randomness."""
    position: int
    opening_D: Tensor


_Row = Generator[_Feed | _Draw, "tuple[int, Tensor] | Floats", Result]


@dataclass
class _Canvas:
    """Images of one grid that are drawn together, and the call that they wait for."""

    lanes: list[list[int]]
    """[G][R] lanes."""
    positions: list[list[int]]
    """[G][R] position of the image in each lane."""
    start: Tensor
    """Committed length of each lane, [G * R], when drawing began."""
    drawing: Drawing
    call: BackboneCall


class Decoder:
    """Generates text and images from prompts."""

    def __init__(self, model: MMGenModel, tokenizer: Tokenizer, sample: SampleConfig) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.sample = sample
        self.patcher = PixelPatcher(model.patcher)
        self.objective = model.objective
        size = int(model.get_input_embeddings().weight.shape[0])
        ids = np.arange(size)
        words = (ids < len(tokenizer)) & ~np.isin(ids, list(tokenizer.special))
        self._words = words
        self._text = words | (ids == tokenizer.eos)
        self._free = self._text | (ids == tokenizer.boi)
        self._sizes = np.isin(ids, list(tokenizer.grid))

    def check(self, request: Request) -> None:
        """Raise ValueError for a prompt that cannot be served."""
        given = [piece for piece in request.prompt if not isinstance(piece, str) or piece.strip()]
        if request.mode != "image" and not given:
            raise ValueError("the prompt is empty: give text or an image (an unconditional image needs mode 'image')")
        if request.mode == "image" and self.sample.max_images < 1:
            raise ValueError("mode 'image' needs sample.max_images of at least 1")
        if request.grid is not None and request.grid not in self.tokenizer.size:
            raise ValueError(f"grid {request.grid} was never declared (declared: {sorted(self.tokenizer.size)})")

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request]) -> list[Result]:
        """Serve all requests in one batch; results keep their order and depend on their own request alone.

        Raises:
            ValueError: a request is empty or asks for an undeclared size.
        """
        for request in requests:
            self.check(request)
        training = self.model.training
        self.model.eval()
        try:
            return _Schedule(self, requests).run()
        finally:
            self.model.train(training)

    def row(self, request: Request) -> _Row:
        """The state machine of one prompt."""
        tok, sample, result = self.tokenizer, self.sample, Result()
        rng = np.random.Generator(np.random.Philox(key=request.seed))
        writer, words, budget, images = Writer(tok), list[int](), sample.max_new_tokens, 0
        writer.tokens([tok.bos])
        for piece in request.prompt:
            writer.segment(self.segment(piece))

        def say() -> None:
            if words:
                result.segments.append(tok.decode(words))
                words.clear()

        grid: Grid | None = None
        if request.mode == "image":
            grid = request.grid or next(iter(tok.size))
            writer.open_image(grid)
        while True:
            if grid is not None:
                say()
                _, opening = yield self._feed(writer, self._text, rng)
                x_NP = yield _Draw(grid, rng, writer.position, opening)
                assert isinstance(x_NP, np.ndarray)
                result.segments.append(self.patcher.decode(x_NP, grid))
                images += 1
                if request.mode == "image":
                    result.finished = True
                    return result
                context = self.objective.context(self.objective.settings, grid, x_NP.shape[1])
                writer.patches(x_NP, grid, [context])
                writer.close_image()
                grid = None
            more_images = request.mode == "auto" and images < sample.max_images
            # Documents whose caption was dropped end right after the image; asked for text, the model gives some.
            legal = self._words if request.mode == "text" and not words else self._text
            token, _ = yield self._feed(writer, self._free if more_images else legal, rng)
            if token == tok.boi:
                writer.tokens([token])
                if len(tok.size) > 1:
                    token, _ = yield self._feed(writer, self._sizes, rng)
                    grid = tok.grid[token]
                else:
                    grid = next(iter(tok.size))
                writer.size(grid)
            elif token == tok.eos or budget == 0:
                say()
                result.finished = token == tok.eos
                return result
            else:
                budget -= 1
                words.append(token)
                writer.tokens([token])

    def segment(self, piece: str | Image.Image) -> TextSegment | ImageSegment:
        """A prompt's piece as a document segment; images stand as finished ones."""
        if isinstance(piece, str):
            return TextSegment(self.tokenizer.encode(piece))
        x_NP, grid = self.patcher.encode(piece)
        context = self.objective.context(self.objective.settings, grid, x_NP.shape[1])
        return ImageSegment(x_NP, grid, [context])

    def _feed(self, writer: Writer, allowed_V: NDArray[np.bool_], rng: np.random.Generator) -> _Feed:
        warm = self.sample.temperature > 0
        gumbel = self.sample.temperature * rng.gumbel(size=len(allowed_V)) if warm else None
        return _Feed(writer.take(), allowed_V, gumbel)


class _Schedule:
    """One call of `Decoder.generate`: the lanes, what each waits for, and the loop that serves them."""

    def __init__(self, decoder: Decoder, requests: Sequence[Request]) -> None:
        self.decoder, self.model, self.tokenizer = decoder, decoder.model, decoder.tokenizer
        weight = self.model.get_input_embeddings().weight
        self.device, self.dtype = weight.device, weight.dtype
        self.results: dict[int, Result] = {}
        self.feeds: dict[int, _Feed] = {}
        self.draws: dict[int, _Draw] = {}
        self.canvases: list[_Canvas] = []
        self.rows = [decoder.row(request) for request in requests]
        for r, row in enumerate(self.rows):
            self._wish(r, next(row))
        sample = decoder.sample
        self.guided = sample.guidance_scale != 1.0 and any(request.mode != "text" for request in requests)
        image = max(grid[0] * grid[1] for grid in self.tokenizer.size) + 3
        prefix = max((len(feed.strip) for feed in self.feeds.values()), default=0)
        # One image more than the budget: the widest feed is padding on the lanes that wait for less.
        capacity = 2 * prefix + sample.max_new_tokens + (2 + sample.max_images) * image
        lanes = len(self.rows) * (2 if self.guided else 1)
        self.cache = RowCache(self.model.backbone.config.num_hidden_layers, lanes, capacity, self.device)
        blank = torch.zeros(lanes, capacity, dtype=torch.long, device=self.device)
        slot = torch.arange(capacity, device=self.device).expand(lanes, -1)
        self.sites = Sites(slot, blank - 1, blank - 1, blank > 0, blank > 0)

    def run(self) -> list[Result]:
        while self.feeds or self.canvases:
            self._tick()
        return [self.results[r] for r in range(len(self.rows))]

    def _wish(self, r: int, wish: _Feed | _Draw) -> None:
        if isinstance(wish, _Feed):
            self.feeds[r] = wish
        else:
            self.draws[r] = wish

    def _answer(self, r: int, answer: tuple[int, Tensor] | Floats) -> None:
        try:
            self._wish(r, self.rows[r].send(answer))
        except StopIteration as stop:
            self.results[r] = stop.value

    def _tick(self) -> None:
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
        for grid in dict.fromkeys(draw.grid for draw in draws.values()):
            self._open(grid, {r: draw for r, draw in draws.items() if draw.grid == grid})

    def _lanes(self, rows: Sequence[int]) -> list[list[int]]:
        """The lanes of these rows: conditional ones, then unconditional ones where guidance asks for them."""
        return [list(rows), [len(self.rows) + r for r in rows]] if self.guided else [list(rows)]

    def _open(self, grid: Grid, draws: dict[int, _Draw]) -> None:
        """Start drawing images of one grid together; the unconditional prefix is BOS BOI size."""
        lanes = self._lanes(list(draws))
        openings = [torch.stack([draw.opening_D for draw in draws.values()])]
        positions = [[draw.position for draw in draws.values()]]
        for shadows in lanes[1:]:
            self.cache.length[shadows] = 0
            prefix = Writer(self.tokenizer)
            prefix.tokens([self.tokenizer.bos])
            prefix.open_image(grid)
            strip = prefix.take()
            hidden = self._forward(dict.fromkeys(shadows, strip), [])
            openings.append(torch.stack([hidden[lane][len(strip) - 1] for lane in shadows]))
            positions.append([prefix.position] * len(shadows))
        shape = (grid[0] * grid[1], self.model.patcher.patch_length)
        sources = [draw.rng for draw in draws.values()]

        def noise(like: Tensor | None = None) -> Tensor:
            drawn = np.stack([rng.standard_normal(shape, dtype=np.float32) for rng in sources])
            fresh = torch.from_numpy(drawn)
            fresh = fresh.pin_memory() if self.device.type == "cuda" else fresh
            return fresh.to(self.device, self.dtype, non_blocking=True)

        spec = ImageSpec(grid, noise(), self.decoder.sample, torch.stack(openings), noise)
        drawing = self.decoder.objective.generate(spec)
        start = self.cache.length[[*chain(*lanes)]].clone()
        self.canvases.append(_Canvas(lanes, positions, start, drawing, next(drawing)))

    def _advance(self, canvas: _Canvas, hidden: dict[int, Tensor]) -> None:
        """Hand a canvas what it asked for; a finished image goes back to its row."""
        n = canvas.call.inputs_RND.shape[1]
        states_GRND = torch.stack([torch.stack([hidden[lane][:n] for lane in lanes]) for lanes in canvas.lanes])
        try:
            canvas.call = canvas.drawing.send(states_GRND)
            self.canvases.append(canvas)
        except StopIteration as stop:
            # Later positions see the finished image as `context` writes it, so whatever was kept goes.
            self.cache.length[[*chain(*canvas.lanes)]] = canvas.start
            for r, x_NP in zip(canvas.lanes[0], stop.value.float().cpu().numpy(), strict=True):
                self._answer(r, x_NP)

    def _choose(self, last_RD: Tensor, feeds: list[_Feed]) -> list[int]:
        """The best allowed token of each row; Gumbel noise turns the best into a sample."""
        scores_RV = self.model.logits(last_RD).cpu().double()  # one copy a tick; some devices have no float64
        allowed_RV = torch.from_numpy(np.stack([feed.allowed_V for feed in feeds]))
        for scores_V, feed in zip(scores_RV, feeds, strict=True):
            if feed.gumbel_V is not None:
                scores_V += torch.from_numpy(feed.gumbel_V)
        chosen: list[int] = scores_RV.masked_fill(~allowed_RV, -torch.inf).argmax(-1).tolist()
        return chosen

    def _forward(self, strips: dict[int, Strip], canvases: list[_Canvas]) -> dict[int, Tensor]:
        """Run the backbone on strips and canvas calls, one lane each; returns hidden states [W, D] by lane."""
        drawn = {lane: canvas for canvas in canvases for lanes in canvas.lanes for lane in lanes}
        order = sorted([*strips, *drawn])
        row_of = {lane: row for row, lane in enumerate(order)}
        width = max([len(strip) for strip in strips.values()] + [c.call.inputs_RND.shape[1] for c in canvases])
        length = self.model.patcher.patch_length
        nothing = self.decoder.objective.context(self.decoder.objective.settings, (0, 0), length)
        rows = [[strips[lane]] if lane in strips else [] for lane in order]
        batch = collate(rows, width, self.tokenizer, nothing, length).to(self.device, self.dtype)
        inputs_LWD, _ = self.model.embed(batch)
        counts = torch.tensor([len(strips[lane]) if lane in strips else 0 for lane in order], device=self.device)
        for canvas in canvases:
            n = canvas.call.inputs_RND.shape[1]
            for lanes, positions in zip(canvas.lanes, canvas.positions, strict=True):
                at = torch.tensor([row_of[lane] for lane in lanes], device=self.device)
                inputs_LWD[at, :n] = canvas.call.inputs_RND
                batch.position_BS[at, :n] = torch.tensor(positions, device=self.device).unsqueeze(1)
                batch.document_BS[at, :n] = 0
                batch.block_BS[at, :n] = DRAWN
                batch.bidirectional_BS[at, :n] = canvas.call.bidirectional
                counts[at] = n if canvas.call.keep else 0

        lanes_L = torch.tensor(order, device=self.device)
        slots_LW = self.cache.begin(lanes_L, width)
        here = (lanes_L.unsqueeze(1), slots_LW)
        query = Sites(slots_LW, *batch.sites[1:])
        for stored, new in zip(self.sites[1:], query[1:], strict=True):
            stored[here] = new
        keys = Sites(*(stored[lanes_L, : self.cache.reach] for stored in self.sites))
        mask = additive(dense_visible(query, keys))
        hidden_LWD = self.model.hidden(inputs_LWD, batch.position_BS, mask, self.cache)
        self.cache.commit(counts)
        forgotten = torch.arange(width, device=self.device) >= counts.unsqueeze(1)
        self.sites.document[here] = torch.where(forgotten, -1, batch.document_BS)
        return dict(zip(order, hidden_LWD, strict=True))
