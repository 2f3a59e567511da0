"""Deliberate mistakes of the kind that papers and tutorials contain; the exact experiments must detect them.

A fault wraps public methods of `mmgen.flow`, of the classes that make documents, or of the decoder. `HOOKS` lists the
methods that may be wrapped. `injected` installs the wrapped methods for the duration of a block and then restores the
originals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mmgen.data.documents import Documents
from mmgen.flow.field import GaussianMixture
from mmgen.flow.grid import AffineSteps, Grid
from mmgen.flow.likelihood import LogLikelihood, Ode
from mmgen.flow.path import Path
from mmgen.generate.drawing import Drawings
from mmgen.sequence.document import Block, Writer

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Takes the correct function and returns the faulty one."""


@dataclass(frozen=True)
class Hook:
    """A public method that callers look up on its owner, a class, at every call."""

    owner: type
    name: str

    @contextmanager
    def wrapped(self, wrap: Wrap) -> Iterator[None]:
        """Replace the method by its faulty version inside the block."""
        original = getattr(self.owner, self.name)
        setattr(self.owner, self.name, wrap(original))
        try:
            yield
        finally:
            setattr(self.owner, self.name, original)


COEFFICIENTS = Hook(Path, "coefficients")
SCORE = Hook(GaussianMixture, "score")
LOG_JOINT = Hook(GaussianMixture, "log_joint")
LOG_LIKELIHOOD = Hook(Ode, "log_likelihood")
DDIM = Hook(Grid, "ddim")
YIELDED = Hook(Grid, "yielded")
QUANTILES = Hook(Documents, "quantiles")
PATCHES = Hook(Writer, "patches")
START = Hook(Drawings, "start")
HOOKS = (COEFFICIENTS, SCORE, LOG_JOINT, LOG_LIKELIHOOD, DDIM, YIELDED, QUANTILES, PATCHES, START)


def _scaled_conversion(factor: float) -> Wrap:
    """Scale the score by `factor` in conversions to and from it."""

    def wrap(convert: Callable[..., Any]) -> Callable[..., Any]:
        def scaled(self: Path, source: str, target: str, t: Tensor, clip: float) -> tuple[Tensor, Tensor]:
            p, q = convert(self, source, target, t, clip)
            if target == "score" and source != "score":
                return factor * p, factor * q
            if source == "score" and target != "score":
                return p * factor, q
            return p, q

        return scaled

    return wrap


def _scaled_score(factor: float) -> Wrap:
    """Scale the exact score of a mixture by `factor`."""
    return lambda score: lambda self, z, t: factor * score(self, z, t)


def _flipped_divergence(log_likelihood: Callable[..., Any]) -> Callable[..., Any]:
    """Give the integral of the divergence the wrong sign."""

    def flipped(*args: Any, **kwargs: Any) -> LogLikelihood:
        correct: LogLikelihood = log_likelihood(*args, **kwargs)
        base = -correct.z.square().sum(1) / 2 - correct.z.shape[1] * 0.9189385332046727
        return replace(correct, value=2 * base - correct.value)

    return flipped


def _whole_sigma(ddim: Callable[..., Any]) -> Callable[..., Any]:
    """Use sigma_j eps instead of sqrt(sigma_j^2 - s^2) eps in DDIM."""

    def broken(self: Grid, eta: float) -> AffineSteps:
        deterministic: AffineSteps = ddim(self, 0.0)
        return replace(deterministic, std=ddim(self, eta).std)

    return broken


def _late(yielded: Callable[..., Any]) -> Callable[..., Any]:
    """Shift every time that a solver yields by 0.01, at most to 0.999, because some fields diverge at t = 1."""

    def late(self: Grid, t: Tensor, idle: Tensor) -> Tensor:
        correct: Tensor = yielded(self, t, idle)
        return (correct + 0.01).clamp(max=0.999)

    return late


def _late_density(log_joint: Callable[..., Any]) -> Callable[..., Any]:
    """Evaluate the density of a mixture at a time shifted by 0.01."""
    return lambda self, z, t: log_joint(self, z, (t + 0.01).clamp(max=0.999))


def _shared(quantiles: Callable[..., Any]) -> Callable[..., Any]:
    """Give the images of a row neighbouring draws, so that the images of a document have nearly equal t."""

    def tied(self: Documents, number: int, ordinals: Any, total: int, stream: int | None = None) -> list[float]:
        drawn = quantiles(self, number, ordinals, total, stream)
        return [(drawn[0] + i / total) % 1.0 for i in range(len(drawn))]

    return tied


def _blind(patches: Callable[..., Any]) -> Callable[..., Any]:
    """Treat every copy of an image as a noisy copy, which positions outside it do not see."""

    def hidden(self: Writer, x_NP: Any, grid: Any, blocks: Sequence[Block]) -> None:
        patches(self, x_NP, grid, [replace(block, noised=True) for block in blocks])

    return hidden


def _lost(start: Callable[..., Any]) -> Callable[..., Any]:
    """Start every image from a grey picture instead of its own."""

    def grey(self: Drawings, draws: Any) -> Any:
        begin = start(self, draws)
        return begin and replace(begin, x_RNP=torch.zeros_like(begin.x_RNP))

    return grey


FAULTS: dict[str, Mapping[Hook, Wrap]] = {
    "sign": {
        COEFFICIENTS: _scaled_conversion(-1.0),
        SCORE: _scaled_score(-1.0),
        LOG_LIKELIHOOD: _flipped_divergence,
    },
    "half": {COEFFICIENTS: _scaled_conversion(2.0), SCORE: _scaled_score(2.0)},
    "minus_s2": {DDIM: _whole_sigma},
    "shifted_t": {YIELDED: _late, LOG_JOINT: _late_density},
    "shared_t": {QUANTILES: _shared},
    "blind": {PATCHES: _blind},
    "lost_start": {START: _lost},
}
"""The methods that each fault wraps.

`sign`: the score and the divergence have the wrong sign. `half`: w^2 score instead of w^2 score / 2. `minus_s2`: the
square root of DDIM lacks - s^2. `shifted_t`: the field is evaluated at t + 0.01.
`shared_t`: the images of a document have nearly equal t in training. `blind`: no position sees an image before its own.
`lost_start`: the decoder starts from a grey picture instead of the one that a request gives.
"""


@contextmanager
def injected(fault: str | None) -> Iterator[None]:
    """Inject a fault into `mmgen.flow` inside the block; None injects nothing."""
    with ExitStack() as stack:
        for hook, wrap in FAULTS[fault].items() if fault is not None else ():
            stack.enter_context(hook.wrapped(wrap))
        yield
