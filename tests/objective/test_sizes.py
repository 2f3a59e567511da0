"""Images of different sizes in one batch: the image loss per image, and time shift and noise scale by size."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.cogview4.pipeline_cogview4 import calculate_shift as cogview_shift
from diffusers.pipelines.flux.pipeline_flux import calculate_shift as flux_shift
from torch import Tensor

from mmgen.config import BySize, Config, ObjectiveConfig, SampleConfig, at_size
from mmgen.config_io import load, override
from mmgen.data.loader import Corpus
from mmgen.flow.schedule import LinearPath, ScaledNoise
from mmgen.flow.steps import normal
from mmgen.flow.time import shifted_grid
from mmgen.model import MMGenModel, build_model
from mmgen.objective import ImageSite, build_layout
from mmgen.objective.image_flow import FlowSpec, ImageFlow
from mmgen.parity import check_parity
from mmgen.sequence.batch import Batch
from mmgen.sequence.tokenizer import Tokenizer
from mmgen.train import loop
from mmgen.train.loop import train
from mmgen.train.report import count
from tests.conftest import awake, ready

RULES: dict[str, Any] = {
    "noise_scale": {"base": 0.8, "patches": 3, "power": 0.5},
    "time": {"shift": {"base": 1.5, "patches": 4, "power": 0.7}},
}
OBJECTIVES = {
    "transfusion": {"kind": "transfusion"},
    "transfusion, clean copy": {"kind": "transfusion", "transfusion": {"context": "clean_copy"}},
    "masked": {"kind": "mar"},
    "raster": {"kind": "mar", "mar": {"order": "raster"}},
}
each_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)


def scale_of(patches: int) -> float:
    """The noise scale of `RULES`, written out again."""
    return 0.8 * math.sqrt(patches / 3)


def fresh(config: Config) -> MMGenModel:
    """A new model in float64. Its outputs are zero, so the loss of a patch is the mean square of its target."""
    torch.manual_seed(0)
    return build_model(config, len(Tokenizer.of(config))).double()


def first_batch(config: Config) -> Batch:
    corpus = Corpus(config.data.train, Tokenizer.of(config), config)
    return ready(corpus, corpus.first_step().micro[0], torch.float64)


def by_image(batch: Batch) -> dict[int, list[float]]:
    """The losses of the learned patches of each image, for outputs of zero, noise scale of `RULES` and target v."""
    sizes, losses = defaultdict(int), defaultdict(list)
    for image in batch.image_I.tolist():
        sizes[image] += 1
    for j, i in enumerate(batch.loss_at_J.tolist()):
        image = int(batch.image_I[i])
        targets = [batch.x_IP[i] - scale_of(sizes[image]) * eps for eps in batch.eps_JKP[j]]
        losses[image].append(float(np.mean([float(target.square().mean()) for target in targets])))
    assert {sizes[image] for image in losses} == {4, 6}, "images of both sizes are learned"
    return losses


@each_objective
@pytest.mark.parametrize("image_loss", ["patch", "image"])
def test_the_loss_of_a_mixed_batch_is_computed_again(
    config: Config, objective: dict[str, Any], image_loss: str
) -> None:
    """A patch of an image has the noise scale of its own image, and an image counts by the mean over its patches.

    In MAR a patch has the mean over its draws of noise, and in `masked` only hidden patches count.
    """
    config = override(config, {"objective": {**objective, **RULES, "image_loss": image_loss}})
    batch = first_batch(config)
    found, losses = fresh(config)(batch), by_image(batch)
    patches = [loss for image in losses.values() for loss in image]
    terms = [float(np.mean(image)) for image in losses.values()] if image_loss == "image" else patches
    assert found.image_count == len(terms)
    assert found.image.item() == pytest.approx(sum(terms), rel=1e-9)
    if "mar" not in objective["kind"]:
        assert found.weight_J.sum().item() == pytest.approx(len(terms))


def test_a_large_image_weighs_as_much_as_a_small_one(config: Config) -> None:
    """The gradient of the loss with respect to the losses of all patches of an image adds up to one for every image."""
    config = override(config, {"objective": {"image_loss": "image"}})
    batch = first_batch(config)
    found = fresh(config)(batch)
    image_J = batch.image_I[batch.loss_at_J]
    total = torch.zeros(int(image_J.max()) + 1, dtype=torch.float64).index_add(0, image_J, found.weight_J)
    assert total[total > 0].tolist() == pytest.approx([1.0] * found.image_count)
    assert len(set(found.weight_J.tolist())) == 2


def gradients(config: Config, micro_rows: int | None) -> dict[str, Tensor]:
    """Gradients of the first step, whose batch is cut into micro-batches; counts are those of the whole step."""
    config = override(config, {"train": {"micro_rows": micro_rows}})
    model = awake(config)[0].train()
    corpus = Corpus(config.data.train, Tokenizer.of(config), config)
    step = corpus.first_step()
    assert len(step.micro) == (1 if micro_rows is None else -(-config.train.batch_rows // micro_rows))
    texts, images = count(step, config.objective.image_loss)
    for raw in step.micro:
        losses = model(ready(corpus, raw, torch.float64))
        (losses.text / texts + losses.image / images).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@each_objective
def test_gradients_do_not_depend_on_how_the_batch_is_cut(config: Config, objective: dict[str, Any]) -> None:
    config = override(config, {"objective": {**objective, **RULES, "image_loss": "image"}})
    whole = gradients(config, None)
    for micro_rows in (1, 3):
        for name, gradient in gradients(config, micro_rows).items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-9, atol=1e-12)


def logged(config: Config) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (config.run.dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss/image" in line]


def trained_loss(config: Config, folder: str, micro_rows: int | None) -> list[float]:
    changes = {"run": {"dir": str(config.run.dir / folder)}, "train": {"micro_rows": micro_rows, "steps": 3}}
    config = override(config, {**changes, "data": {"val": []}})
    assert train(config) == 0
    return [line["loss/image"] for line in logged(config)]


def per_patch(config: Config) -> tuple[float, float]:
    """The image loss of the first step from `by_image`: per image, and per patch."""
    losses = by_image(first_batch(config))
    every = [loss for image in losses.values() for loss in image]
    return float(np.mean([np.mean(image) for image in losses.values()])), float(np.mean(every))


def test_the_trainer_divides_by_the_number_of_images(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logged loss of the first step equals that of `by_image`, with one micro-step or four; counts of patches are detected."""
    config = override(config, {"objective": {**RULES, "image_loss": "image"}})
    expected, other = per_patch(config)
    assert abs(expected - other) > 1e-3 * other
    whole = trained_loss(config, "whole", None)
    assert whole[0] == pytest.approx(expected, rel=1e-5)
    assert trained_loss(config, "cut", 1) == pytest.approx(whole, rel=1e-4)
    monkeypatch.setattr(loop, "count", lambda step, image_loss: count(step, "patch"))
    assert abs(trained_loss(config, "wrong", None)[0] - expected) > 0.5 * expected


def test_the_signal_to_noise_ratio_of_a_mean_is_that_of_the_reference_size() -> None:
    """The mean over a constant image of n patches has n times the signal-to-noise ratio of one patch (Esser et al. 2024,
    section 5.3.2): shift or noise scale sqrt(n / m) makes it that of m patches."""
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    path, rule = LinearPath(), {"base": 1.0, "patches": 16, "power": 0.5}
    reference = 16 * path.snr(t)
    for grid in ((4, 4), (8, 8), (4, 12)):
        n = grid[0] * grid[1]
        shifted = build_layout(ObjectiveConfig(time={"shift": rule})).times(t, grid)
        torch.testing.assert_close(n * path.snr(shifted), reference)
        scaled = ImageFlow(ObjectiveConfig(noise_scale=rule)).path_of(n)
        torch.testing.assert_close(n * scaled.snr(t), reference)
        both = {"base": 1.0, "patches": 16, "power": 0.25}
        flow = ImageFlow(ObjectiveConfig(noise_scale=both, time={"shift": both}))
        half = build_layout(flow.settings).times(t, grid)
        torch.testing.assert_close(n * flow.path_of(n).snr(half), reference)


def scheduled(steps: int, mu: float | None, **settings: Any) -> Tensor:
    """Times of diffusers' scheduler, whose sigma is 1 - t."""
    scheduler = FlowMatchEulerDiscreteScheduler(**settings)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    return 1 - scheduler.sigmas.double()


def drawn_times(settings: ObjectiveConfig, sample: SampleConfig, patches: int) -> Tensor:
    """The times at which the flow asks for velocities."""
    eps = torch.randn(1, patches, 3, dtype=torch.float64)
    flow = ImageFlow(settings).draw(FlowSpec(sample, eps, normal(), [], patches))
    times = []
    try:
        z, t, _ = next(flow)
        while True:
            times.append(float(t))
            z, t, _ = flow.send([torch.zeros_like(z)])
    except StopIteration:
        return torch.tensor(times, dtype=torch.float64)


@pytest.mark.parametrize("patches", [256, 1024, 4096])
def test_shifts_equal_those_of_diffusers(patches: int) -> None:
    """A fixed shift, the linear rule of CogView4 (without its offset), and both ends of Flux's exponential rule."""
    steps, close = 12, {"rtol": 0, "atol": 1e-6}
    sample = SampleConfig(steps=steps)
    three = drawn_times(ObjectiveConfig(time={"shift": 3.0}), sample, patches)
    torch.testing.assert_close(three, scheduled(steps, None, shift=3.0)[:-1], **close)
    rule = {"base": 0.75, "patches": 256, "power": 0.5}
    linear = scheduled(
        steps, cogview_shift(patches, 256, 0.0, 0.75), use_dynamic_shifting=True, time_shift_type="linear"
    )
    torch.testing.assert_close(
        drawn_times(ObjectiveConfig(time={"shift": rule}), sample, patches), linear[:-1], **close
    )
    flux = {"base": math.exp(0.5), "patches": 256, "power": 0.65 / math.log(16)}
    exponential = scheduled(steps, flux_shift(patches), use_dynamic_shifting=True)
    ours = drawn_times(ObjectiveConfig(), SampleConfig(steps=steps, time_shift=flux), patches)
    far = float((ours - exponential[:-1]).abs().max())
    assert far < 1e-6 if patches != 1024 else 0.03 < far < 0.06, "between its ends Flux's rule is another"


@each_objective
def test_times_of_training_are_shifted_by_size(objective: dict[str, Any]) -> None:
    """At equal draws, t of an image is the shifted t of the unshifted objective, by its own size; `cap` still holds."""
    plain = build_layout(ObjectiveConfig(**objective))
    layout = build_layout(ObjectiveConfig(**objective, time=RULES["time"]))
    for grid in ((2, 2), (3, 2), (8, 8)):
        shift = 1.5 * (grid[0] * grid[1] / 4) ** 0.7
        for after in (False, True):
            site = ImageSite(grid, text_before=False, text_after=after, quantile=0.3, key=1)
            t, moved = (each.blocks(site, np.random.default_rng(0))[0].draws["t"] for each in (plain, layout))
            low = 0.5 if after and objective == OBJECTIVES["transfusion"] else 0.0
            u = (t.astype(np.float64) - low) / (1 - low)
            np.testing.assert_allclose(moved, low + (1 - low) * u / (u + shift * (1 - u)), rtol=2e-6)
            assert (moved < t).all() if shift > 1 else True


def test_a_shift_of_one_changes_no_bit() -> None:
    quantiles = torch.rand(1000, dtype=torch.float64)
    assert torch.equal(build_layout(ObjectiveConfig()).times(quantiles, (3, 5)), quantiles)
    sample = SampleConfig(steps=50)
    assert sample.time_shift is None
    assert torch.equal(drawn_times(ObjectiveConfig(), sample, 4), shifted_grid(50, 1.0)[:-1])


def test_the_shift_of_sampling_is_that_of_training_unless_it_is_set() -> None:
    settings = ObjectiveConfig(time=RULES["time"])
    followed = drawn_times(settings, SampleConfig(steps=9), 6)
    torch.testing.assert_close(followed, shifted_grid(9, 1.5 * 1.5**0.7)[:-1])
    assert torch.equal(drawn_times(settings, SampleConfig(steps=9, time_shift=1.0), 6), shifted_grid(9, 1.0)[:-1])


def sampled_std(prediction: str, patches: int, std: float, other: int | None = None, **sample: Any) -> float:
    """Standard deviation of samples drawn with the exact field of N(0, std^2) data under the noise of its size.

    `other` is the number of patches that the sampler is given, if not the right one.
    """
    c = scale_of(patches)
    shift = {"base": 1.0, "patches": 4, "power": 0.25}
    settings = ObjectiveConfig(prediction=prediction, noise_scale=RULES["noise_scale"], time={"shift": shift})
    eps = torch.randn(1, 4000, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = normal(torch.Generator().manual_seed(1))
    flow = ImageFlow(settings).draw(FlowSpec(SampleConfig(**sample), eps, noise, [], other or patches))
    try:
        z, t, _ = next(flow)
        while True:
            t = t.double()
            variance = (t * std) ** 2 + ((1 - t) * c) ** 2
            x, mean_eps = t * std**2 / variance * z, (1 - t) * c / variance * z
            z, t, _ = flow.send([{"x": x, "eps": mean_eps, "v": x - c * mean_eps}[prediction]])
    except StopIteration as stop:
        return float(stop.value.std())


SAMPLERS = {"heun": {"solver": "heun", "steps": 100}, "ancestral": {"solver": "ancestral", "steps": 1000}}


@pytest.mark.parametrize("prediction", ["v", "x", "eps"])
@pytest.mark.parametrize("sample", SAMPLERS.values(), ids=SAMPLERS)
def test_an_exact_field_is_sampled_with_the_noise_of_its_size(prediction: str, sample: dict[str, Any]) -> None:
    for patches, std in ((4, 0.5), (64, 0.5)):
        assert sampled_std(prediction, patches, std, **sample) == pytest.approx(std, rel=0.03)


def test_the_noise_of_another_size_is_seen_in_the_samples() -> None:
    """The deterministic map of Gaussian data is linear, so the wrong noise at the start stays as a factor."""
    wrong = sampled_std("v", 4, 0.5, other=64, **SAMPLERS["heun"])
    assert wrong == pytest.approx(0.5 * scale_of(64) / scale_of(4), rel=0.03)


@pytest.fixture
def by_size(config: Config) -> Config:
    return override(config, {"objective": RULES})


def test_parity_holds_with_rules_by_size(by_size: Config) -> None:
    for variant in check_parity(by_size):
        assert variant.holds, variant


def of_first_size(flow: ImageFlow, spec: FlowSpec) -> tuple[ImageFlow, FlowSpec]:
    return flow, replace(spec, patches=4)


def without_noise_scale(flow: ImageFlow, spec: FlowSpec) -> tuple[ImageFlow, FlowSpec]:
    return ImageFlow(flow.settings.model_copy(update={"noise_scale": 1.0})), spec


def without_shift(flow: ImageFlow, spec: FlowSpec) -> tuple[ImageFlow, FlowSpec]:
    return flow, replace(spec, sample=spec.sample.model_copy(update={"time_shift": 1.0}))


def inverted_shift(flow: ImageFlow, spec: FlowSpec) -> tuple[ImageFlow, FlowSpec]:
    shift = 1 / at_size(flow.settings.time.shift, spec.patches)
    return flow, replace(spec, sample=spec.sample.model_copy(update={"time_shift": shift}))


@pytest.mark.parametrize("change", [of_first_size, without_noise_scale, without_shift, inverted_shift])
def test_parity_fails_when_the_sampler_uses_other_values(
    by_size: Config, monkeypatch: pytest.MonkeyPatch, change: Callable[..., Any]
) -> None:
    draw = ImageFlow.draw
    monkeypatch.setattr(ImageFlow, "draw", lambda self, spec: (lambda changed: draw(*changed))(change(self, spec)))
    for variant in check_parity(by_size):
        assert not variant.holds, variant


def test_parity_fails_when_training_uses_the_first_size_for_all(
    by_size: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The noise of MAR never enters the backbone, so its check is the loss of `by_image`."""
    right = Batch.image_patches.fget
    monkeypatch.setattr(Batch, "image_patches", property(lambda batch: torch.full_like(right(batch), 4)))
    for variant in check_parity(by_size):
        assert variant.holds == variant.variant.startswith("mar"), variant
    config = override(by_size, {"objective": {"kind": "mar"}})
    batch = first_batch(config)
    expected = sum(sum(image) for image in by_image(batch).values())
    assert abs(fresh(config)(batch).image.item() - expected) > 0.01 * expected


def test_a_scale_per_sample_converts_as_each_scale_alone() -> None:
    """Conversions, targets, levels and times of a tensor of scales equal those of each scale as a number, bit for bit."""
    g = torch.Generator().manual_seed(0)
    value, z, eps = (torch.randn(3, 5, dtype=torch.float64, generator=g) for _ in range(3))
    t = torch.tensor([[0.2], [0.5], [0.9]], dtype=torch.float64)
    scales = [0.5, 1.0, 4.0]
    many = ScaledNoise(LinearPath(), torch.tensor(scales, dtype=torch.float64).unsqueeze(1))
    kinds = ("x", "eps", "v", "score", "v_sh")
    for i, scale in enumerate(scales):
        one, row = ScaledNoise(LinearPath(), scale), slice(i, i + 1)
        for source in kinds:
            assert torch.equal(
                many.target(source, value, eps, t)[row], one.target(source, value[row], eps[row], t[row])
            )
            for target in kinds:
                both = [
                    path.convert(source, target, value[at], z[at], t[at], 1e-3)
                    for path, at in ((many, slice(None)), (one, row))
                ]
                assert torch.equal(both[0][row], both[1]), (source, target)
        for name in ("sigma", "sigma_slope", "half_variance_slope", "diffusion", "snr"):
            assert torch.equal(getattr(many, name)(t)[row], getattr(one, name)(t[row])), name
        torch.testing.assert_close(many.time_of(many.log_snr(t)), t)
    with pytest.raises(ValueError, match="must be positive"):
        ScaledNoise(LinearPath(), torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize("weight", ["snr", "min_snr", "sigmoid", "logit_normal", "sigma_squared"])
def test_a_weight_sees_the_noise_of_each_patch(weight: str) -> None:
    space = {"snr": "x", "min_snr": "x", "sigmoid": "eps", "sigma_squared": "score"}.get(weight, "v")
    settings = {"prediction": "x", "loss_space": space, "weight": weight}
    flow = ImageFlow(ObjectiveConfig(**settings, **RULES))
    g = torch.Generator().manual_seed(0)
    output, x, eps = (torch.randn(2, 3, 5, dtype=torch.float64, generator=g) for _ in range(3))
    t = torch.tensor([[0.2, 0.4, 0.6], [0.3, 0.5, 0.7]], dtype=torch.float64)
    found = flow.loss(output, x, eps, t, torch.tensor([4, 36]))
    for i, patches in enumerate((4, 36)):
        alone = ImageFlow(ObjectiveConfig(**settings, noise_scale=scale_of(patches)))
        expected = alone.loss(output[i : i + 1], x[i : i + 1], eps[i : i + 1], t[i : i + 1], torch.tensor([1]))
        torch.testing.assert_close(found[i], expected[0])


def test_a_saved_model_keeps_its_rules(by_size: Config, tmp_path: Path) -> None:
    model, _ = awake(override(by_size, {"objective": {"image_loss": "image"}}), torch.float32)
    model.save_pretrained(tmp_path / "out")
    settings = MMGenModel.from_pretrained(tmp_path / "out").objective.settings
    assert settings.noise_scale == BySize(base=0.8, patches=3, power=0.5)
    assert settings.time.shift == BySize(base=1.5, patches=4, power=0.7)
    assert settings.image_loss == "image"


def test_a_rule_is_a_number_or_names_its_keys(tmp_path: Path) -> None:
    assert at_size(1.7, 5) == 1.7
    assert at_size(BySize(patches=64), 256) == pytest.approx(2.0)
    assert at_size(BySize(patches=64, base=3.0, power=-1.0), torch.tensor([64, 128])).tolist() == [3.0, 1.5]
    file = tmp_path / "run.yaml"
    for wrong in (
        "{base: 2}",
        "{patches: 64, powr: 1}",
        "{patches: 0}",
        "{patches: 4, base: .inf}",
        "wide",
        "0",
        "true",
    ):
        file.write_text(f"objective: {{noise_scale: {wrong}}}")
        with pytest.raises(
            ValueError, match="noise_scale must be a number above 0 or a mapping with the keys"
        ) as raised:
            load(file)
        assert len(str(raised.value).splitlines()) == 1
