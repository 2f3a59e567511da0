"""The flow core against closed forms and against code that nobody here wrote."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from scipy import integrate, stats

from mmgen.flow.guide import classifier_free
from mmgen.flow.loss import flow_loss
from mmgen.flow.path import KINDS, LinearPath
from mmgen.flow.solve import SOLVERS, solve
from mmgen.flow.time import TIMES, stratified

PATH = LinearPath()
torch.set_default_dtype(torch.float32)


def draws(n: int = 64, length: int = 5) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, n, length, dtype=torch.float64, generator=g)
    t = torch.rand(n, 1, dtype=torch.float64, generator=g) * 0.9 + 0.05
    return x, eps, t


def quantities(x: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"x": x, "eps": eps, "v": x - eps}


@pytest.mark.parametrize(("source", "target"), itertools.product(KINDS, KINDS))
def test_conversions_recover_every_quantity(source: str, target: str) -> None:
    x, eps, t = draws()
    known = quantities(x, eps, t)
    found = PATH.convert(source, target, known[source], t * x + (1 - t) * eps, t, clip=1e-6)
    torch.testing.assert_close(found, known[target], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("prediction", "space"), itertools.product(KINDS, KINDS))
def test_loss_is_the_error_after_conversion(prediction: str, space: str) -> None:
    """The nine pairs: converting output and target, then comparing, is what `flow_loss` computes."""
    x, eps, t = draws()
    output = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    z = PATH.mix(x, eps, t)
    a = PATH.convert(prediction, space, output, z, t, 0.05)
    b = PATH.convert(prediction, space, quantities(x, eps, t)[prediction], z, t, 0.05)
    loss = flow_loss(PATH, output, x, eps, t.squeeze(1), prediction, space, 0.05)
    torch.testing.assert_close(loss, (a - b).square().mean(-1), rtol=1e-9, atol=1e-12)


def test_x_prediction_with_v_loss_is_jits() -> None:
    """v = (x - z) / max(1 - t, 0.05) on both sides, also where the clip acts."""
    x, eps, _ = draws()
    t = torch.full((len(x),), 0.99, dtype=x.dtype)
    z = 0.99 * x + 0.01 * eps
    output = x + 0.3
    expected = ((output - z) / 0.05 - (x - z) / 0.05).square().mean(-1)
    torch.testing.assert_close(flow_loss(PATH, output, x, eps, t, "x", "v", 0.05), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("clip", [0.05, 0.2])
@pytest.mark.parametrize(("prediction", "space"), itertools.product(KINDS, KINDS))
def test_clipping_keeps_the_minimiser(prediction: str, space: str, clip: float) -> None:
    x, eps, _ = draws()
    for t in (0.0, 1.0):
        exact = quantities(x, eps, torch.tensor(t))[prediction]
        loss = flow_loss(PATH, exact, x, eps, torch.full((len(x),), t, dtype=x.dtype), prediction, space, clip)
        assert loss.abs().max() < 1e-20
        assert loss.isfinite().all()


def test_unknown_quantity_is_refused() -> None:
    x, eps, t = draws()
    with pytest.raises(ValueError, match="unknown quantity 'score'"):
        PATH.convert("score", "x", x, eps, t, 0.1)


def mixture(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The exact velocity of a three-component Gaussian mixture of width 0.3 in the plane."""
    means = torch.tensor([[1.5, 0.0], [-0.8, 1.2], [-0.6, -1.4]], dtype=z.dtype)
    s2 = t**2 * 0.3**2 + (1 - t) ** 2
    gap = z[:, None] - t * means
    r = torch.softmax(-gap.square().sum(-1) / (2 * s2), dim=1)
    pull = (t * 0.3**2 - (1 - t)) / s2
    return (r[:, :, None] * (means + pull * gap)).sum(1)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(name: str, order: int) -> None:
    z0 = torch.randn(32, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def end(n: int) -> torch.Tensor:
        return solve(SOLVERS[name](z0, torch.arange(n + 1, dtype=torch.float64) / n), mixture)

    truth = integrate.solve_ivp(
        lambda t, y: mixture(torch.from_numpy(y).view(-1, 2), torch.tensor(t)).flatten().numpy(),
        (0, 1), z0.flatten().numpy(), method="DOP853", rtol=1e-11, atol=1e-12,
    ).y[:, -1]  # fmt: skip
    errors = [float((end(n).flatten() - torch.from_numpy(truth)).abs().mean()) for n in (160, 320, 640)]
    slopes = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert np.abs(slopes - order).max() < 0.15, slopes


@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_euler_is_diffusers_euler(steps: int) -> None:
    """Step by step; diffusers runs sigma from 1 to 0 on z = (1 - sigma) x + sigma eps, with velocity eps - x."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    z0 = torch.randn(8, 2, generator=torch.Generator().manual_seed(3))
    theirs = z0
    seen = []
    for step in scheduler.timesteps:
        velocity = mixture(theirs, 1 - step / 1000)
        theirs = scheduler.step(-velocity, step, theirs).prev_sample
        seen.append(theirs)
    path = []
    ours = solve(SOLVERS["euler"](z0, torch.arange(steps + 1) / steps), lambda z, t: path.append(z) or mixture(z, t))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for mine, other in zip(path[1:], seen, strict=False):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_heun_is_diffusers_heun() -> None:
    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(10)
    z = torch.randn(8, 2, generator=torch.Generator().manual_seed(4))
    times = torch.cat([1 - scheduler.sigmas[:1], 1 - scheduler.sigmas[1:-1:2], torch.ones(1)]).unique()
    theirs = z
    for step in scheduler.timesteps:
        theirs = scheduler.step(-mixture(theirs, 1 - step / 1000), step, theirs).prev_sample
    torch.testing.assert_close(solve(SOLVERS["heun"](z, times), mixture), theirs, rtol=1e-3, atol=1e-4)


def test_times_have_their_distribution() -> None:
    u = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    logit = torch.logit(TIMES["logit_normal"](u, -0.8, 0.8)).numpy()
    assert stats.kstest(logit, stats.norm(-0.8, 0.8).cdf).statistic < 1e-3
    assert torch.equal(TIMES["uniform"](u, 5.0, 5.0), u)


def test_stratified_draws_fill_the_interval() -> None:
    spread = sorted(stratified(0.37, k, 10) for k in range(10))
    assert np.allclose(np.diff(spread), 0.1)
    assert 0 <= spread[0] < 0.1


def test_guidance_scales_and_interval() -> None:
    c, u = torch.tensor([2.0]), torch.tensor([1.0])
    for weight, expected in ((0.0, 1.0), (1.0, 2.0), (3.0, 4.0)):
        assert classifier_free(c, u, torch.tensor(0.5), weight).item() == expected
    assert classifier_free(c, u, torch.tensor(0.05), 3.0, (0.1, 1.0)).item() == 2.0


def test_a_shifted_time_is_noticed() -> None:
    """The convergence test can fail: a velocity asked at the wrong end of each step has order 1, not 2."""
    z0 = torch.randn(32, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def end(n: int, shift: float) -> torch.Tensor:
        times = torch.arange(n + 1, dtype=torch.float64) / n
        return solve(SOLVERS["heun"](z0, times), lambda z, t: mixture(z, (t + shift / n).clamp(max=1)))

    truth = end(2000, 0.0)
    errors = [float((end(n, 1.0) - truth).abs().mean()) for n in (160, 320)]
    assert abs(np.log2(errors[0] / errors[1]) - 2) > 0.5
