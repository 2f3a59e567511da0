"""The decoder: a state machine per prompt (text -> BOI -> image -> EOI -> text) over one batched backbone.

Each prompt is a coroutine that asks for what it needs next: positions to be fed, or an image to be drawn;
`mmgen.batching` answers all of them together.

Suffixes: N patches of one image, P patch length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mmgen.config import SampleConfig
from mmgen.generate.scheduler import Draw, Drawn, Feed, Row, Schedule
from mmgen.image.patch import Floats, Grid, raster
from mmgen.model import MMGenModel
from mmgen.sequence.document import ImageSegment, TextSegment, Writer
from mmgen.sequence.tokenizer import Tokenizer

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
    """Everything random in this row comes from it, whatever the other rows are."""
    grid: Grid | None = None
    """Patch grid of a forced image; absent: the first declared one."""
    inpaint: Inpaint | None = None
    """Known patches of a forced image."""
    max_new_tokens: int | None = None
    """Text tokens; absent: `sample.max_new_tokens`."""
    max_images: int | None = None
    """Images; absent: `sample.max_images`."""
    stop: Sequence[str] = ()
    """Text that ends the row; it is left out of the result."""


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
    """Something that happened to one row while requests are served."""

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
    """`end`: everything the row gave."""


Emit = Callable[[Event], None]


class Decoder:
    """Generates text and images from prompts."""

    def __init__(self, model: MMGenModel, tokenizer: Tokenizer, sample: SampleConfig) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.sample = sample
        self.patcher = model.build_patcher()
        self.layout = model.objective.layout
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
        written = [
            name for name in self.tokenizer.names if any(isinstance(p, str) and name in p for p in request.prompt)
        ]
        if written:
            raise ValueError(
                f"the prompt's text holds {written[0]}: a prompt cannot open an image by its tokens or end inside one. "
                "Give images as images, and set mode 'image' to have one drawn"
            )
        if request.mode == "image" and self.images_of(request) < 1:
            raise ValueError("mode 'image' needs max_images (sample.max_images) of at least 1")
        if request.grid is not None and request.grid not in self.tokenizer.size:
            raise ValueError(f"grid {request.grid} was never declared (declared: {sorted(self.tokenizer.size)})")
        if request.inpaint is not None:
            if request.mode != "image":
                raise ValueError(f"in-painting draws one image: set mode 'image', not '{request.mode}'")
            _, grid = self.patcher.levels(request.inpaint.image)
            if request.inpaint.keep.shape != grid or request.grid not in (None, grid):
                raise ValueError(
                    f"the image to paint has a patch grid of {grid}, but `keep` is {request.inpaint.keep.shape} and "
                    f"the asked grid {request.grid}: give `keep` one entry per patch and leave the grid out"
                )

    def images_of(self, request: Request) -> int:
        """The request's budget of images."""
        return self.sample.max_images if request.max_images is None else request.max_images

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        """Serve all requests in one batch; results keep their order and depend on their own request alone.

        Raises:
            ValueError: a request is empty or asks for an undeclared size.
        """
        self._check(requests)
        results = {event.row: event.result for event in self._events(requests, False) if event.result is not None}
        return [results[row] for row in range(len(requests))]

    def stream(self, requests: Sequence[Request], previews: bool = True) -> Iterator[Event]:
        """Serve all requests, telling each token, each clean estimate of an image, each image and each end.

        Raises:
            ValueError: as `generate` does.
        """
        self._check(requests)
        return self._events(requests, previews)

    def _check(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.check(request)

    def _events(self, requests: Sequence[Request], previews: bool) -> Iterator[Event]:
        events: list[Event] = []
        training = self.model.training
        self.model.eval()
        try:
            rows = [self.row(request, number, events.append) for number, request in enumerate(requests)]
            guided = self.sample.guidance_scale != 1.0 and any(request.mode != "text" for request in requests)
            tokens = max([self.sample.max_new_tokens, *(r.max_new_tokens or 0 for r in requests)])
            images = max([self.sample.max_images, *(r.max_images or 0 for r in requests)])
            schedule = Schedule(
                self.model, self.tokenizer, self.patcher, self.sample, rows, guided, tokens, images, previews
            )
            while schedule.busy:
                with torch.inference_mode():
                    schedule.tick()
                events += [Event(number, "preview", image=image) for number, image in schedule.previews()]
                yield from events
                events.clear()
            yield from events
        finally:
            self.model.train(training)

    def row(self, request: Request, number: int, emit: Emit) -> Row:
        """The state machine of one prompt."""
        tok, result = self.tokenizer, Result()
        rng = np.random.Generator(np.random.Philox(key=request.seed))
        writer, words, images = Writer(tok), list[int](), 0
        budget = self.sample.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens
        speak = tok.speaker()
        writer.tokens([tok.bos])
        for piece in request.prompt:
            writer.segment(self.segment(piece))

        def say(text: str | None = None) -> None:
            if words:
                result.segments.append(tok.decode(words) if text is None else text)
                words.clear()

        def end(finished: bool) -> Result:
            result.finished = finished
            emit(Event(number, "end", result=result))
            return result

        grid: Grid | None = None
        given: tuple[Floats, NDArray[np.bool_]] | None = None
        if request.mode == "image":
            grid = request.grid or next(iter(tok.size))
            if request.inpaint is not None:
                known_NP, grid = self.patcher.encode(request.inpaint.image)
                given = known_NP, request.inpaint.keep.reshape(-1)
            writer.tokens([tok.boi])
        while True:
            if grid is not None:
                say()
                order_N = self.layout.order(grid, rng)
                row, column = raster(grid)[order_N[0]]
                first = int(row), int(column)
                writer.size(grid, first)
                _, opening_D = yield self._feed(writer, self._text, rng)
                drawn: Drawn = yield Draw(grid, order_N, first, rng, writer.position, opening_D, given)
                x_NP = drawn.x_NP
                result.segments.append(drawn.image)
                emit(Event(number, "image", image=drawn.image))
                images += 1
                if request.mode == "image":
                    return end(True)
                context = self.layout.context(grid)
                writer.patches(x_NP, grid, [replace(context, order_N=order_N)])
                writer.close_image()
                grid = None
            token, _ = yield self._feed(writer, self.legal(request, images, len(words)), rng)
            if token == tok.boi:
                writer.tokens([token])
                if len(tok.size) > 1:
                    token, _ = yield self._feed(writer, self._sizes, rng)
                    grid = tok.grid[token]
                else:
                    grid = next(iter(tok.size))
            elif token == tok.eos or budget == 0:
                say()
                return end(token == tok.eos)
            else:
                budget -= 1
                words.append(token)
                emit(Event(number, "token", token=token, text=speak(token)))
                said = tok.decode(words) if request.stop else ""
                found = [said.index(stop) for stop in request.stop if stop in said]
                if found:
                    say(said[: min(found)])
                    return end(True)
                writer.tokens([token])

    def legal(self, request: Request, images: int, words: int) -> NDArray[np.bool_]:
        """Tokens [V] that a row may go on with after so many images, and words since the last one."""
        if request.mode == "auto" and images < self.images_of(request):
            free: NDArray[np.bool_] = self._free
            return free
        # Documents whose caption was dropped end right after the image; asked for text, the model gives some.
        legal: NDArray[np.bool_] = self._words if request.mode == "text" and not words else self._text
        return legal

    def segment(self, piece: str | Image.Image) -> TextSegment | ImageSegment:
        """A prompt's piece as a document segment; images stand as finished ones."""
        if isinstance(piece, str):
            return TextSegment(self.tokenizer.encode(piece))
        x_NP, grid = self.patcher.encode(piece)
        context = self.layout.context(grid)
        return ImageSegment(x_NP, grid, [context])

    def _feed(self, writer: Writer, allowed_V: NDArray[np.bool_], rng: np.random.Generator) -> Feed:
        warm = self.sample.temperature > 0
        return Feed(writer.take(), allowed_V, rng.gumbel(size=len(allowed_V)) if warm else None)
