"""Images that are being drawn: starts them, sends them the hidden states they ask for, and returns finished ones.

Suffixes: R requests, G guidance lanes, N patches of one image, P patch length, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mmgen.config import GuidanceLane
from mmgen.flow.guide import Guide
from mmgen.flow.path import Path
from mmgen.generate.exchange import Draw, Drawn
from mmgen.generate.lanes import Lanes
from mmgen.generate.parts import CanvasCall, Setup
from mmgen.image.patch import Grid
from mmgen.objective import Drawing, Given, ImageSpec, ImageToImage, Inversion
from mmgen.sequence.document import Writer
from mmgen.sequence.position import offsets


@dataclass
class Canvas:
    """Images of one grid that are drawn together, and their pending call of the backbone."""

    grid: Grid
    start: Tensor
    """Committed length of each lane, [G * R], when drawing began."""
    drawing: Drawing
    waiting: CanvasCall

    @property
    def requests(self) -> list[int]:
        """The requests that these images belong to."""
        return self.waiting.lanes[0]


class Drawings:
    """All images that the requests of a batch are drawing."""

    def __init__(self, setup: Setup, lanes: Lanes, previews: bool) -> None:
        self.setup, self.lanes, self.with_previews = setup, lanes, previews
        self.observer, self.device, self.dtype = setup.parts.observer, setup.device, setup.dtype
        self.canvases: list[Canvas] = []

    @property
    def calls(self) -> list[CanvasCall]:
        """The pending call of each canvas."""
        return [canvas.waiting for canvas in self.canvases]

    def previews(self) -> Iterator[tuple[int, Image.Image]]:
        """Yield (request, estimate of the clean image) for each image being drawn, if previews are on."""
        for canvas in self.canvases:
            preview_RNP = canvas.waiting.call.preview_RNP
            if preview_RNP is not None:
                x_RNP = preview_RNP.float().cpu().numpy()
                yield from zip(canvas.requests, self.setup.patcher.pictures(x_RNP, canvas.grid), strict=True)

    def open(self, grid: Grid, draws: dict[int, Draw]) -> None:
        """Start to draw images of one grid together; keys of `draws` are requests."""
        requests = list(draws)
        lanes = self.lanes.of(requests)
        openings = [torch.stack([draw.opening_D for draw in draws.values()])]
        positions = [[draw.position for draw in draws.values()]]
        for kept, reduced in zip(self.setup.sample.guidance_lanes, lanes[1:], strict=True):
            prefixes = [self._reduced(draw, kept) for draw in draws.values()]
            self.lanes.clear(reduced)
            strips = [writer.take() for writer in prefixes]
            hidden = self.lanes.forward(dict(zip(reduced, strips, strict=True)))
            openings.append(
                torch.stack([hidden[lane][len(strip) - 1] for lane, strip in zip(reduced, strips, strict=True)])
            )
            positions.append([writer.position for writer in prefixes])
        spec = self._spec(grid, list(draws.values()), torch.stack(openings))
        if self.observer is not None:
            self.observer.opened(requests, spec)
        drawing = self.setup.parts.generate(self.setup.model.objective, spec)
        start = self.lanes.lengths(lanes)
        offset_N = self._upload(offsets(self.setup.model.positions, grid, self.setup.model.objective.layout.lead))
        self.canvases.append(Canvas(grid, start, drawing, CanvasCall(lanes, positions, offset_N, next(drawing))))

    def advance(self, hidden: dict[int, Tensor]) -> list[tuple[int, Drawn]]:
        """Send each canvas its hidden states, [W, D] by lane; returns (request, image) for finished images."""
        canvases, self.canvases = self.canvases, []
        finished: list[tuple[int, Drawn]] = []
        for canvas in canvases:
            n = canvas.waiting.call.inputs_RND.shape[1]
            states = [torch.stack([hidden[lane][:n] for lane in lanes]) for lanes in canvas.waiting.lanes]
            try:
                call = canvas.drawing.send(torch.stack(states))
                canvas.waiting = replace(canvas.waiting, call=call)
                self.canvases.append(canvas)
            except StopIteration as stop:
                finished += self._finish(canvas, stop.value)
        return finished

    def _finish(self, canvas: Canvas, x_RNP: Tensor) -> list[tuple[int, Drawn]]:
        # Later positions see the image as `ImageLayout.context` writes it, so positions kept while drawing are removed.
        self.lanes.rewind(canvas.waiting.lanes, canvas.start)
        if self.observer is not None:
            self.observer.drew(canvas.requests, x_RNP)
        patches_RNP = _numbers(x_RNP)
        images = self.setup.patcher.pictures(patches_RNP, canvas.grid)
        return [(r, Drawn(*one)) for r, *one in zip(canvas.requests, patches_RNP, images, strict=True)]

    def _reduced(self, draw: Draw, kept: GuidanceLane) -> Writer:
        """Write the document of a guidance lane: BOS, the images that are kept, the negative prompt, BOI and size."""
        prefix = self.setup.parts.writer(self.setup.tokenizer, self.setup.model.positions)
        prefix.tokens(self.setup.tokenizer.start)
        for image in draw.images if kept == "images" else ():
            prefix.segment(image)
        if draw.negative:
            prefix.tokens(draw.negative)
        prefix.open_image(draw.grid, draw.first)
        return prefix

    def _spec(self, grid: Grid, draws: list[Draw], opening_GRD: Tensor) -> ImageSpec:
        noise = self._noise([draw.rng for draw in draws])
        shape = (len(draws), grid[0] * grid[1], self.setup.model.patcher.patch_length)
        noise_RNP = noise(torch.empty(shape, device="meta"))
        for i, draw in enumerate(draws):
            if draw.begin.latents_NP is not None:
                noise_RNP[i] = self._upload(np.asarray(draw.begin.latents_NP))
        guide = PerImage([draw.guide for draw in draws]) if any(draw.guide for draw in draws) else None
        known = [draw.known for draw in draws if draw.known is not None]
        given = None
        if known:
            given = Given(
                self._upload(np.stack([one.mask_N for one in known])),
                self._upload(np.stack([one.x_NP for one in known])).to(self.dtype),
            )
        return ImageSpec(
            grid=grid,
            noise_RNP=noise_RNP,
            sample=self.setup.sample,
            opening_GRD=opening_GRD,
            order_RN=self._upload(np.stack([draw.order_N for draw in draws])),
            noise=noise,
            given=given,
            previews=self.with_previews,
            start=self.start(draws),
            guide=guide,
        )

    def start(self, draws: list[Draw]) -> ImageToImage | Inversion | None:
        """Return the pictures from which these images start; all of them or none have one."""
        pictures = [draw.begin.picture_NP for draw in draws if draw.begin.picture_NP is not None]
        if not pictures:
            return None
        x_RNP, begin = self._upload(np.stack(pictures)).to(self.dtype), draws[0].begin
        return Inversion(x_RNP) if begin.invert else ImageToImage(x_RNP, begin.strength)

    def _noise(self, sources: list[np.random.Generator]) -> Callable[[Tensor], Tensor]:
        """Return a source of standard normal numbers shaped like a tensor [R, ...], one generator per request."""

        def noise(like: Tensor) -> Tensor:
            drawn = np.stack([rng.standard_normal(like.shape[1:], dtype=np.float32) for rng in sources])
            return self._upload(drawn).to(self.dtype)

        return noise

    def _upload(self, values: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(values)
        tensor = tensor.pin_memory() if self.device.type == "cuda" else tensor
        return tensor.to(self.device, non_blocking=True)


@dataclass(frozen=True)
class PerImage(Guide):
    """A guide of its own, or none, for each image of a canvas."""

    guides: Sequence[Guide | None]

    def shift(self, path: Path, x: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """Return the shifts [R, N, P]; zero without a guide."""
        shifts = torch.zeros_like(x)
        for i, guide in enumerate(self.guides):
            if guide is not None:
                shifts[i : i + 1] = guide.shift(path, x[i : i + 1], z[i : i + 1], t)
        return shifts

    def through(self, view: Callable[[Tensor], Tensor]) -> PerImage:
        """Return the guides of the images through `view`."""
        return PerImage([None if guide is None else guide.through(view) for guide in self.guides])


def _numbers(x_RNP: Tensor) -> NDArray[Any]:
    """Copy patches to the host, as float32 or, if they are codes, as integers."""
    numbers: NDArray[Any] = (x_RNP.float() if x_RNP.is_floating_point() else x_RNP).cpu().numpy()
    return numbers
