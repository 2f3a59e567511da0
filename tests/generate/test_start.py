"""Images that start from a picture, inversion, interpolation, and guides, in the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mmgen.config import ObjectiveConfig, SampleConfig
from mmgen.config_io import override
from mmgen.flow import GaussianMixture, LinearPath, RewardGuide, shifted_grid, slerp
from mmgen.generate import Decoder, Inpaint, Request
from mmgen.generate.parts import Parts
from mmgen.objective import image_flow
from mmgen.objective.image_flow import FlowSpec, ImageFlow, ImageToImage, Inversion
from tests.conftest import awake, picture, tiny
from tests.generate.test_guidance import Drawn

RNG = np.random.default_rng(8)
ONE, OTHER = picture(RNG, (6, 4)), picture(RNG, (6, 4))
SOLVERS = ["euler", "midpoint", "heun", "rk4"]


def decoder_of(tmp_path: Path, objective: dict[str, object] | None = None, **sample: object) -> Decoder:
    settings = {"steps": 10, "guidance_scale": 1.0, **sample}
    config = override(tiny(tmp_path), {"objective": objective or {}, "sample": settings})
    model, tokenizer = awake(config)
    return Decoder(model, tokenizer, config.sample)


def patches(decoder: Decoder, requests: Sequence[Request], **sample: object) -> list[Tensor]:
    """Patches of the one image of each request, with other sampling settings."""
    observer = Drawn()
    settings = decoder.sample.model_copy(update=sample)
    Decoder(decoder.model, decoder.tokenizer, settings, Parts(observer=observer)).generate(requests)
    return [observer.patches[i][0] for i in range(len(requests))]


def asked(image: Image.Image | None = ONE, **more: object) -> Request:
    return Request(["a"], "image", 3, image=image, **more)  # type: ignore[arg-type]


# --- the flow alone, with an exact field -------------------------------------------------------------------

DATA = GaussianMixture(
    torch.tensor([[1.0, -1.0, 0.5, 0.2], [-1.0, 0.3, -0.5, 1.0]], dtype=torch.float64), torch.tensor([0.5, 0.3])
)


def run(start: ImageToImage | Inversion | None, eps: Tensor, prediction: str = "v", **sample: object) -> Tensor:
    """Run `ImageFlow.draw` with the exact field of `DATA`, read as the prediction."""
    settings = ObjectiveConfig(prediction=prediction)
    solver = ImageFlow(settings)
    spec = FlowSpec(SampleConfig(**{"steps": 20, **sample}), eps.unsqueeze(1), torch.randn_like, [], 1, start=start)
    flow = solver.draw(spec)
    try:
        z, t, _ = next(flow)
        while True:
            at = t if prediction == "v" else t.clamp(max=1 - 1e-9)  # E[eps | z] has no exact value at t = 1
            v = DATA.velocity(z.squeeze(1), at).unsqueeze(1)
            z, t, _ = flow.send([solver.path_of(1).convert("v", prediction, v, z, at, 1e-9)])
    except StopIteration as stop:
        drawn: Tensor = stop.value
        return drawn.squeeze(1)


def exact_samples(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = DATA.sample(count, generator)
    return x, torch.randn(x.shape, dtype=x.dtype, generator=generator)


@pytest.mark.parametrize("prediction", ["v", "x", "eps"])
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 2)])
def test_an_inversion_and_its_drawing_return_the_picture(solver: str, order: int, prediction: str) -> None:
    """The error falls with the order of the solver (of its last step, at most 2), and latents are those of the ODE."""
    x, _ = exact_samples(50)
    errors = []
    for steps in (20, 40, 80):
        latents = run(Inversion(x.unsqueeze(1)), x * 0, prediction, steps=steps, solver=solver)
        errors.append(float((run(None, latents, prediction, steps=steps, solver=solver) - x).abs().max()))
    assert errors[-1] < (0.2 if order == 1 else 0.02)
    assert np.log2(errors[1] / errors[2]) > order - 0.35, errors


def test_the_latents_of_data_are_standard_normal() -> None:
    x, _ = exact_samples(4000)
    latents = run(Inversion(x.unsqueeze(1)), x * 0, steps=50, solver="rk4")
    assert latents.mean(0).abs().max() < 0.06
    assert (torch.cov(latents.T) - torch.eye(4)).abs().max() < 0.08


@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2m", "ancestral"])
def test_a_start_from_a_picture_keeps_the_distribution(solver: str) -> None:
    """From data, noise of any strength and the way back give data; the picture is nearer the smaller the strength."""
    x, eps = exact_samples(4000)
    near = []
    for strength in (0.2, 0.5, 0.8, 1.0):
        torch.manual_seed(0)
        made = run(ImageToImage(x.unsqueeze(1), strength), eps, steps=50, solver=solver)
        assert (made.mean(0) - x.mean(0)).abs().max() < 0.08
        assert (torch.cov(made.T) - torch.cov(x.T)).abs().max() < 0.12
        near.append(float((made - x).square().mean()))
    assert near == sorted(near)
    torch.manual_seed(0)
    everything = run(ImageToImage(x.unsqueeze(1), 1.0), eps, steps=50, solver=solver)
    torch.manual_seed(0)
    torch.testing.assert_close(everything, run(None, eps, steps=50, solver=solver), rtol=0, atol=0)


def test_the_first_state_and_time_of_a_strength_are_those_of_diffusers() -> None:
    """z = (1 - sigma) x + sigma eps at the sigma of the scheduler's grid, and as many steps as diffusers takes."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux_img2img import FluxImg2ImgPipeline

    x, eps = exact_samples(4)
    for shift, strength, steps in ((1.0, 0.5, 10), (3.0, 0.3, 10), (1.0, 0.29, 100), (2.0, 0.77, 20)):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
        pipeline = FluxImg2ImgPipeline.__new__(FluxImg2ImgPipeline)
        object.__setattr__(pipeline, "scheduler", scheduler)
        # 0.29 * 100 is 28.999999999999996, which diffusers cuts to 28.
        timesteps, _ = pipeline.get_timesteps(steps, round(strength * steps, 9) / steps, "cpu")
        config = ObjectiveConfig()
        sample = SampleConfig(steps=steps, time_shift=shift)
        spec = FlowSpec(sample, eps.unsqueeze(1), torch.randn_like, [], 1, start=ImageToImage(x.unsqueeze(1), strength))
        flow = ImageFlow(config).draw(spec)
        z, t, _ = next(flow)
        taken = 1
        try:
            while True:
                flow.send([torch.zeros_like(z)])
                taken += 1
        except StopIteration:
            pass
        if strength != 0.77:  # diffusers begins within a step: 4.6 steps are skipped, and it takes the fifth one
            assert taken == len(timesteps)
            torch.testing.assert_close(1 - t.float(), timesteps[0].float() / 1000, rtol=1e-5, atol=1e-6)
            expected = scheduler.scale_noise(x.float(), timesteps[:1], eps.float())
            torch.testing.assert_close(z.squeeze(1).float(), expected, rtol=1e-4, atol=1e-5)
        assert float(t) == float(shifted_grid(steps, shift)[steps - taken])
        assert taken == int(strength * steps + 1e-9)


# --- the decoder -------------------------------------------------------------------------------------------


def test_strength_runs_from_the_picture_to_noise(tmp_path: Path) -> None:
    decoder = decoder_of(tmp_path)
    (same,) = decoder.generate([asked(strength=0.0)])
    assert np.array_equal(np.asarray(same.images[0]), np.asarray(ONE))
    assert same.finished
    from_noise, plain = patches(decoder, [asked(strength=1.0), Request(["a"], "image", 3, (3, 2))])
    torch.testing.assert_close(from_noise, plain, rtol=1e-9, atol=1e-9)
    clean = torch.from_numpy(decoder.patcher.encode(ONE)[0]).double()
    near = [float((made - clean).square().mean()) for made in patches(decoder, [asked(strength=s) for s in (0.1, 0.9)])]
    assert near[0] < 0.5 * near[1]


@pytest.mark.parametrize("guided", [False, True])
def test_starts_of_all_kinds_share_a_batch(tmp_path: Path, guided: bool) -> None:
    decoder = decoder_of(tmp_path, guidance_scale=2.0 if guided else 1.0, steps=4, solver="heun")
    latents = np.random.default_rng(0).standard_normal((6, 12)).astype(np.float32)
    keep = np.array([[True, False], [False, False], [True, True]])
    pull = RewardGuide(lambda x: -(x - 0.5).square().sum((1, 2, 3)), scale=5.0)
    requests = [
        asked(strength=0.5), asked(strength=0.75), asked(OTHER, strength=0.5, latents=latents), asked(None),
        asked(None, grid=(3, 2), latents=latents), asked(strength=0.5, guide=pull),
        asked(strength=0.5, inpaint=Inpaint(OTHER, keep)), asked(OTHER, invert=True), asked(strength=0.0),
        Request(["words"], "text"),
    ]  # fmt: skip
    together = decoder.generate(requests)
    for request, result in zip(requests, together, strict=True):
        (alone,) = decoder.generate([request])
        assert [np.asarray(i).tobytes() for i in alone.images] == [np.asarray(i).tobytes() for i in result.images]
        assert alone.text == result.text
        assert (alone.latents is None) == (result.latents is None)
        if result.latents is not None:
            np.testing.assert_allclose(alone.latents, result.latents, atol=1e-6)
    assert not together[7].images
    kept = np.kron(keep, np.ones((2, 2))).astype(bool)
    assert (np.asarray(together[6].images[0])[kept] == np.asarray(OTHER)[kept]).all()
    distinct = {np.asarray(together[i].images[0]).tobytes() for i in (0, 1, 2, 5)}
    assert len(distinct) == 4


@pytest.mark.parametrize("scale", [1.0, 1.5])
@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2m"])
def test_the_decoder_inverts_a_picture(tmp_path: Path, solver: str, scale: float) -> None:
    """Drawing from the latents gives the picture back, the nearer the more steps, with and without guidance."""
    decoder = decoder_of(tmp_path, solver=solver, guidance_scale=scale)
    clean = torch.from_numpy(decoder.patcher.encode(ONE)[0]).double()
    errors = []
    for steps in (8, 16, 32):
        sample = decoder.sample.model_copy(update={"steps": steps})
        (found,) = Decoder(decoder.model, decoder.tokenizer, sample).generate([asked(invert=True)])
        assert not found.images
        (again,) = patches(decoder, [asked(None, grid=(3, 2), latents=found.latents)], steps=steps)
        errors.append(float((again - clean).abs().max()))
    assert errors[0] / errors[2] > 3, errors  # the time features of the network are too fast for the order of `heun`
    assert errors[2] < (0.02 if solver == "heun" else 0.1)


def test_interpolation_begins_and_ends_at_the_pictures(tmp_path: Path) -> None:
    decoder = decoder_of(tmp_path, solver="rk4", steps=40)
    between = decoder.interpolate(asked(), OTHER, [0.0, 0.5, 1.0])
    for image, end in ((between[0], ONE), (between[2], OTHER)):
        assert np.abs(np.asarray(image).astype(int) - np.asarray(end).astype(int)).max() <= 2
    latents = [result.latents for result in decoder.generate([asked(invert=True), asked(OTHER, invert=True)])]
    first, last = (torch.from_numpy(one)[None] for one in latents)
    middle = slerp(first, last, 0.5)[0].numpy()
    (expected,) = decoder.generate([asked(None, grid=(3, 2), latents=middle)])
    assert np.array_equal(np.asarray(between[1]), np.asarray(expected.images[0]))
    with pytest.raises(ValueError, match="give two of one size"):
        decoder.interpolate(asked(), picture(RNG), [0.5])


def test_a_guide_of_the_decoder_sees_pictures(tmp_path: Path) -> None:
    """A reward of the red of the upper lines raises that; the guide sees pixels, line by line."""
    decoder = decoder_of(tmp_path, steps=20, guidance_scale=2.0)
    shapes: list[tuple[int, ...]] = []

    def reward(x: Tensor) -> Tensor:
        shapes.append(tuple(x.shape))
        return -(x[:, 0, :3] - 1).square().flatten(1).sum(1)  # the red of the upper lines

    plain = decoder.generate([Request(["a"], "image", 3, (3, 2))])[0].images[0]
    guided = decoder.generate([Request(["a"], "image", 3, (3, 2), guide=RewardGuide(reward, 0.45))])[0].images[0]
    assert set(shapes) == {(1, 3, 6, 4)}
    moved = np.asarray(guided).astype(int) - np.asarray(plain).astype(int)
    assert moved[:3, :, 0].mean() > 10
    assert moved[:3, :, 0].mean() > 2 * np.abs(moved[3:]).mean()


@pytest.mark.parametrize("order", ["masked", "random", "raster"])
def test_mar_refuses_pictures_and_guides(tmp_path: Path, order: str) -> None:
    decoder = decoder_of(tmp_path, {"kind": "mar", "mar": {"order": order, "head": {"width": 24}}}, steps=2)
    for request in (asked(), asked(invert=True), asked(None, guide=RewardGuide(lambda x: x.flatten(1).sum(1)))):
        with pytest.raises(ValueError, match=r"'mar' draws it patch by patch: use `inpaint`"):
            decoder.generate([request])
    latents = np.random.default_rng(0).standard_normal((6, 12))
    assert decoder.generate([asked(None, grid=(3, 2), latents=latents)])[0].images


def test_bad_starts_are_refused(tmp_path: Path) -> None:
    decoder = decoder_of(tmp_path)
    small = picture(RNG)
    cases: list[tuple[Request, str]] = [
        (asked(strength=1.5), "strength lies between 0 .* and 1"),
        (asked(strength=0.05), "less than one step: raise one of them"),
        (replace(asked(), mode="auto"), "`image` needs mode 'image'"),
        (asked(grid=(2, 2)), "leave `grid` out"),
        (asked(inpaint=Inpaint(small, np.ones((2, 2), bool))), "give pictures of one size"),
        (asked(None, invert=True), "invert needs the picture"),
        (asked(None, latents=np.zeros((4, 12)), grid=(3, 2)), r"needs \(6, 12\)"),
        (asked(invert=True, inpaint=Inpaint(ONE, np.ones((3, 2), bool))), "leave `inpaint`, `guide` and `latents` out"),
    ]
    for request, message in cases:
        with pytest.raises(ValueError, match=message):
            decoder.generate([request])
    vp = decoder_of(tmp_path, {"path": "vp", "prediction": "eps", "loss_space": "eps"})
    with pytest.raises(ValueError, match="path 'vp' diverges, so its flow cannot run backwards"):
        vp.generate([asked(invert=True)])


# --- faults that the tests above must find -------------------------------------------------------------------


def _noise_instead_of_the_mixture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LinearPath, "mix", lambda self, x, eps, t: eps)


def _one_step_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = ImageToImage.steps
    monkeypatch.setattr(ImageToImage, "steps", staticmethod(lambda strength, n: max(1, steps(strength, n) - 1)))


def _noise_at_the_wrong_time(monkeypatch: pytest.MonkeyPatch) -> None:
    mix = LinearPath.mix
    monkeypatch.setattr(LinearPath, "mix", lambda self, x, eps, t: mix(self, x, eps, t * 0.5))


@pytest.mark.parametrize("fault", [_noise_instead_of_the_mixture, _one_step_too_few, _noise_at_the_wrong_time])
def test_a_wrong_start_is_found(fault: object, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)  # type: ignore[operator]
    with pytest.raises(AssertionError):
        test_the_first_state_and_time_of_a_strength_are_those_of_diffusers()


def _forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    def rising(x: Tensor, times: Tensor, **options: object) -> object:
        return runge_kutta(x, times.flip(0), **options)  # type: ignore[arg-type]

    runge_kutta = image_flow.runge_kutta
    monkeypatch.setattr(image_flow, "runge_kutta", rising)


def _stops_early(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(x: Tensor, times: Tensor, **options: object) -> object:
        return runge_kutta(x, times[:-1], **options)  # type: ignore[arg-type]

    runge_kutta = image_flow.runge_kutta
    monkeypatch.setattr(image_flow, "runge_kutta", short)


def _euler_whatever_the_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    runge_kutta = image_flow.runge_kutta
    monkeypatch.setattr(
        image_flow, "runge_kutta", lambda x, times, **options: runge_kutta(x, times, **{**options, "scheme": "euler"})
    )


@pytest.mark.parametrize("fault", [_forwards, _stops_early, _euler_whatever_the_solver])
def test_a_wrong_inversion_is_found(fault: object, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)  # type: ignore[operator]
    with pytest.raises(AssertionError):
        test_an_inversion_and_its_drawing_return_the_picture("heun", 2, "v")
