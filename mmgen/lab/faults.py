"""Deliberate mistakes of the kind that write-ups contain, to see the exact experiments turn red."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from typing import Any
from unittest.mock import patch

from torch import Tensor

from mmgen.flow import likelihood
from mmgen.flow.field import GaussianMixture
from mmgen.flow.path import Path

solve: Any = import_module("mmgen.flow.solvers")


def _sign(original: dict[str, Any]) -> dict[tuple[Any, str], Callable[..., Any]]:
    """The score's sign, and the sign of the divergence integral."""

    def flipped(*args: Any, **kwargs: Any) -> likelihood.LogLikelihood:
        found: likelihood.LogLikelihood = original["log_likelihood"](*args, **kwargs)
        base = -found.z.square().sum(1) / 2 - found.z.shape[1] * 0.9189385332046727
        return replace(found, value=2 * base - found.value)

    return {
        (Path, "coefficients"): _scaled_score(original["coefficients"], -1.0),
        (GaussianMixture, "score"): lambda self, z, t: -original["score"](self, z, t),
        (likelihood, "log_likelihood"): flipped,
    }


def _half(original: dict[str, Any]) -> dict[tuple[Any, str], Callable[..., Any]]:
    """w^2 score in place of w^2 score / 2."""
    return {
        (Path, "coefficients"): _scaled_score(original["coefficients"], 2.0),
        (GaussianMixture, "score"): lambda self, z, t: 2 * original["score"](self, z, t),
    }


def _scaled_score(convert: Callable[..., Any], factor: float) -> Callable[..., Any]:
    def scaled(self: Path, source: str, target: str, t: Tensor, clip: float) -> tuple[Tensor, Tensor]:
        p, q = convert(self, source, target, t, clip)
        if target == "score" and source != "score":
            return factor * p, factor * q
        if source == "score" and target != "score":
            return p * factor, q
        return p, q

    return scaled


def _minus_s2(original: dict[str, Any]) -> dict[tuple[Any, str], Callable[..., Any]]:
    """sigma_j eps in place of sqrt(sigma_j^2 - s^2) eps in DDIM."""

    def broken(grid: Any, eta: float) -> tuple[Tensor, Tensor, Tensor]:
        by_x, by_z, _ = original["_ddim_step"](grid, 0.0)
        return by_x, by_z, original["_ddim_step"](grid, eta)[2]

    return {(solve, "_ddim_step"): broken}


def _shifted_t(original: dict[str, Any]) -> dict[tuple[Any, str], Callable[..., Any]]:
    """Every question is asked at a time that is a hundredth too late, but before the data, where some fields end."""

    def late(self: Any, t: Tensor, idle: Tensor) -> Tensor:
        asked: Tensor = original["ask"](self, t, idle)
        return (asked + 0.01).clamp(max=0.999)

    def density(self: GaussianMixture, z: Tensor, t: Tensor) -> Tensor:
        found: Tensor = original["log_joint"](self, z, (t + 0.01).clamp(max=0.999))
        return found

    return {(solve._Grid, "ask"): late, (GaussianMixture, "log_joint"): density}


FAULTS = {"sign": _sign, "half": _half, "minus_s2": _minus_s2, "shifted_t": _shifted_t}


@contextmanager
def injected(fault: str | None) -> Iterator[None]:
    """Make the toolbox wrong inside the block."""
    if fault is None:
        yield
        return
    original = {
        "coefficients": Path.coefficients,
        "score": GaussianMixture.score,
        "log_joint": GaussianMixture.log_joint,
        "log_likelihood": likelihood.log_likelihood,
        "_ddim_step": solve._ddim_step,
        "ask": solve._Grid.ask,
    }
    patches = [patch.object(owner, name, function) for (owner, name), function in FAULTS[fault](original).items()]
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in patches:
            one.stop()
