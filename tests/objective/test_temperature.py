"""`sample.noise_temperature` with every registered solver: it changes the variance, or an error names those that can."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmgen.config import ObjectiveConfig, SampleConfig
from mmgen.flow.solvers import NOISY, SOLVERS
from mmgen.flow.steps import normal
from mmgen.objective.image_flow import FlowSpec, ImageFlow

HONOURED: list[tuple[str, dict[str, Any], str]] = [
    ("euler_maruyama", {}, "linear"),
    ("euler_maruyama", {"level": "sde"}, "vp"),
    ("ancestral", {}, "linear"),
    ("ddim", {"eta": 0.7}, "linear"),
    ("predictor_corrector", {}, "linear"),
    ("predictor_corrector", {"eta": 0.0}, "linear"),
    ("annealed_langevin", {}, "ve"),
]
REFUSED: list[tuple[str, dict[str, Any]]] = [
    *[(name, {}) for name in ("euler", "midpoint", "heun", "rk4", "dpmpp_2m", "ddim")],
    ("ddim", {"eta": 0.0}),
    ("euler_maruyama", {"level": "ode"}),
    ("predictor_corrector", {"eta": 0.0, "corrections": 0}),
]


def spread(name: str, options: dict[str, Any], path: str, temperature: float) -> float:
    """The variance of what a solver draws with a network whose clean estimate is half of z."""
    flow = ImageFlow(ObjectiveConfig(path=path, prediction="x", loss_space="x"))
    sample = SampleConfig(steps=8, solver=name, solver_options=options, noise_temperature=temperature)
    generator = torch.Generator().manual_seed(0)
    eps = torch.randn(8, 16, 32, dtype=torch.float64, generator=generator)
    drawing = flow.draw(FlowSpec(sample, eps, normal(generator), [], eps.shape[1]))
    try:
        z, _, _ = next(drawing)
        while True:
            z, _, _ = drawing.send([z / 2])
    except StopIteration as stop:
        return float(stop.value.var())


def test_every_solver_is_listed() -> None:
    assert {name for name, *_ in HONOURED} | {name for name, _ in REFUSED} | {"langevin"} == set(SOLVERS)
    assert {name for name, *_ in HONOURED} == {name.split(" with ")[0] for name in NOISY}


@pytest.mark.parametrize(("name", "options", "path"), HONOURED)
def test_a_lower_temperature_lowers_the_variance(name: str, options: dict[str, Any], path: str) -> None:
    cold, cool, plain, hot = (spread(name, options, path, temperature) for temperature in (0.0, 0.7, 1.0, 1.3))
    assert cold < cool < plain < hot


@pytest.mark.parametrize(("name", "options"), REFUSED)
def test_a_solver_that_adds_no_noise_refuses_a_temperature(name: str, options: dict[str, Any]) -> None:
    assert spread(name, options, "linear", 1.0) > 0
    with pytest.raises(ValueError, match=f"noise_temperature is 0.9, but the solver '{name}' adds no noise") as error:
        spread(name, options, "linear", 0.9)
    assert all(honouring in str(error.value) for honouring in NOISY)


def test_a_solver_that_does_not_start_from_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="only corrects samples at one time"):
        spread("langevin", {}, "linear", 0.9)
