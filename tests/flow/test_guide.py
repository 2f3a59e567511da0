"""Guidance by several contexts and by gradients on the clean estimate, against diffusers and exact conditional fields."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance
from torch import Tensor

from mmgen.flow import (
    KINDS,
    SOLVERS,
    ClassifierGuide,
    CosinePath,
    Field,
    GaussianMixture,
    Guidance,
    LinearBetaPath,
    LinearPath,
    Path,
    RewardGuide,
    VEPath,
    build_solver,
    classifier_free,
    combine,
    normal,
    solve,
    uniform_grid,
)

T = torch.tensor(0.4, dtype=torch.float64)
FULL, IMAGE, NONE = torch.randn(3, 4, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LANES = [FULL, IMAGE, NONE]


def by_diffusers(text: float, image: float, rescale: float = 0.0, image_rescale: float = 0.0) -> Tensor:
    """The formula of InstructPix2Pix from the guider of diffusers, one sample at a time, as its rescaling needs."""

    def guided(scale: float, conditional: Tensor, unconditional: Tensor) -> Tensor:
        guider = ClassifierFreeGuidance(guidance_scale=scale)
        guider._count_prepared = 2
        return guider.forward(conditional, unconditional).pred

    def corrected(value: Tensor, conditional: Tensor, share: float) -> Tensor:
        guider = ClassifierFreeGuidance(guidance_scale=1.0, guidance_rescale=share)
        return guider.forward(value, value).pred if not share else _rescaled(value, conditional, share)

    towards_image = corrected(guided(image, IMAGE, NONE), IMAGE, image_rescale)
    return corrected(towards_image + guided(text, FULL, IMAGE) - IMAGE, FULL, rescale)


def _rescaled(value: Tensor, conditional: Tensor, share: float) -> Tensor:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    return rescale_noise_cfg(value, conditional, share)


SCALES = [(3.0, 1.5), (1.0, 2.0), (2.0, 1.0), (0.0, 1.0), (7.5, 1.2)]


@pytest.mark.parametrize(("text", "image"), SCALES)
def test_lanes_equal_diffusers(text: float, image: float) -> None:
    torch.testing.assert_close(combine(LANES, [Guidance(text), Guidance(image)], T), by_diffusers(text, image))
    for rescale, image_rescale in ((0.7, 0.0), (0.7, 0.3), (1.0, 1.0)):
        guidance = [Guidance(text, rescale=rescale), Guidance(image, rescale=image_rescale)]
        expected = by_diffusers(text, image, rescale, image_rescale)
        torch.testing.assert_close(combine(LANES, guidance, T), expected)


def test_special_scales_of_lanes() -> None:
    def both(text: float, image: float) -> Tensor:
        return combine(LANES, [Guidance(text), Guidance(image)], T)

    close = torch.testing.assert_close
    close(both(3.0, 3.0), classifier_free(FULL, NONE, T, Guidance(3.0)))
    close(both(1.0, 1.0), FULL)
    close(both(3.0, 1.0), classifier_free(FULL, IMAGE, T, Guidance(3.0)))
    close(both(0.0, 2.0), classifier_free(IMAGE, NONE, T, Guidance(2.0)))
    close(both(0.0, 0.0), NONE)
    close(combine([FULL], [], T), FULL)
    with pytest.raises(ValueError, match="3 velocities need 2 guidances, got 1"):
        combine(LANES, [Guidance(2.0)], T)


def test_interval_and_renorm_of_each_lane() -> None:
    early, late = (0.0, 0.3), (0.5, 1.0)
    for t, text, image in ((0.2, 1.0, 2.0), (0.4, 1.0, 1.0), (0.8, 4.0, 1.0)):
        made = combine(LANES, [Guidance(4.0, late), Guidance(2.0, early)], torch.tensor(t, dtype=torch.float64))
        torch.testing.assert_close(made, combine(LANES, [Guidance(text), Guidance(image)], T))
    norm = torch.linalg.vector_norm
    made = combine(LANES, [Guidance(1.0), Guidance(9.0, renorm=True)], T)
    assert (norm(made - FULL + IMAGE, dim=(1, 2)) <= norm(IMAGE, dim=(1, 2)) * (1 + 1e-9)).all()
    made = combine(LANES, [Guidance(9.0, renorm=True), Guidance(9.0)], T)
    assert (norm(made, dim=(1, 2)) <= norm(FULL, dim=(1, 2)) * (1 + 1e-9)).all()


WRONG: dict[str, Callable[[float, float], Tensor]] = {
    "swapped lanes": lambda text, image: combine([FULL, NONE, IMAGE], [Guidance(text), Guidance(image)], T),
    "swapped scales": lambda text, image: combine(LANES, [Guidance(image), Guidance(text)], T),
    "text against nothing": lambda text, image: NONE + image * (IMAGE - NONE) + text * (FULL - NONE),
    "nested as in BAGEL": lambda text, image: NONE + image * (IMAGE + text * (FULL - IMAGE) - NONE),
    "scale smaller by one": lambda text, image: combine(LANES, [Guidance(text + 1), Guidance(image + 1)], T),
}


@pytest.mark.parametrize("name", WRONG)
def test_other_formulas_differ(name: str) -> None:
    differences = [(WRONG[name](*scales) - by_diffusers(*scales)).abs().max() for scales in SCALES]
    assert max(differences) > 0.1


# --- gradients on the clean estimate -----------------------------------------------------------------------

MEANS = torch.tensor([[2.0, 0.5], [-1.0, 1.0], [0.0, -2.0]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
CLASS = [0, 2]
PATHS: list[Path] = [LinearPath(), CosinePath(), LinearBetaPath()]
Z = torch.randn(16, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def mixture(path: Path) -> tuple[GaussianMixture, GaussianMixture, Callable[[Tensor, Tensor], Tensor]]:
    """A mixture, the exact conditional distribution of two of its components, and log p(y | z) of these."""
    data = GaussianMixture(MEANS, 0.4, WEIGHTS, path)
    conditional = GaussianMixture(MEANS[CLASS], 0.4, WEIGHTS[CLASS], path)
    return data, conditional, lambda z, t: data.responsibilities(z, t)[:, CLASS].sum(1).log()


def read(data: GaussianMixture, path: Path, kind: str, **options: object) -> Callable[[Tensor, Tensor], Tensor]:
    """The exact field of `data` as an estimate of `kind`."""
    return Field(path, data.denoised, "x", clip=1e-9, **options)(kind)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_an_exact_classifier_gives_the_exact_conditional_field(path: Path, kind: str) -> None:
    """For every quantity that a solver may request and a network may predict."""
    data, conditional, log_likelihood = mixture(path)
    exact = ClassifierGuide(log_likelihood, clip=1e-9)
    for t in (torch.tensor(0.03), torch.tensor(0.5), torch.linspace(0.1, 0.9, 16).unsqueeze(1)):
        t = t.double()
        guided, expected = read(data, path, kind, guide=exact)(Z, t), read(conditional, path, kind)(Z, t)
        torch.testing.assert_close(guided, expected, rtol=1e-7, atol=1e-7)
        predicted = Field(path, read(data, path, kind), kind, clip=1e-9, guide=exact)("v")(Z, t)
        torch.testing.assert_close(predicted, read(conditional, path, "v")(Z, t), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("solver", [name for name, kind in SOLVERS.items() if kind.from_noise])
def test_every_solver_draws_the_conditional(solver: str) -> None:
    """With equal noise, the guided field and the conditional field give the same samples."""
    path = VEPath(0.05, 8.0) if solver == "annealed_langevin" else LinearPath()
    data, conditional, log_likelihood = mixture(path)
    times = 1e-3 + (1 - 1e-3) * uniform_grid(12)

    def drawn(field: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        noise = normal(torch.Generator().manual_seed(5))
        return solve(build_solver(solver, Z, times, path, noise), field)

    kind = SOLVERS[solver].asks
    guided = drawn(read(data, path, kind, guide=ClassifierGuide(log_likelihood, clip=1e-9)))
    torch.testing.assert_close(guided, drawn(read(conditional, path, kind)), rtol=1e-6, atol=1e-6)
    assert (guided - drawn(read(data, path, kind))).abs().max() > 0.5


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_a_linear_reward_tilts_a_gaussian_exactly(path: Path) -> None:
    """N(m, s^2) times exp(w b x) is N(m + w s^2 b, s^2), at every t, and so through the network."""
    m, s, w = torch.tensor([[0.3, -0.7]], dtype=torch.float64), 0.6, 1.8
    b = torch.tensor([1.0, -2.0], dtype=torch.float64)
    data, tilted = GaussianMixture(m, s, path=path), GaussianMixture(m + w * s**2 * b, s, path=path)
    by_reward = RewardGuide(lambda x: x @ b, scale=w, data_std=s)
    through_network = ClassifierGuide(lambda z, t: data.denoised(z, t) @ b, scale=w, clip=1e-9)
    for t in (0.05, 0.4, 0.97):
        time = torch.tensor(t, dtype=torch.float64)
        for kind in KINDS:
            expected = read(tilted, path, kind)(Z, time)
            for guide in (by_reward, through_network):
                made = read(data, path, kind, guide=guide)(Z, time)
                torch.testing.assert_close(made, expected, rtol=1e-7, atol=1e-7)


class OfTheScore(ClassifierGuide):
    """The gradient is added to the clean estimate as if it were the score."""

    def shift(self, path: Path, x: Tensor, z: Tensor, t: Tensor) -> Tensor:
        return super().shift(path, x, z, t) / path.gain("score", "x", t, self.clip)


class OfTheEstimate(ClassifierGuide):
    """The classifier of noisy data sees the clean estimate."""

    def shift(self, path: Path, x: Tensor, z: Tensor, t: Tensor) -> Tensor:
        return super().shift(path, x, x, t)


@pytest.mark.parametrize("wrong", [OfTheScore, OfTheEstimate])
def test_a_wrong_gradient_is_found(wrong: type[ClassifierGuide]) -> None:
    path = LinearPath()
    data, conditional, log_likelihood = mixture(path)
    made = read(data, path, "v", guide=wrong(log_likelihood, clip=1e-9))(Z, T)
    assert (made - read(conditional, path, "v")(Z, T)).abs().max() > 1e-2


def test_the_range_applies_after_the_guide_and_inference_mode_is_no_hindrance() -> None:
    path = LinearPath()
    data, _, _ = mixture(path)
    pull = RewardGuide(lambda x: 50 * x.sum(1))
    with torch.inference_mode():
        x = read(data, path, "x", guide=pull, clean_range=(-1.0, 1.0))(Z.clone(), T)
        single = Field(path, data.denoised, "x", guide=pull)("v")(Z.float(), T)
    assert (x == 1).all()
    assert single.dtype == torch.float32
    seen: list[torch.Size] = []

    def reward(x: Tensor) -> Tensor:
        seen.append(x.shape)
        return x.flatten(1).sum(1)

    viewed = RewardGuide(reward).through(lambda x: x.view(-1, 1, 2, 1))
    torch.testing.assert_close(viewed.shift(path, Z, Z, T), RewardGuide(reward).shift(path, Z, Z, T))
    assert seen == [(16, 1, 2, 1), (16, 2)]


@pytest.mark.parametrize("function", [lambda x: x, lambda x: x.sum(), lambda x: x.detach().sum(1)])
def test_a_reward_that_is_no_number_per_sample_is_refused(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match="one differentiable number per sample"):
        RewardGuide(function).shift(LinearPath(), Z, Z, T)


def test_scales_of_guides_follow_time() -> None:
    """A scale may depend on t or on the sample, as in classifier-free guidance."""
    reward: Callable[[Tensor], Tensor] = lambda x: x.square().sum(1)  # noqa: E731
    path, scales = LinearPath(), torch.linspace(0, 2, 16, dtype=torch.float64).unsqueeze(1)
    one = RewardGuide(reward).shift(path, Z, Z, T)
    torch.testing.assert_close(RewardGuide(reward, scales).shift(path, Z, Z, T), scales * one)
    torch.testing.assert_close(RewardGuide(reward, lambda t: t).shift(path, Z, Z, T), 0.4 * one)


def test_scales_per_sample_act_on_their_lane() -> None:
    text = torch.tensor([0.5, 1.0, 3.0, 4.0], dtype=torch.float64).view(4, 1, 1)
    image = torch.tensor([2.0, 1.0, 0.0, 1.5], dtype=torch.float64).view(4, 1, 1)
    made = combine(LANES, [Guidance(text), Guidance(image)], T)
    for i in range(4):
        one = [lane[i : i + 1] for lane in LANES]
        expected = combine(one, [Guidance(float(text[i])), Guidance(float(image[i]))], T)
        torch.testing.assert_close(made[i : i + 1], expected)
