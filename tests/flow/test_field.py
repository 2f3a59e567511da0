"""Exact fields, guidance, encoding and likelihood against closed forms, scipy and autograd, in double precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from mmgen.flow.field import Field, FiniteSet, GaussianMixture
from mmgen.flow.guide import Guidance, classifier, classifier_free
from mmgen.flow.likelihood import Ode, bits_per_dim, slerp
from mmgen.flow.path import KINDS, Path
from mmgen.flow.schedule import PATHS, CosinePath, LinearBetaPath, LinearPath
from mmgen.flow.solvers import runge_kutta, solve
from mmgen.flow.time import uniform_grid
from mmgen.lab.data import MEANS

WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
STDS = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
each_path = pytest.mark.parametrize("path", [make() for make in PATHS.values()], ids=PATHS)


def points(path: Path, count: int = 40) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(4)
    t = torch.rand(count, 1, dtype=torch.float64, generator=g) * 0.9 + 0.05
    x = torch.randn(count, 2, dtype=torch.float64, generator=g)
    return path.mix(x, torch.randn(count, 2, dtype=torch.float64, generator=g), t), t


@each_path
def test_log_prob_equals_scipy(path: Path) -> None:
    z, t = points(path)
    data = GaussianMixture(MEANS, STDS, WEIGHTS, path)
    for i in range(0, len(z), 7):
        alpha, sigma = float(path.alpha(t[i])), float(path.sigma(t[i]))
        density = sum(
            float(w)
            * stats.multivariate_normal(alpha * m.numpy(), (alpha * float(s)) ** 2 + sigma**2).pdf(z[i].numpy())
            for w, m, s in zip(WEIGHTS, MEANS, STDS, strict=True)
        )
        result = float(data.log_prob(z[i : i + 1], t[i : i + 1]))
        assert result == pytest.approx(math.log(density), rel=1e-9, abs=1e-9)


@each_path
def test_score_is_the_gradient_of_log_prob_and_estimates_convert(path: Path) -> None:
    z, t = points(path)
    data = GaussianMixture(MEANS, STDS, WEIGHTS, path)
    leaf = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(data.log_prob(leaf, t).sum(), leaf)
    torch.testing.assert_close(data.score(z, t), gradient, rtol=1e-8, atol=1e-8)
    exact = {"x": data.denoised, "v": data.velocity, "score": data.score}
    for source, function in exact.items():
        for kind in KINDS:
            implied = Field(path, function, source, clip=0.0)(kind)(z, t)
            if kind in exact:
                torch.testing.assert_close(implied, exact[kind](z, t), rtol=1e-6, atol=1e-6)
            else:
                again = path.convert(kind, source, implied, z, t, 0.0)
                torch.testing.assert_close(again, function(z, t), rtol=1e-6, atol=1e-6)


def test_velocity_is_finite_and_continuous_at_both_ends() -> None:
    data = GaussianMixture(MEANS, STDS, WEIGHTS)
    z, _ = points(LinearPath())
    for t in (0.0, 1.0):
        time = torch.tensor(t, dtype=torch.float64)
        near = torch.tensor(abs(t - 1e-9), dtype=torch.float64)
        torch.testing.assert_close(data.velocity(z, time), data.velocity(z, near), rtol=1e-5, atol=1e-5)
    mean = WEIGHTS @ MEANS
    torch.testing.assert_close(data.velocity(z, torch.zeros((), dtype=torch.float64)), mean - z)


def test_finite_set_memorises() -> None:
    """v = (weighted mean - z) / (1 - t), weights softmax(-|z - t x|^2 / (2 (1 - t)^2)); samples end on the set."""
    x = torch.randn(20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    data = FiniteSet(x)
    z, _ = points(LinearPath())
    t = torch.tensor(0.7, dtype=torch.float64)
    weights = torch.softmax(-(z[:, None] - 0.7 * x).square().sum(-1) / (2 * 0.3**2), 1)
    torch.testing.assert_close(data.velocity(z, t), (weights @ x - z) / 0.3, rtol=1e-9, atol=1e-9)
    end = solve(runge_kutta(z, uniform_grid(200), scheme="euler"), data.velocity)
    assert float(torch.cdist(end, x).min(1).values.max()) < 1e-2


def test_mixture_samples_have_its_moments() -> None:
    data = GaussianMixture(MEANS, STDS, WEIGHTS)
    x = data.sample(20000, torch.Generator().manual_seed(1))
    assert torch.allclose(x.mean(0), WEIGHTS @ MEANS, atol=0.03)
    second = (WEIGHTS[:, None] * (STDS[:, None] ** 2 + MEANS**2)).sum(0)
    assert torch.allclose(x.square().mean(0), second, atol=0.06)


def test_clipping_the_clean_estimate() -> None:
    path = LinearPath()
    z = torch.full((3, 2), 0.5, dtype=torch.float64)
    t = torch.tensor(0.5, dtype=torch.float64)
    wild = Field(path, lambda z, t: torch.full_like(z, 9.0), "x", clean_range=(-1.0, 1.0))
    assert torch.equal(wild("x")(z, t), torch.ones_like(z))
    assert torch.allclose(wild("v")(z, t), (1 - z) / 0.5)


# --- guidance ----------------------------------------------------------------------------------------------


def test_guidance_scales_and_interval() -> None:
    c, u = torch.tensor([[2.0]]), torch.tensor([[1.0]])
    for weight, expected in ((0.0, 1.0), (1.0, 2.0), (3.0, 4.0)):
        assert classifier_free(c, u, torch.tensor(0.5), Guidance(weight)).item() == expected
    assert classifier_free(c, u, torch.tensor(0.05), Guidance(3.0, (0.1, 1.0))).item() == 2.0
    per_sample = classifier_free(
        c.expand(2, 1), u.expand(2, 1), torch.tensor([[0.05], [0.5]]), Guidance(3.0, (0.1, 1.0))
    )
    assert per_sample.tolist() == [[2.0], [4.0]]
    falling = classifier_free(c, u, torch.tensor(0.25), Guidance(lambda t: 1 + 4 * (1 - t)))
    assert falling.item() == 5.0


def test_rescaled_and_renormed_guidance() -> None:
    g = torch.Generator().manual_seed(0)
    c, u = torch.randn(2, 4, 5, 6, generator=g)
    t = torch.tensor(0.5)
    plain = classifier_free(c, u, t, Guidance(3.0))
    full = classifier_free(c, u, t, Guidance(3.0, rescale=1.0))
    torch.testing.assert_close(full.std((1, 2)), c.std((1, 2)))
    half = classifier_free(c, u, t, Guidance(3.0, rescale=0.5))
    torch.testing.assert_close(half, (plain + full) / 2)
    short = classifier_free(c, u, t, Guidance(3.0, renorm=True))
    assert torch.all(short.flatten(1).norm(dim=1) <= c.flatten(1).norm(dim=1) * 1.0001)
    assert torch.equal(
        classifier_free(c, 2 * c, t, Guidance(1.5, renorm=True)), classifier_free(c, 2 * c, t, Guidance(1.5))
    )


@pytest.mark.broad
def test_classifier_guidance_moves_mass_monotonically() -> None:
    """1-D mixture, exact scores: E p(y | x) of the samples rises with the weight and is 0.5 without guidance."""
    means = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    data = GaussianMixture(means, 0.7)

    def log_likelihood(z: Tensor, t: Tensor) -> Tensor:
        return torch.log_softmax(data.log_joint(z, t), 1)[:, 0]

    grid = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    z = torch.special.ndtri(grid).unsqueeze(1)
    result = []
    for weight in (0.0, 0.5, 1.0, 2.0):
        field = classifier(data.path, data.velocity, log_likelihood, weight)
        end = solve(runge_kutta(z, uniform_grid(100), scheme="heun"), field)
        result.append(float(data.responsibilities(end, torch.ones((), dtype=torch.float64))[:, 0].mean()))
    assert result[0] == pytest.approx(0.5, abs=1e-6)
    assert result == sorted(result)
    # With weight 1 the guided field equals the conditional field.
    one = GaussianMixture(means[:1], 0.7)
    t = torch.tensor(0.4, dtype=torch.float64)
    guided = classifier(data.path, data.velocity, log_likelihood, 1.0)(z, t)
    torch.testing.assert_close(guided, one.velocity(z, t), rtol=1e-9, atol=1e-9)
    cosine = GaussianMixture(means, 0.7, path=CosinePath())
    conditional = GaussianMixture(means[:1], 0.7, path=CosinePath())
    likelihood: Callable[[Tensor, Tensor], Tensor] = lambda z, t: torch.log_softmax(cosine.log_joint(z, t), 1)[:, 0]  # noqa: E731
    guided = classifier(cosine.path, cosine.velocity, likelihood, 1.0)(z, t)
    torch.testing.assert_close(guided, conditional.velocity(z, t), rtol=1e-8, atol=1e-8)


def test_classifier_guidance_starts_at_pure_noise_and_in_inference_mode() -> None:
    data = GaussianMixture(MEANS, STDS, WEIGHTS)

    def log_likelihood(z: Tensor, t: Tensor) -> Tensor:
        return torch.log_softmax(data.log_joint(z, t), 1)[:, 0]

    with torch.inference_mode():
        field = classifier(data.path, data.velocity, log_likelihood, 2.0)
        z = torch.randn(20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        end = solve(runge_kutta(z, uniform_grid(20)), field)
    assert end.isfinite().all()


# --- along the ODE -----------------------------------------------------------------------------------------


def test_encode_is_the_inverse_of_decode() -> None:
    data = GaussianMixture(MEANS, STDS, WEIGHTS)
    x = data.sample(30, torch.Generator().manual_seed(1))
    ode = Ode(data.velocity, uniform_grid(200))
    torch.testing.assert_close(ode.decode(ode.encode(x)), x, rtol=1e-5, atol=1e-5)
    # In one dimension the ODE gives the monotone map between the two distributions.
    one = GaussianMixture(torch.tensor([[0.3]], dtype=torch.float64), 0.5)
    x = torch.tensor([[0.3], [0.8], [-0.7]], dtype=torch.float64)
    expected = (x - 0.3) / 0.5
    torch.testing.assert_close(Ode(one.velocity, uniform_grid(200)).encode(x), expected, rtol=1e-6, atol=1e-6)


def test_slerp_keeps_the_norm_and_the_ends() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.nn.functional.normalize(torch.randn(2, 6, 9, dtype=torch.float64, generator=g), dim=2)
    for share in (0.0, 0.3, 1.0):
        torch.testing.assert_close(slerp(a, b, share).norm(dim=1), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    torch.testing.assert_close(slerp(a, a, 0.4), a)


def test_interpolation_starts_and_ends_on_the_data() -> None:
    data = GaussianMixture(MEANS, STDS, WEIGHTS)
    a, b = data.sample(8, torch.Generator().manual_seed(1)).chunk(2)
    between = Ode(data.velocity, uniform_grid(100)).interpolate(a, b, torch.linspace(0, 1, 5))
    assert between.shape == (5, 4, 2)
    torch.testing.assert_close(between[0], a, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(between[-1], b, rtol=1e-4, atol=1e-4)


def gaussian(std: float = 0.5) -> GaussianMixture:
    return GaussianMixture(torch.zeros(1, 1, dtype=torch.float64), std)


def test_likelihood_of_a_gaussian() -> None:
    """log N(0.8; 0, 0.25) = -1.50579; the opposite sign of the integral gives -2.892."""
    x = torch.tensor([[0.8], [0.0], [-1.3]], dtype=torch.float64)
    result = Ode(gaussian().velocity, uniform_grid(100)).log_likelihood(x)
    expected = torch.from_numpy(stats.norm(0, 0.5).logpdf(x.squeeze(1).numpy()))
    torch.testing.assert_close(result.value, expected, rtol=0, atol=1e-6)
    assert result.value[0].item() == pytest.approx(-1.50579, abs=1e-5)
    assert result.standard_error.abs().max() == 0


def test_a_wrong_sign_changes_the_likelihood() -> None:
    """With the opposite sign of the integral the value is -2.892, far outside the tolerance of the test above."""
    x = torch.tensor([[0.8]], dtype=torch.float64)
    result = Ode(gaussian().velocity, uniform_grid(100)).log_likelihood(x)
    base = stats.norm(0, 1).logpdf(result.z.item())
    assert 2 * base - result.value.item() == pytest.approx(-2.892, abs=1e-3)


@pytest.mark.broad
@pytest.mark.parametrize("path", [LinearPath(), CosinePath()], ids=["linear", "cosine"])
def test_likelihood_of_a_mixture(path: Path) -> None:
    data = GaussianMixture(MEANS, STDS, WEIGHTS, path)
    x = data.sample(12, torch.Generator().manual_seed(1))
    one = torch.ones((), dtype=torch.float64)
    result = Ode(data.velocity, uniform_grid(400)).log_likelihood(x)
    # The cosine path begins with almost pure noise and ends with almost clean data; the tolerance allows for both.
    torch.testing.assert_close(result.value, data.log_prob(x, one), rtol=0, atol=5e-3)


@pytest.mark.broad
def test_likelihood_on_a_variance_preserving_path() -> None:
    """The velocity of a smooth density is finite at t = 1 although sigma' is not."""
    data = GaussianMixture(MEANS, STDS, WEIGHTS, LinearBetaPath())
    x = data.sample(6, torch.Generator().manual_seed(1))
    result = Ode(data.velocity, uniform_grid(400)).log_likelihood(x).value
    torch.testing.assert_close(result, data.log_prob(x, torch.ones((), dtype=torch.float64)), rtol=0, atol=2e-2)
    with pytest.raises(ValueError, match="v of LinearBetaPath diverges"):
        Ode(data.velocity, uniform_grid(10), path=data.path).log_likelihood(x)


def test_likelihood_of_a_constant_field() -> None:
    x = torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    result = Ode(lambda z, t: 1 + 0 * z, uniform_grid(4)).log_likelihood(x).value
    assert result.item() == pytest.approx(float(stats.norm(1, 1).logpdf(x.numpy()).sum()))


@pytest.mark.broad
def test_hutchinson_is_within_its_error() -> None:
    covariance = torch.tensor([[1.0, 0.6, 0.0], [0.6, 0.8, 0.2], [0.0, 0.2, 0.5]], dtype=torch.float64)
    eye = torch.eye(3, dtype=torch.float64)

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        """Exact for N(0, S): v = (t S - (1 - t)) (t^2 S + (1 - t)^2)^-1 z."""
        matrix = (t * covariance - (1 - t) * eye) @ torch.linalg.inv(t**2 * covariance + (1 - t) ** 2 * eye)
        return z @ matrix.T

    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = torch.from_numpy(stats.multivariate_normal(None, covariance.numpy()).logpdf(x.numpy()))
    exact = Ode(velocity, uniform_grid(100)).log_likelihood(x)
    torch.testing.assert_close(exact.value, expected, rtol=0, atol=1e-6)
    g = torch.Generator().manual_seed(3)
    guess = Ode(velocity, uniform_grid(100)).log_likelihood(x, trace="hutchinson", probes=64, generator=g)
    assert torch.all((guess.value - expected).abs() < 3 * guess.standard_error)
    assert torch.all(guess.standard_error > 0)
    assert torch.all(guess.standard_error < 0.2)


def test_likelihood_in_inference_mode() -> None:
    """The divergence is computed in inference mode too, and the result carries no gradients."""
    x = torch.tensor([[0.8]], dtype=torch.float64)
    data = GaussianMixture(torch.zeros(1, 1, dtype=torch.float64), 0.5)
    with torch.inference_mode():
        result = Ode(data.velocity, uniform_grid(100)).log_likelihood(x).value
    assert result.item() == pytest.approx(-1.50579, abs=1e-5)
    assert not Ode(data.velocity, uniform_grid(10)).log_likelihood(x.requires_grad_()).value.requires_grad


def test_a_guidance_weight_per_sample() -> None:
    conditional, unconditional = torch.randn(3, 2), torch.randn(3, 2)
    scale, t = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor(0.5)
    per_sample = classifier_free(conditional, unconditional, t, Guidance(scale))
    for i, weight in enumerate((0.0, 1.0, 2.0)):
        one = slice(i, i + 1)
        torch.testing.assert_close(
            per_sample[one], classifier_free(conditional[one], unconditional[one], t, Guidance(weight))
        )
    torch.testing.assert_close(per_sample, classifier_free(conditional, unconditional, t, Guidance(lambda t: scale)))


def test_bits_per_dim() -> None:
    """Uniform 8-bit pixels have 8 bits per dimension: their density on [-1 - 1/255, 1 + 1/255] is 255 / 512."""
    flat = torch.full((2,), 10 * math.log(1 / (256 * 2 / 255)), dtype=torch.float64)
    assert bits_per_dim(flat, 10).tolist() == pytest.approx([8.0, 8.0])


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Ode(lambda z, t: z, uniform_grid(2)).log_likelihood(X, trace="guess"), "unknown trace 'guess'"),
        (lambda: Ode(lambda z, t: z, uniform_grid(2)).log_likelihood(X, trace="hutchinson", probes=1), "two probes"),
        (lambda: Ode(lambda z, t: z, uniform_grid(2)).log_likelihood(X[0]), r"must be \[R, D\]"),
        (lambda: GaussianMixture(X, 0.1, torch.ones(3)), "K weights and stds"),
        (lambda: GaussianMixture(X, -0.1), "none negative"),
        (lambda: GaussianMixture(X, math.nan), "none negative"),
        (lambda: GaussianMixture(X[:0], 0.1), "above zero"),
        (lambda: GaussianMixture(X, 0.1, torch.zeros(2)), "above zero"),
        (lambda: FiniteSet(X).velocity(X, torch.tensor(1.0)), "no density where sigma is zero"),
        (lambda: Ode(FiniteSet(X).velocity, uniform_grid(3)).encode(X), "no density where sigma is zero"),
        (lambda: slerp(X, X[:1], 0.5), "shapes differ"),
        (lambda: slerp(torch.ones(2, 2), torch.ones(2, 2), torch.tensor([0.1, 0.9])), "one axis per axis"),
        (lambda: Ode(lambda z, t: z, uniform_grid(3).flip(0)), "must rise"),
        (lambda: Ode(lambda z, t: z, 0.1 + 0.9 * uniform_grid(3)).log_likelihood(X), "begin at 0"),
        (lambda: Ode(lambda z, t: z, uniform_grid(3)).log_likelihood(X, noise_std=0.0), "must be positive"),
        (lambda: Ode(torch.no_grad()(lambda z, t: -z), uniform_grid(3)).log_likelihood(X), "no divergence"),
        (lambda: Ode(lambda z, t: z, uniform_grid(3)).interpolate(X, X, torch.zeros(0)), "shares is empty"),
        (lambda: bits_per_dim(X, 3, 0.0), "must be positive"),
        (lambda: Field(LinearPath(), lambda z, t: z, "speed"), "unknown prediction 'speed'"),
        (lambda: classifier_free(X, X, torch.tensor(0.5), Guidance(2.0, (0.9, 0.1))), "must rise inside"),
        (lambda: classifier_free(X, X, torch.tensor(1.5), Guidance(2.0)), r"\[0, 1\]"),
        (lambda: classifier_free(X, X, torch.tensor(0.5), Guidance(2.0, rescale=5.0)), "share between 0 and 1"),
        (lambda: classifier_free(X, X, torch.tensor(0.5), Guidance(lambda t: torch.ones(3))), "the shape of a time"),
    ],
)
def test_bad_input_is_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
