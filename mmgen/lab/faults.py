"""Deliberate mistakes of the kind that write-ups contain, to see the exact experiments turn red.

A fault wraps public methods of the toolbox. `HOOKS` lists those that one may wrap; `injected` puts the wrapped
methods in their places inside a block and restores the originals after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from mmgen.flow.field import GaussianMixture
from mmgen.flow.grid import AffineSteps, Grid
from mmgen.flow.likelihood import LogLikelihood, Ode
from mmgen.flow.path import Path

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
"""From the right function to the wrong one."""


@dataclass(frozen=True)
class Hook:
    """A public method that callers look up on its owner, a class, at every call."""

    owner: type
    name: str

    @contextmanager
    def wrapped(self, wrap: Wrap) -> Iterator[None]:
        """The wrong function in place of the right one inside the block."""
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
HOOKS = (COEFFICIENTS, SCORE, LOG_JOINT, LOG_LIKELIHOOD, DDIM, YIELDED)


def _scaled_conversion(factor: float) -> Wrap:
    """Conversions to and from the score, with the score times `factor`."""

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
    """The exact score of a mixture, times `factor`."""
    return lambda score: lambda self, z, t: factor * score(self, z, t)


def _flipped_divergence(log_likelihood: Callable[..., Any]) -> Callable[..., Any]:
    """The integral of the divergence with the wrong sign."""

    def flipped(*args: Any, **kwargs: Any) -> LogLikelihood:
        found: LogLikelihood = log_likelihood(*args, **kwargs)
        base = -found.z.square().sum(1) / 2 - found.z.shape[1] * 0.9189385332046727
        return replace(found, value=2 * base - found.value)

    return flipped


def _whole_sigma(ddim: Callable[..., Any]) -> Callable[..., Any]:
    """sigma_j eps in place of sqrt(sigma_j^2 - s^2) eps."""

    def broken(self: Grid, eta: float) -> AffineSteps:
        deterministic: AffineSteps = ddim(self, 0.0)
        return replace(deterministic, std=ddim(self, eta).std)

    return broken


def _late(ask: Callable[..., Any]) -> Callable[..., Any]:
    """Every time that is asked about is a hundredth too late, but before the data, where some fields end."""

    def late(self: Grid, t: Tensor, idle: Tensor) -> Tensor:
        asked: Tensor = ask(self, t, idle)
        return (asked + 0.01).clamp(max=0.999)

    return late


def _late_density(log_joint: Callable[..., Any]) -> Callable[..., Any]:
    """The density of a mixture a hundredth too late."""
    return lambda self, z, t: log_joint(self, z, (t + 0.01).clamp(max=0.999))


FAULTS: dict[str, Mapping[Hook, Wrap]] = {
    "sign": {
        COEFFICIENTS: _scaled_conversion(-1.0),
        SCORE: _scaled_score(-1.0),
        LOG_LIKELIHOOD: _flipped_divergence,
    },
    "half": {COEFFICIENTS: _scaled_conversion(2.0), SCORE: _scaled_score(2.0)},
    "minus_s2": {DDIM: _whole_sigma},
    "shifted_t": {YIELDED: _late, LOG_JOINT: _late_density},
}
"""The sign of the score and of the divergence; w^2 score in place of w^2 score / 2; DDIM's noise; a late time."""


@contextmanager
def injected(fault: str | None) -> Iterator[None]:
    """Make the toolbox wrong inside the block."""
    with ExitStack() as stack:
        for hook, wrap in FAULTS[fault].items() if fault is not None else ():
            stack.enter_context(hook.wrapped(wrap))
        yield
