"""The decoder: serves requests for text and images together, with one coroutine per request.

The coroutine of a request is a state machine (text -> BOI -> image -> EOI -> text). It yields what it needs next: a
token after some positions, or an image. `mmgen.generate.scheduler` runs the coroutines of all requests over one batched
backbone.

Suffixes: N patches of one image, P patch length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mmgen.config import SampleConfig
from mmgen.flow.guide import Guide
from mmgen.flow.likelihood import slerp
from mmgen.generate.exchange import Action, Begin, Chosen, Draw, Drawn, Feed, Known, RequestCoroutine
from mmgen.generate.parts import REAL, Parts, Setup
from mmgen.generate.request import Event, Inpaint, Mode, Request, Result
from mmgen.generate.scheduler import Budget, Schedule
from mmgen.image.patch import Grid, joined, raster
from mmgen.model import MMGenModel
from mmgen.objective import ImageToImage
from mmgen.sequence.document import ImageSegment, TextSegment
from mmgen.sequence.tokenizer import Tokenizer

__all__ = ["Decoder", "Event", "Inpaint", "Request", "Result"]

Emit = Callable[[Event], None]


class Decoder:
    """Generates text and images from prompts.

    `sample` holds the settings that all requests share: solver, guidance, temperature and default budgets. `parts` are
    the exchangeable parts of the decoder; checks and benchmarks replace some of them.
    """

    def __init__(self, model: MMGenModel, tokenizer: Tokenizer, sample: SampleConfig, parts: Parts = REAL) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.sample = sample
        self.parts = parts
        self.patcher = model.build_patcher()
        self.layout = model.objective.layout
        self.grammar = parts.grammar(tokenizer, int(model.get_input_embeddings().weight.shape[0]))

    def check(self, request: Request) -> None:
        """Raise ValueError if a request is invalid."""
        if isinstance(request.prompt, str) or not all(isinstance(p, str | Image.Image) for p in request.prompt):
            raise ValueError('a prompt is a list of texts and PIL images, such as ["a red 7"] or [image, "mirrored"]')
        if request.mode not in get_args(Mode):
            raise ValueError(f"unknown mode '{request.mode}': give one of {', '.join(get_args(Mode))}")
        pieces = [piece for piece in request.prompt if not isinstance(piece, str) or piece.strip()]
        if request.mode != "image" and not pieces:
            raise ValueError("the prompt is empty: give text or an image (an unconditional image needs mode 'image')")
        texts = [piece for piece in [*request.prompt, self.negative_of(request)] if isinstance(piece, str)]
        special = [name for name in self.tokenizer.names if any(name in text for text in texts)]
        if special:
            raise ValueError(
                f"the text of the prompt contains {special[0]}: a prompt cannot contain special tokens. "
                "Give images as PIL images, and set mode 'image' to draw one"
            )
        if request.mode == "image" and self.images_of(request) < 1:
            raise ValueError("mode 'image' needs max_images (sample.max_images) of at least 1")
        if request.grid is not None and request.grid not in self.tokenizer.size:
            raise ValueError(
                f"the patch grid {request.grid} is not declared: give one of {sorted(self.tokenizer.size)}, "
                "or declare its size in model.patcher.image_sizes before training"
            )
        if request.inpaint is not None:
            if request.mode != "image":
                raise ValueError(f"in-painting needs mode 'image', and this request has mode '{request.mode}'")
            _, grid = self.patcher.pixels(request.inpaint.image)
            if request.inpaint.keep.shape != grid or request.grid not in (None, grid):
                raise ValueError(
                    f"the image to in-paint has a patch grid of {grid}, but `keep` has shape "
                    f"{request.inpaint.keep.shape} and `grid` is {request.grid}: give `keep` one entry per patch "
                    "and leave `grid` out"
                )
        if request.negative_prompt and (request.mode == "text" or not self.sample.guidance_lanes):
            raise ValueError(
                f"negative_prompt acts through guidance, but the request has mode '{request.mode}' and "
                f"sample.guidance_scale is {self.sample.guidance_scale:g}: draw an image at another scale than 1, or "
                "leave negative_prompt out"
            )
        self._check_start(request)

    def _check_start(self, request: Request) -> None:
        """Raise ValueError if the image of a request cannot start from its picture or noise, or follow its guide."""
        set_fields = [name for name in ("image", "latents", "guide") if getattr(request, name) is not None]
        if request.invert and request.image is None:
            raise ValueError("invert needs the picture whose noise is to be found: give it as `image`")
        if not set_fields:
            return
        what = " and ".join(f"`{name}`" for name in set_fields)
        if request.mode != "image":
            raise ValueError(f"{what} needs mode 'image', and this request has mode '{request.mode}'")
        if not self.model.objective.whole_images and set_fields != ["latents"]:
            raise ValueError(
                f"{what} needs an image that is noisy as a whole, but the objective "
                f"'{self.model.objective.settings.kind}' draws it patch by patch: use `inpaint` to keep parts of a "
                "picture, or a model with objective.kind transfusion"
            )
        if not 0 <= request.strength <= 1:
            raise ValueError(f"strength lies between 0 (the picture) and 1 (noise), got {request.strength}")
        if request.image is not None:
            _, grid = self.patcher.pixels(request.image)
            steps = self.sample.steps
            if request.grid not in (None, grid) or self.grid_of(request) != grid:
                raise ValueError(
                    f"`image` has a patch grid of {grid}, but `grid` or the image to in-paint has another one: leave "
                    "`grid` out, and give pictures of one size"
                )
            if request.strength and not request.invert and not ImageToImage.steps(request.strength, steps):
                raise ValueError(
                    f"strength {request.strength:g} of sample.steps {steps} is less than one step: raise one of them, "
                    "or set strength to 0 for the picture itself"
                )
        if request.invert and (request.inpaint or request.guide or request.latents is not None):
            raise ValueError("invert runs from a picture to its noise: leave `inpaint`, `guide` and `latents` out")
        if request.latents is not None:
            rows, columns = self.grid_of(request)
            shape = (rows * columns, self.model.patcher.patch_length)
            if np.shape(request.latents) != shape:
                raise ValueError(
                    f"`latents` has shape {np.shape(request.latents)}, but an image of {rows}x{columns} patches needs "
                    f"{shape}: give what an inversion returned, with the same `grid`"
                )

    def grid_of(self, request: Request) -> Grid:
        """Patch grid of the image of mode `image`."""
        picture = request.inpaint.image if request.inpaint is not None else request.image
        if picture is not None:
            return self.patcher.pixels(picture)[1]
        return request.grid or next(iter(self.tokenizer.size))

    def negative_of(self, request: Request) -> str:
        """Negative prompt of a request; empty for none."""
        chosen = self.sample.negative_prompt if request.negative_prompt is None else request.negative_prompt
        return chosen or ""

    def images_of(self, request: Request) -> int:
        """Largest number of images of a request."""
        return self.sample.max_images if request.max_images is None else request.max_images

    def tokens_of(self, request: Request) -> int:
        """Largest number of text tokens of a request."""
        return self.sample.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        """Serve all requests in one batch; returns one result per request, in the same order.

        A result depends on its own request only, not on the other requests of the batch.

        Raises:
            ValueError: a prompt is empty or contains a special token, or a grid is not declared.
        """
        self._check(requests)
        events = self._events(requests, previews=False)
        results = {event.request: event.result for event in events if event.result is not None}
        return [results[number] for number in range(len(requests))]

    def stream(self, requests: Sequence[Request], previews: bool = True) -> Iterator[Event]:
        """Serve all requests in one batch; yields an event for each token, preview, image and end of a request.

        Previews are estimates of the clean image, one per step of its drawing; `previews=False` leaves them out.

        Raises:
            ValueError: as in `generate`; raised by the call itself, before the first event.
        """
        self._check(requests)
        return self._events(requests, previews)

    def interpolate(self, request: Request, other: Image.Image, shares: Sequence[float]) -> list[Image.Image]:
        """Draw images between `request.image` and another picture of the same size.

        Both are inverted under the prompt of the request, their noise is interpolated spherically (`mmgen.flow.slerp`),
        and an image is drawn from each result.

        Args:
            request: a request of mode `image` with an `image`.
            other: the picture at share 1.
            shares: 0 gives the picture of the request, 1 the other one.

        Raises:
            ValueError: as in `generate`, or the pictures differ in size.
        """
        ends = [replace(request, image=image, invert=True) for image in (request.image, other)]
        grid, other_grid = (self.grid_of(end) for end in ends)
        if grid != other_grid:
            raise ValueError(f"the pictures have patch grids of {grid} and {other_grid}: give two of one size")
        first, last = (torch.from_numpy(result.latents).unsqueeze(0) for result in self.generate(ends))
        drawn = replace(request, image=None, grid=grid)
        between = [slerp(first, last, share)[0].numpy() for share in shares]
        return [result.images[0] for result in self.generate([replace(drawn, latents=one) for one in between])]

    def segment(self, piece: str | Image.Image) -> TextSegment | ImageSegment:
        """Convert a piece of a prompt to a document segment; an image becomes a clean context image."""
        if isinstance(piece, str):
            return TextSegment(self.tokenizer.encode(piece))
        x_NP, grid = self.patcher.encode(piece)
        return ImageSegment(x_NP, grid, [self.layout.context(grid)])

    def _check(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.check(request)

    def _events(self, requests: Sequence[Request], previews: bool) -> Iterator[Event]:
        events: list[Event] = []
        training = self.model.training
        self.model.eval()
        try:
            coroutines = [RequestState(self, request, n, events.append).serve() for n, request in enumerate(requests)]
            drawing = any(request.mode != "text" for request in requests)
            budget = Budget(
                guidance=len(self.sample.guidance_lanes) if drawing else 0,
                negative=max((len(self.tokenizer.encode(self.negative_of(r))) for r in requests), default=0),
                tokens=max([self.sample.max_new_tokens, *(self.tokens_of(request) for request in requests)]),
                images=max([self.sample.max_images, *(self.images_of(request) for request in requests)]),
                previews=previews,
            )
            setup = Setup(self.model, self.tokenizer, self.patcher, self.sample, self.parts)
            schedule = Schedule(setup, coroutines, budget)
            while schedule.busy:
                with torch.inference_mode():
                    schedule.tick()
                events += [Event(number, "preview", image=image) for number, image in schedule.previews()]
                yield from events
                events.clear()
            yield from events
        finally:
            self.model.train(training)


class RequestState:
    """The state machine of one request: the document so far and the remaining budgets."""

    def __init__(self, decoder: Decoder, request: Request, number: int, emit: Emit) -> None:
        self.decoder, self.request, self.number, self.emit = decoder, request, number, emit
        self.tokenizer, self.grammar = decoder.tokenizer, decoder.grammar
        self.rng = np.random.Generator(np.random.Philox(key=request.seed))
        self.writer = decoder.parts.writer(self.tokenizer, decoder.model.positions)
        self.new_text = self.tokenizer.speaker()
        self.result = Result()
        self.context: list[ImageSegment] = []
        """The images of the document so far."""
        self.negative = decoder.tokenizer.encode(decoder.negative_of(request))
        self.words: list[int] = []
        """Text tokens since the last image."""
        self.tokens_left = decoder.tokens_of(request)
        self.images = 0

    def serve(self) -> RequestCoroutine:
        """Run the request: feed the prompt, then generate until the document ends or a budget runs out."""
        self.writer.tokens(self.tokenizer.start)
        for piece in self.request.prompt:
            segment = self.decoder.segment(piece)
            self.writer.segment(segment)
            if isinstance(segment, ImageSegment):
                self.context.append(segment)
        if self.request.mode == "image":
            return (yield from self._only_image())
        while True:
            more_images = self.images < self.decoder.images_of(self.request)
            token = (yield from self._feed(self.grammar.allowed(self.request, more_images, len(self.words)))).token
            if token == self.tokenizer.boi:
                self.writer.tokens([token])
                yield from self._image((yield from self._size()))
            elif token in self.tokenizer.stops or self.tokens_left == 0:
                self._end_text()
                return self._end(token in self.tokenizer.stops)
            elif self._add_word(token):
                return self._end(True)

    def _only_image(self) -> RequestCoroutine:
        """Draw the one image of mode `image`."""
        request, patcher = self.request, self.decoder.patcher
        grid, known, begin, guide = self.decoder.grid_of(request), None, Begin(request.latents), request.guide
        if request.inpaint is not None:
            x_NP, grid = patcher.encode(request.inpaint.image)
            known = Known(x_NP, request.inpaint.keep.reshape(-1))
        if request.image is not None:
            picture_NP, grid = patcher.encode(request.image)
            if not request.strength and not request.invert:
                if known is not None:
                    picture_NP = np.where(known.mask_N[:, None], known.x_NP, picture_NP)
                self._drawn(patcher.decode(picture_NP, grid))
                return self._end(True)
            begin = Begin(request.latents, picture_NP, request.strength, request.invert)
        if guide is not None:
            guide = guide.through(lambda x: joined(x, grid, patcher.settings.patch_size))
        self.writer.tokens([self.tokenizer.boi])
        yield from self._draw(grid, known, begin, guide)
        return self._end(True)

    def _size(self) -> Generator[Action, Any, Grid]:
        """Return the grid of an image that the model opened; the model chooses among several declared sizes."""
        if len(self.tokenizer.size) == 1:
            return next(iter(self.tokenizer.size))
        return self.tokenizer.grid[(yield from self._feed(self.grammar.sizes_V)).token]

    def _image(self, grid: Grid) -> Generator[Action, Any, None]:
        """Draw an image inside the document, and write its clean copy for later positions."""
        self._end_text()
        x_NP, order_N = yield from self._draw(grid)
        blocks = [replace(self.decoder.layout.context(grid), order_N=order_N)]
        self.writer.patches(x_NP, grid, blocks)
        self.writer.close_image()
        self.context.append(ImageSegment(x_NP, grid, blocks))

    def _draw(
        self, grid: Grid, known: Known | None = None, begin: Begin = Begin(), guide: Guide | None = None
    ) -> Generator[Action, Any, tuple[NDArray[Any], NDArray[np.int64]]]:
        """Draw an image after BOI; returns its patches [N, P] and the order [N] in which they were generated."""
        order_N = self.decoder.layout.order(grid, self.rng)
        row, column = raster(grid)[order_N[0]]
        first = int(row), int(column)
        self.writer.size(grid, first)
        opening_D = (yield from self._feed(self.grammar.text_V)).hidden_D
        drawn: Drawn = yield Draw(
            grid, order_N, first, self.rng, self.writer.position, opening_D, known,
            tuple(self.context), self.negative, begin, guide,
        )  # fmt: skip
        if begin.invert:
            self.result.latents = drawn.x_NP
        else:
            self._drawn(drawn.image)
        return drawn.x_NP, order_N

    def _drawn(self, image: Image.Image) -> None:
        """Append a finished image to the result."""
        self.result.segments.append(image)
        self.emit(Event(self.number, "image", image=image))
        self.images += 1

    def _feed(self, allowed_V: NDArray[np.bool_]) -> Generator[Action, Any, Chosen]:
        """Feed the positions written since the last call; returns the next token, one of the allowed ones."""
        sampling = self.decoder.sample.temperature > 0
        gumbel_V = self.rng.gumbel(size=len(allowed_V)) if sampling else None
        chosen: Chosen = yield Feed(self.writer.take(), allowed_V, gumbel_V)
        return chosen

    def _add_word(self, token: int) -> bool:
        """Add a text token; returns true if the text now contains a stop string, which ends the request."""
        self.tokens_left -= 1
        self.words.append(token)
        self.emit(Event(self.number, "token", token=token, text=self.new_text(token)))
        text = self.tokenizer.decode(self.words) if self.request.stop else ""
        starts = [text.index(stop) for stop in self.request.stop if stop in text]
        if starts:
            self._end_text(text[: min(starts)])
            return True
        self.writer.tokens([token])
        return False

    def _end_text(self, text: str | None = None) -> None:
        """Append the words since the last image to the result; `text` replaces them if it is given."""
        if self.words:
            self.result.segments.append(self.tokenizer.decode(self.words) if text is None else text)
            self.words.clear()

    def _end(self, finished: bool) -> Result:
        self.result.finished = finished
        self.emit(Event(self.number, "end", result=self.result))
        return self.result
