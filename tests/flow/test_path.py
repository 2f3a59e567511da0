"""Paths, conversions, losses, weights and timestep distributions against closed forms, autograd, diffusers and azula."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable

import azula.noise
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from scipy import stats
from torch import Tensor

from mmgen.flow import loss as losses
from mmgen.flow.loss import WEIGHTS, FlowLoss
from mmgen.flow.path import KINDS, Path
from mmgen.flow.schedule import PATHS, CosinePath, DDPMPath, LinearBetaPath, LinearPath, ScaledNoise, VEPath
from mmgen.flow.time import TIMES, cosine_grid, discrete, log_snr_grid, shifted, shifted_grid, stratified, uniform_grid

ALL: dict[str, Path] = {
    **{name: make() for name, make in PATHS.items()},
    "linear_sigma_min": LinearPath(0.02),
    "cosine_shifted": CosinePath(-10, 8, shift=-1.5),
    "ddpm_short": DDPMPath([0.1, 0.3, 0.2, 0.5]),
    "scaled": ScaledNoise(LinearPath(), 2.5),
}
each_path = pytest.mark.parametrize("path", ALL.values(), ids=ALL)


def times(n: int = 64) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.rand(n, 1, dtype=torch.float64, generator=g) * 0.9 + 0.05


def draws(n: int = 64, length: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, n, length, dtype=torch.float64, generator=g)
    return x, eps, times(n)


def quantities(path: Path, x: Tensor, eps: Tensor, t: Tensor) -> dict[str, Tensor]:
    """Every quantity of `KINDS` by its definition."""
    alpha, sigma = path.alpha(t), path.sigma(t)
    return {
        "x": x, "eps": eps, "score": -eps / sigma, "v_sh": alpha * eps - sigma * x,
        "v": path.alpha_slope(t) * x + path.sigma_slope(t) * eps,
    }  # fmt: skip


def slope(function: object, t: Tensor) -> Tensor:
    leaf = t.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf).sum(), leaf)  # type: ignore[operator]
    return gradient


@each_path
def test_slopes_are_derivatives(path: Path) -> None:
    t = times()
    torch.testing.assert_close(path.half_variance_slope(t), slope(lambda t: path.sigma(t).square() / 2, t))
    tight = {"rtol": 1e-10, "atol": 1e-10}
    constant = isinstance(path, VEPath)
    expected = t * 0 if constant else slope(path.alpha, t)
    torch.testing.assert_close(path.alpha_slope(t), expected, **tight)
    torch.testing.assert_close(path.sigma_slope(t), slope(path.sigma, t), **tight)


@each_path
def test_the_sde_has_the_marginals_of_the_path(path: Path) -> None:
    """Along noise time s: d alpha / ds = f alpha and d sigma^2 / ds = 2 f sigma^2 + g^2."""
    t = times()
    f, g, sigma = path.drift(t), path.diffusion(t), path.sigma(t)
    torch.testing.assert_close(-path.alpha_slope(t), f * path.alpha(t), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(-2 * sigma * path.sigma_slope(t), 2 * f * sigma**2 + g**2, rtol=1e-9, atol=1e-9)


@each_path
def test_log_snr_and_its_inverse(path: Path) -> None:
    t = times()
    ratio = (path.alpha(t) / path.sigma(t)).square()
    torch.testing.assert_close(path.snr(t), ratio, rtol=1e-9, atol=0)
    torch.testing.assert_close(path.log_snr(t), ratio.log(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(path.time_of(path.log_snr(t)), t, rtol=1e-9, atol=1e-9)
    assert bool((path.log_snr(t.sort(dim=0).values).diff(dim=0) > 0).all())


def test_closed_forms() -> None:
    t = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    assert LinearPath(0.1).sigma(t).tolist() == pytest.approx([1.0, 0.775, 0.1])
    assert LinearPath().drift(t[1:]).tolist() == pytest.approx([-4.0, -1.0])
    assert LinearPath().diffusion(t[1:2]).item() == pytest.approx(math.sqrt(2 * 0.75 / 0.25))
    cosine = CosinePath(shift=2 * math.log(64 / 256))
    ends = cosine.log_snr(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    assert ends.tolist() == pytest.approx([-15 + cosine.shift, cosine.shift, 15 + cosine.shift])
    assert (cosine.alpha(t).square() + cosine.sigma(t).square()).tolist() == pytest.approx([1.0] * 3)
    low, high = (math.atan(math.exp(-end / 2)) for end in (15, -15))  # Hoogeboom et al. 2023: -2 log tan, linear inside
    assert CosinePath().log_snr(t[1]).item() == pytest.approx(-2 * math.log(math.tan(low + 0.75 * (high - low))))
    vp = LinearBetaPath(0.1, 20.0)
    assert vp.alpha(t[:1]).item() == pytest.approx(math.exp(-(0.1 + 20) / 4))
    assert vp.beta(t).tolist() == pytest.approx([20.0, 0.1 + 0.75 * 19.9, 0.1])
    assert [VEPath(0.02, 30).sigma(t[i]).item() for i in (0, 2)] == pytest.approx([30, 0.02])
    assert ScaledNoise(LinearPath(), 2.0).sigma(t).tolist() == pytest.approx([2.0, 1.5, 0.0])


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_ddpm_tables_equal_diffusers(schedule: str) -> None:
    scheduler = DDPMScheduler(beta_schedule=schedule)
    path = DDPMPath(scheduler.betas.double())
    k = torch.arange(1, 1001, dtype=torch.float64)
    torch.testing.assert_close(
        path.alpha(1 - k / 1000).square().float(), scheduler.alphas_cumprod, rtol=2e-5, atol=1e-9
    )
    if schedule == "linear":
        torch.testing.assert_close(PATHS["ddpm"]().alpha(1 - k / 1000), path.alpha(1 - k / 1000), rtol=1e-5, atol=0)


def test_a_step_of_the_table_has_its_own_rate() -> None:
    """The rate at step k follows from beta_k in single and double precision, however 1 - k / K is rounded."""
    table = torch.tensor([0.1, 0.3, 0.2, 0.5] * 25, dtype=torch.float64)
    path, k = DDPMPath(table), torch.arange(1, 101)
    for dtype in (torch.float32, torch.float64):
        rate = path.beta(1 - k.to(dtype) / 100)
        torch.testing.assert_close(rate.double(), -torch.log1p(-table) * 100, rtol=1e-6, atol=0)


def test_a_table_is_constant_in_rate_between_its_steps() -> None:
    """Half a step multiplies alpha^2 by the square root of 1 - beta; the first and last rates extend to the ends."""
    path = DDPMPath([0.1, 0.3, 0.2, 0.5, 0.4])
    middle = path.alpha(torch.tensor(0.7, dtype=torch.float64)).item()
    assert middle == pytest.approx((0.9 * 0.7**0.5) ** 0.5, rel=1e-12)
    ends = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert path.beta(ends).tolist() == pytest.approx([-5 * math.log(0.9), -5 * math.log(0.6)], rel=1e-12)
    assert path.drift(ends).tolist() == pytest.approx([2.5 * math.log(0.9), 2.5 * math.log(0.6)], rel=1e-12)
    assert DDPMPath().steps == 1000


def test_paths_equal_azula() -> None:
    """azula's time runs from data to noise, so it is 1 - t here."""
    t = times()
    theirs = azula.noise.VESchedule(0.01, 50.0)
    torch.testing.assert_close(VEPath().sigma(t), theirs(1 - t)[1], rtol=1e-9, atol=0)
    alpha, sigma = azula.noise.RectifiedSchedule(0.0, 0.03)(1 - t)
    torch.testing.assert_close(LinearPath(0.03).alpha(t), alpha, rtol=1e-9, atol=0)
    torch.testing.assert_close(LinearPath(0.03).sigma(t), sigma, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("source", "target"), itertools.product(KINDS, KINDS))
@each_path
def test_conversions_recover_every_quantity(path: Path, source: str, target: str) -> None:
    x, eps, t = draws()
    known = quantities(path, x, eps, t)
    result = path.convert(source, target, known[source], path.mix(x, eps, t), t, clip=0.0)
    torch.testing.assert_close(result, known[target], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(path.target(target, x, eps, t), known[target], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [0.0, 1e-6, 1 - 1e-6, 1.0])
@each_path
def test_conversions_stay_finite_at_the_ends(path: Path, kind: str, t: float) -> None:
    x, eps, _ = draws()
    time = torch.tensor(t, dtype=torch.float64)
    if kind == "v" and t in path.singular.get("v", ()):
        return
    known = path.target(kind, x, eps, time, clip=1e-3)
    for target in ("x", "eps", "score", "v_sh"):
        assert path.convert(kind, target, known, path.mix(x, eps, time), time, 1e-3).isfinite().all()


@pytest.mark.parametrize(("prediction", "space"), itertools.product(KINDS, KINDS))
def test_loss_is_the_error_after_conversion(prediction: str, space: str) -> None:
    """For every pair, `FlowLoss` equals converting output and target and comparing them in the loss space."""
    x, eps, t = draws()
    output = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    for path in (LinearPath(), CosinePath()):
        z = path.mix(x, eps, t)
        a = path.convert(prediction, space, output, z, t, 0.05)
        b = path.convert(prediction, space, path.target(prediction, x, eps, t, 0.05), z, t, 0.05)
        loss = FlowLoss(path, prediction, space, 0.05)(output, x, eps, t.squeeze(1))
        torch.testing.assert_close(loss, (a - b).square().mean(-1), rtol=1e-9, atol=1e-12)


def test_x_prediction_with_v_loss_is_jits() -> None:
    """v = (x - z) / max(1 - t, 0.05) for prediction and target, at a time at which the clip acts."""
    x, eps, _ = draws()
    t = torch.full((len(x),), 0.99, dtype=x.dtype)
    z = 0.99 * x + 0.01 * eps
    output = x + 0.3
    expected = ((output - z) / 0.05 - (x - z) / 0.05).square().mean(-1)
    torch.testing.assert_close(FlowLoss(LinearPath(), "x", "v", 0.05)(output, x, eps, t), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("clip", [0.05, 0.2])
@pytest.mark.parametrize(("prediction", "space"), itertools.product(KINDS, KINDS))
@pytest.mark.parametrize("path", [LinearPath(), ScaledNoise(LinearPath(), 2.0)], ids=["linear", "scaled"])
def test_clipping_keeps_the_minimiser(path: Path, prediction: str, space: str, clip: float) -> None:
    """Near both ends the loss of the exact quantity is zero, and the loss of an output that is off by 1 is finite."""
    x, eps, _ = draws()
    for t in (0.0, 0.01, 0.99, 1.0):
        time = torch.full((len(x), 1), t, dtype=x.dtype)
        exact = quantities(path, x, eps, time)
        # Near the data the target of the score uses sigma of at least the clip, as the conversion does.
        scale = path.scale if isinstance(path, ScaledNoise) else 1.0
        exact["score"] = -eps / (scale * max(1 - t, clip))
        loss = FlowLoss(path, prediction, space, clip)
        assert loss(exact[prediction], x, eps, time.squeeze(1)).abs().max() < 1e-20
        assert loss(exact[prediction] + 1, x, eps, time.squeeze(1)).isfinite().all()


def test_the_target_of_the_score_converts_to_the_noise() -> None:
    x, eps, _ = draws()
    t, path = torch.tensor(0.98, dtype=x.dtype), LinearPath()
    target = path.target("score", x, eps, t, 0.05)
    torch.testing.assert_close(path.convert("score", "eps", target, path.mix(x, eps, t), t, 0.05), eps)


def test_a_clip_means_the_same_at_every_noise_scale() -> None:
    """With JiT's max(1 - t, 0.05), an error of 0.3 in x at t = 0.99 has the loss (0.3 / 0.05)^2 at every scale."""
    x, eps, _ = draws()
    t = torch.full((len(x),), 0.99, dtype=x.dtype)
    for path in (LinearPath(), ScaledNoise(LinearPath(), 2.0), ScaledNoise(LinearPath(), 0.125)):
        loss = FlowLoss(path, "x", "v", 0.05)(x + 0.3, x, eps, t)
        torch.testing.assert_close(loss, torch.full_like(loss, 36.0))


def test_weights_by_their_definitions() -> None:
    x, eps, t = draws()
    flat, path = t.squeeze(1), CosinePath()
    output = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    ratio = (path.alpha(flat) / path.sigma(flat)).square()

    def loss(space: str, weight: losses.Weight | None = None) -> Tensor:
        return FlowLoss(path, "x", space, 1e-9, weight)(output, x, eps, flat)

    # The x loss weighted by SNR equals the eps loss; so does the score-matching loss weighted by sigma^2.
    torch.testing.assert_close(loss("x", losses.snr), loss("eps"), rtol=1e-8, atol=0)
    torch.testing.assert_close(loss("score", losses.sigma_squared), loss("eps"), rtol=1e-8, atol=0)
    torch.testing.assert_close(loss("x", losses.min_snr(5)), ratio.clamp(max=5) * loss("x"), rtol=1e-8, atol=0)
    expected = torch.sigmoid(-3 - ratio.log()) * loss("eps")
    torch.testing.assert_close(loss("eps", losses.sigmoid(-3)), expected, rtol=1e-8, atol=0)
    density = stats.norm(-0.8, 0.8).pdf(torch.logit(flat).numpy()) / (flat * (1 - flat)).numpy()
    torch.testing.assert_close(losses.logit_normal(-0.8, 0.8)(path, flat), torch.from_numpy(density), rtol=1e-8, atol=0)
    # The weight is a density, so its mean under uniform t is 1.
    fine = (torch.arange(100000, dtype=torch.float64) + 0.5) / 100000
    assert losses.logit_normal()(path, fine).mean().item() == pytest.approx(1, abs=1e-4)
    assert set(WEIGHTS) == {"snr", "min_snr", "sigmoid", "logit_normal", "sigma_squared"}


def test_loss_floor_of_gaussian_data() -> None:
    """With the exact conditional mean the v loss has mean (pi / 2) sqrt(variance) at uniform t."""
    g = torch.Generator().manual_seed(3)
    variance = torch.tensor([0.25, 1.0, 4.0], dtype=torch.float64)
    n = 100000
    t = ((torch.arange(n, dtype=torch.float64) + 0.5) / n).unsqueeze(1)
    x = torch.randn(n, 3, dtype=torch.float64, generator=g) * variance.sqrt()
    eps = torch.randn(n, 3, dtype=torch.float64, generator=g)
    z = t * x + (1 - t) * eps
    best = z * (t * variance - (1 - t)) / (t**2 * variance + (1 - t) ** 2)
    loss = FlowLoss(LinearPath(), "v", "v", 0.0)(best, x, eps, t.squeeze(1)).mean().item()
    assert loss == pytest.approx(math.pi / 2 * variance.sqrt().mean().item(), rel=0.01)


def test_times_have_their_distribution() -> None:
    u = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    logit = torch.logit(TIMES["logit_normal"](u, -0.8, 0.8)).numpy()
    assert stats.kstest(logit, stats.norm(-0.8, 0.8).cdf).statistic < 1e-3
    assert torch.equal(TIMES["uniform"](u, 5.0, 5.0), u)
    assert TIMES["constant"](u, 2.0, 9.0).unique().item() == pytest.approx(1 / (1 + math.exp(-2)))
    k = (1 - discrete(u, 8)) * 8
    assert torch.equal(k.unique(), torch.arange(1.0, 9.0, dtype=torch.float64))
    assert [(k == i).double().mean().item() for i in range(1, 9)] == pytest.approx([1 / 8] * 8)


def test_stratified_draws_fill_the_interval() -> None:
    spread = sorted(stratified(0.37, k, 10) for k in range(10))
    assert np.allclose(np.diff(spread), 0.1)
    assert 0 <= spread[0] < 0.1


def test_grids() -> None:
    assert uniform_grid(10).tolist() == [i / 10 for i in range(11)]
    assert cosine_grid(4).tolist() == pytest.approx([1 - math.cos(math.pi * i / 8) for i in range(5)])
    assert shifted(torch.tensor(0.5), 3.0).item() == pytest.approx(0.25)
    assert shifted_grid(4, 1.0).tolist() == uniform_grid(4).tolist()
    # Esser et al. 2024, eq. 23, in their noise time: s' = shift s / (1 + (shift - 1) s).
    s = 1 - uniform_grid(7)
    assert torch.allclose(1 - shifted_grid(7, 3.0), 3 * s / (1 + 2 * s))
    grid = log_snr_grid(5, CosinePath(), -6, 6)
    assert CosinePath().log_snr(grid[:-1]).tolist() == pytest.approx([-6, -3, 0, 3, 6])
    assert grid[-1] == 1


@each_path
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda path: pickle.loads(pickle.dumps(path))])
def test_copies_are_the_same_path(path: Path, copied: Callable[[Path], Path]) -> None:
    """Copies keep their values after the path was used, which caches tables, and after the original is deleted."""
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    expected = path.alpha(t), path.drift(t)
    again = copied(copied(path))
    torch.testing.assert_close((again.alpha(t), again.drift(t)), expected, rtol=0, atol=0)


@pytest.mark.broad
def test_a_copied_table_outlives_the_original() -> None:
    """A new tensor may get the address of a deleted one, so the cache of tables must be keyed by name, not by id."""
    t = torch.linspace(0.05, 0.95, 19)
    for _ in range(50):
        path = DDPMPath()
        expected = path.alpha(t)
        path.beta(t)
        second = copy.deepcopy(path)
        del path
        third = copy.deepcopy(second)
        del second
        torch.testing.assert_close(third.alpha(t), expected, rtol=0, atol=0)


@each_path
def test_mixtures_and_conversions_keep_the_type(path: Path) -> None:
    """A state in bfloat16 keeps its type, whatever the precision of the times."""
    x, eps = torch.randn(4, 3).bfloat16(), torch.randn(4, 3).bfloat16()
    t = torch.linspace(0.2, 0.8, 4).view(4, 1)
    z = path.mix(x, eps, t)
    assert z.dtype == torch.bfloat16
    assert path.convert("x", "v", x, z, t, 0.01).dtype == torch.bfloat16
    assert torch.isfinite(path.alpha(torch.zeros(1, dtype=torch.bfloat16))).all()


@pytest.mark.broad
def test_conversions_and_losses_compile_without_graph_breaks() -> None:
    """The checks that read values are skipped while compiling."""
    path, x, t = LinearPath(), torch.randn(4, 3), torch.full((4,), 0.5)

    def step(output: Tensor) -> Tensor:
        z = path.mix(x, output, t.view(4, 1))
        return FlowLoss(path, "x", "v", 0.05)(output, x, z, t)

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), step(x))


x_1 = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LinearPath().convert("u", "x", x_1, x_1, torch.tensor(0.5), 0.1), "unknown quantity 'u'"),
        (lambda: LinearPath().convert("x", "v", x_1, x_1, torch.tensor(1.5), 0.1), r"\[0, 1\]"),
        (lambda: LinearPath().convert("x", "v", x_1, x_1, torch.tensor(float("nan")), 0.1), r"\[0, 1\]"),
        (lambda: LinearPath().convert("x", "v", x_1, x_1, torch.full((4,), 0.5), 0.1), "one axis per axis"),
        (lambda: LinearPath().mix(x_1, x_1, torch.full((5, 1), 0.5)), "one axis per axis"),
        (lambda: LinearPath().convert("x", "v", x_1[:2], x_1, torch.tensor(0.5), 0.1), "shapes differ"),
        (lambda: LinearPath().mix(x_1, x_1[:1], torch.tensor(0.5)), "shapes differ"),
        (lambda: FlowLoss(LinearPath(), "v", "v", 0.1)(x_1, x_1, x_1, torch.zeros(3)), "one t for each vector"),
        (lambda: LinearBetaPath().convert("v", "x", x_1, x_1, torch.tensor(1.0), 0.1), "diverges at t = 1"),
        (lambda: losses.snr(LinearPath(), torch.tensor([1.0])), "score of LinearPath diverges"),
        (lambda: LinearPath().convert("eps", "score", x_1, x_1, torch.tensor(1.0), 0.0), "zero at t = 1"),
        (lambda: LinearPath().convert("x", "v", x_1, x_1, torch.tensor(1.0), 0.0), "zero at t = 1"),
        (lambda: LinearPath().convert("eps", "x", x_1, x_1, torch.tensor(0.0), 0.0), "zero at t = 0"),
        (lambda: LinearPath().drift(torch.tensor(0.0)), "drift of LinearPath diverges"),
        (lambda: LinearBetaPath().target("v", x_1, x_1, torch.tensor(1.0)), "v of LinearBetaPath diverges"),
        (lambda: LinearPath().mix(x_1, x_1, torch.tensor(-0.1)), r"\[0, 1\]"),
        (lambda: LinearPath(-0.5), "sigma_min must lie"),
        (lambda: uniform_grid(2.5), "whole number"),  # type: ignore[arg-type]
        (lambda: CosinePath(5, -5), "must be below"),
        (lambda: LinearBetaPath(3, 2), "beta_min < beta_max"),
        (lambda: DDPMPath([0.5, 1.5]), "between 0 and 1"),
        (lambda: DDPMPath([]), "between 0 and 1"),
        (lambda: VEPath(2, 1), "sigma_min < sigma_max"),
        (lambda: ScaledNoise(LinearPath(), 0), "must be positive"),
        (lambda: uniform_grid(0), "at least one step"),
        (lambda: shifted(torch.tensor(0.5), -1), "must be positive"),
        (lambda: log_snr_grid(5, CosinePath(), -40, 6), "does not reach"),
        (lambda: log_snr_grid(5, CosinePath(), 6, -6), "must rise"),
        (lambda: log_snr_grid(5, CosinePath(), -math.inf, 6), "must rise"),
        (lambda: LinearPath().drift(torch.tensor(1.5)), r"\[0, 1\]"),
        (lambda: LinearPath().target("v", x_1, x_1, torch.tensor(1.5)), r"\[0, 1\]"),
        (lambda: LinearPath().target("v", x_1, x_1[:1], torch.tensor(0.5)), "shapes differ"),
        (lambda: LinearPath().target("score", x_1, x_1, torch.tensor(1.0)), "zero at t = 1"),
        (
            lambda: LinearPath().convert("x", "v", x_1, x_1, torch.tensor(0.5), math.nan),
            "clip is the smallest denominator",
        ),
        (lambda: LinearPath().diffusion(torch.tensor(0.0)), "begin a little later"),
        (lambda: shifted(torch.tensor(2.0), 3.0), r"\[0, 1\]"),
        (lambda: shifted(torch.tensor(0.5), math.nan), "must be positive"),
        (lambda: discrete(torch.tensor(0.5), 0), "at least one"),
        (lambda: CosinePath(math.nan, 15), "must be below"),
        (lambda: CosinePath(shift=math.nan), "must be a number"),
        (lambda: VEPath(0.01, math.inf), "sigma_min < sigma_max"),
        (lambda: LinearBetaPath(0.1, math.inf), "beta_min < beta_max"),
        (lambda: ScaledNoise(LinearPath(), math.inf), "must be positive"),
        (lambda: losses.min_snr(-5), "must be positive"),
        (lambda: losses.logit_normal(0, 0), "must be positive"),
        (
            lambda: FlowLoss(LinearPath(), "x", "x", 0.1, lambda p, t: t.flatten())(x_1, x_1, x_1, x_1[:, 0]),
            "one factor per t",
        ),
    ],
)
def test_bad_input_is_named(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
