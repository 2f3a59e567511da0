"""A mixture with an exact field on every path, for tests of solvers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mmgen.flow.field import GaussianMixture
from mmgen.flow.path import Path
from mmgen.flow.schedule import CosinePath, DDPMPath, LinearBetaPath, LinearPath, ScaledNoise, VEPath
from mmgen.flow.solvers import (
    SOLVERS,
)
from mmgen.lab.data import MEANS

PATHS: dict[str, Path] = {
    "linear": LinearPath(),
    "linear to sigma 0.02": LinearPath(0.02),
    "cosine": CosinePath(),
    "cosine, -10 to 8, shifted": CosinePath(-10.0, 8.0, 2 * math.log(64 / 128)),
    "vp": LinearBetaPath(),
    "ddpm": DDPMPath(),
    "ve": VEPath(0.01, 10.0),
    "linear, noise of 1.5": ScaledNoise(LinearPath(), 1.5),
    "cosine, noise of 0.5": ScaledNoise(CosinePath(), 0.5),
}
each_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def mixture(path: Path) -> GaussianMixture:
    return GaussianMixture(MEANS, 0.3, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), path)


def start(path: Path, count: int = 12) -> Tensor:
    noise = torch.randn(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return noise * path.sigma(torch.zeros((), dtype=torch.float64))


def estimate(name: str, data: GaussianMixture) -> Callable[[Tensor, Tensor], Tensor]:
    return data.velocity if SOLVERS[name].asks == "v" else data.denoised
