"""Stochastic solvers against exact moments, and faults that these checks must detect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mmgen.flow.path import Path
from mmgen.flow.schedule import CosinePath, LinearBetaPath, LinearPath, VEPath
from mmgen.flow.solvers import (
    build_solver,
    solve,
)
from mmgen.flow.time import uniform_grid
from mmgen.lab.faults import injected
from mmgen.lab.moments import Moments, slopes
from tests.flow.common import PATHS, each_path, mixture, start

FAMILY: dict[str, Any] = {
    "none": "ode",
    "sqrt(2(1-t))": lambda path, t: (2 * (1 - t)).sqrt(),
    "2(1-t)": lambda path, t: 2 * (1 - t),
    "one": "constant",
    "sigma": "sigma",
}


@pytest.mark.broad
@pytest.mark.parametrize("level", FAMILY)
@pytest.mark.parametrize("path_name", ["linear", "cosine"])
def test_every_noise_rate_has_the_marginals_of_the_path(level: str, path_name: str) -> None:
    moments = Moments(PATHS[path_name])
    low, high = (0.0, 0.9) if path_name == "linear" else (0.05, 0.95)
    errors = [
        moments.error("euler_maruyama", low + (high - low) * uniform_grid(n), level=FAMILY[level], end="full")
        for n in (400, 800, 1600)
    ]
    assert errors[-1] < 5e-3
    assert all(0.9 < slope < 1.1 for slope in slopes(errors)), errors


@pytest.mark.broad
def test_the_reverse_sde_has_the_marginals() -> None:
    """With w = g on the variance-preserving path, starting from nearly pure noise."""
    moments = Moments(LinearBetaPath())
    errors = [
        moments.error("euler_maruyama", 0.01 + 0.9 * uniform_grid(n), level="sde", end="full") for n in (800, 1600)
    ]
    assert errors[-1] < 5e-3
    assert 0.9 < slopes(errors)[0] < 1.1


@pytest.mark.broad
@pytest.mark.parametrize(
    ("name", "options"),
    [("ancestral", {}), ("ddim", {"eta": 0.0}), ("ddim", {"eta": 0.6}), ("ddim", {"eta": 1.0})],
)
@pytest.mark.parametrize("path_name", [name for name in PATHS if "shifted" not in name])
def test_stochastic_solvers_converge_to_the_data(name: str, options: dict[str, Any], path_name: str) -> None:
    """On paths that end with little noise, because the final clean estimate lacks the variance of that noise."""
    moments = Moments(PATHS[path_name])
    errors = [moments.error(name, uniform_grid(n), **options) for n in (100, 200, 400)]
    assert errors[-1] < 0.02
    assert all(0.75 < slope < 2.2 for slope in slopes(errors)), errors


@pytest.mark.broad
@each_path
def test_corrections_reduce_the_error_of_a_solver(path: Path) -> None:
    """Without corrections the predictor is ancestral sampling; each Langevin step moves z towards the marginal."""
    moments, times = Moments(path), uniform_grid(200)
    plain = moments.error("ancestral", times)
    assert moments.error("predictor_corrector", times, corrections=0) == pytest.approx(plain, rel=0.05)
    errors = [moments.error("predictor_corrector", times, corrections=n, snr=0.1) for n in (1, 3)]
    assert errors[1] < errors[0] < plain


def test_ancestral_is_ddim_with_eta_one() -> None:
    """N(0, 0.25) on the cosine path: the same moments, and the same draws from the same seed."""
    path = CosinePath()
    pairs: tuple[tuple[str, dict[str, float]], ...] = (("ancestral", {}), ("ddim", {"eta": 1.0}))
    variances = []
    for name, options in pairs:
        states = Moments(path, 0.0, 0.5).states(name, uniform_grid(50), **options)[:-1]
        variances.append([Moments.of(z)[1] for z in states])
    assert variances[0] == pytest.approx(variances[1], rel=1e-5)
    data, z, seen = mixture(path), start(path), []
    for name, options in pairs:
        torch.manual_seed(3)
        states = []
        solver = build_solver(name, z, uniform_grid(20), path, **options)
        end = solve(solver, lambda z, t, states=states: states.append(z) or data.denoised(z, t))
        seen.append([*states, end])
    for a, b in zip(seen[0][:-1], seen[1][:-1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(seen[0][-1], seen[1][-1], rtol=1e-3, atol=1e-3)


@pytest.mark.broad
def test_langevin_keeps_the_marginal() -> None:
    """Langevin steps at one time keep the variance, with an error of the order of snr^2."""
    path, time = LinearPath(), 0.6
    moments = Moments(path)
    errors = []
    for snr in (0.2, 0.1, 0.05):
        mean, variance = moments.end("langevin", torch.tensor([time, time], dtype=torch.float64), snr=snr, steps=400)
        expected = time**2 * 0.25 + (1 - time) ** 2
        assert mean == pytest.approx(time * 0.7, abs=1e-9)
        errors.append(abs(variance - expected))
    assert errors[-1] < 2e-3
    assert all(1.8 < slope < 2.3 for slope in slopes(errors)), errors


@pytest.mark.slow
def test_annealed_langevin_reaches_the_data() -> None:
    path = VEPath(0.01, 10.0)
    moments = Moments(path)
    ends = [moments.end("annealed_langevin", uniform_grid(60), corrections=n, snr=0.2) for n in (20, 80, 320)]
    assert [mean for mean, _ in ends] == pytest.approx([0.7] * 3, abs=1e-9)
    # Where sigma is far below the width of the data, Langevin steps mix slowly; more corrections reduce the error.
    errors = [variance - 0.25 for _, variance in ends]
    assert errors[0] > errors[1] > errors[2] > 0
    assert errors[2] < 2e-3


def family_error(level: Any) -> float:
    return Moments(LinearPath()).error("euler_maruyama", 0.96 * uniform_grid(800), level=level, end="full")


@pytest.mark.broad
def test_a_missing_factor_of_one_half_is_detected() -> None:
    assert family_error("constant") < 5e-3
    with injected("half"):
        assert family_error("constant") > 5e-3


@pytest.mark.broad
@pytest.mark.parametrize("fault", ["no minus s^2", "sign of the score", "shifted t"])
def test_faults_of_stochastic_solvers_are_detected(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    moments, times = Moments(CosinePath()), uniform_grid(400)
    healthy = moments.error("ddim", times, eta=1.0)
    field = moments.field

    def wrong(kind: str) -> Callable[[Tensor, Tensor], Tensor]:
        inner = field(kind)
        if fault == "shifted t":
            return lambda z, t: inner(z, (t - 0.01).clamp(min=0))
        return lambda z, t: 2 * z / moments.path.alpha(t) - inner(z, t)

    with injected("minus_s2" if fault == "no minus s^2" else None):
        if fault != "no minus s^2":
            monkeypatch.setattr(moments, "field", wrong)
        assert moments.error("ddim", times, eta=1.0) > 3 * healthy
