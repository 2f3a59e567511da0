"""The part of the parity check that an objective implements: drawing an image again by training's forward pass.

Suffixes: I patches of a batch, J patches that are learned, N patches of one image, n patches of one call, P patch
length, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmgen.config import SampleConfig, at_size
from mmgen.flow.solvers import SOLVERS, build_solver, solve
from mmgen.flow.steps import Noise
from mmgen.image.patch import Grid
from mmgen.objective.image_flow import ImageFlow
from mmgen.sequence.batch import Batch

TOLERANCE = 1e-9
"""Largest accepted difference in float64, relative to the largest magnitude of the compared values."""
Put = Callable[[Batch, Tensor], None]
"""Writes the state of a solver into a batch, over the draws of training: (batch, indices into I of the patches)."""


@dataclass(frozen=True)
class SampledImage:
    """An image that the decoder drew, with its patches in raster order."""

    grid: Grid
    order_N: Tensor
    noise_NP: Tensor
    """The noise from which the solver started."""
    x_NP: Tensor
    draws: list[Tensor]
    """All further noise, in the order in which the decoder drew it."""
    sample: SampleConfig
    """The sampling settings of the user."""


@dataclass(frozen=True)
class Trained:
    """The result of training's forward pass for the image, with patches in the order of the row."""

    batch: Batch
    state: Any
    """`Embedded.state` of the batch."""
    hidden_JD: Tensor
    at_J: Tensor
    """Index into I of each learned patch."""


class Replay(ABC):
    """A drawn image, with the forward pass of training for its documents, and a report of differences."""

    image: SampledImage

    @abstractmethod
    def train(self, step: str, calls: slice, put: Put) -> list[Trained]:
        """Run the documents of all guidance lanes with the state of a solver, and compare them with backbone calls.

        `calls` selects the backbone calls of the decoder, and `step` names them in the report.
        """

    @abstractmethod
    def compare(self, step: str, sampled: Tensor, drawn: Tensor) -> None:
        """Report the difference between patches of the decoder (`sampled`) and patches that were drawn again."""


def recorded(draws: Iterable[Tensor]) -> Noise:
    """Return a source of recorded noise, in order.

    A draw that is missing or has another shape is NaN, because the decoder then drew otherwise than the settings ask,
    and every comparison that follows must fail.
    """
    source = iter(draws)

    def noise(like: Tensor) -> Tensor:
        drawn = next(source, None)
        return drawn if drawn is not None and drawn.shape == like.shape else torch.full_like(like, torch.nan)

    return noise


def redraw(
    flow: ImageFlow,
    outputs: Callable[[Tensor, Tensor], list[Tensor]],
    noise_RnP: Tensor,
    scales: Sequence[float | Tensor],
    image: SampledImage,
    further: Noise,
) -> Tensor:
    """Draw clean patches [R, n, P] with the sampling settings, from outputs that training's forward pass gave.

    The time grid, guidance, its corrections and the clipping are written here a second time, without the code that the
    decoder uses. The solver is that of `mmgen.flow`, which its own tests compare with other libraries.

    Args:
        flow: the flow of the objective.
        outputs: (z, t) to the outputs of the network for each guidance lane, the conditional lane first.
        noise_RnP: the noise from which the decoder's solver started.
        scales: guidance scale of each lane but the conditional one, a number or [R, 1, 1].
        image: the image that was drawn, with its grid and the sampling settings.
        further: returns the recorded noise of a stochastic solver, in order.
    """
    sample, (rows, columns) = image.sample, image.grid
    path, kind, rule = flow.path_of(rows * columns), SOLVERS[sample.solver], sample.time_shift
    shift = at_size(flow.settings.time.shift if rule is None else rule, rows * columns)
    even = torch.arange(sample.steps + 1, dtype=torch.float64) / sample.steps
    times = even / (even + shift * (1 - even))
    clip = path.smallest_level(times)

    def answer(z: Tensor, t: Tensor) -> Tensor:
        v = [path.convert(flow.settings.prediction, "v", output, z, t, clip) for output in outputs(z, t)]
        guided = _guided(v, t, scales, sample)
        x = path.convert("v", "x", guided, z, t, clip)
        if sample.clean_range is None:
            return x if kind.asks == "x" else guided
        return path.convert("x", kind.asks, x.clamp(*sample.clean_range), z, t, clip)

    solver = build_solver(
        sample.solver,
        noise_RnP * path.sigma(times[0]),
        times,
        path,
        lambda z: sample.noise_temperature * further(z),
        **sample.solver_options,
    )
    return solve(solver, answer)


def lane_scales(sample: SampleConfig) -> list[float]:
    """The guidance scale of each lane but the conditional one: of text, then of images."""
    return [sample.guidance_scale, sample.image_guidance_scale or 0.0][: len(sample.guidance_lanes)]


def _guided(v: Sequence[Tensor], t: Tensor, scales: Sequence[float | Tensor], sample: SampleConfig) -> Tensor:
    """Return the guided velocity of R images, each with its own deviation and norm, from the lanes in nested order."""
    of_images = {
        "interval": sample.image_guidance_interval,
        "rescale": sample.image_guidance_rescale,
        "renorm": sample.image_guidance_renorm,
    }
    guided = v[-1]
    for k in reversed(range(len(v) - 1)):
        chosen: dict[str, Any] = {
            name: value if k and value is not None else getattr(sample, f"guidance_{name}")
            for name, value in of_images.items()
        }
        low, high = chosen["interval"]
        guided = guided + (scales[k] if low <= float(t) <= high else 1.0) * (v[k] - v[k + 1])
        deviations = [one.flatten(1).std(1, correction=0).view(-1, 1, 1) for one in (v[k], guided)]
        guided = guided * (1 - chosen["rescale"] + chosen["rescale"] * deviations[0] / deviations[1])
        if chosen["renorm"]:
            norms = [one.flatten(1).norm(dim=1).view(-1, 1, 1) for one in (v[k], guided)]
            guided = guided * (norms[0] / norms[1]).clamp(max=1.0)
    return guided
