"""What objectives with a flow share: the flow that is learned, and how a sampler is driven with guidance."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmgen.config import ObjectiveConfig, SampleConfig, choose
from mmgen.flow.field import Conversion
from mmgen.flow.guide import Guidance, classifier_free
from mmgen.flow.loss import WEIGHT_SPACES, WEIGHTS, FlowLoss
from mmgen.flow.path import Path
from mmgen.flow.schedule import PATHS, ScaledNoise
from mmgen.flow.solvers import SOLVERS, build_solver
from mmgen.flow.steps import Noise
from mmgen.flow.time import shifted_grid

Question = tuple[Tensor, Tensor, Tensor | None]
"""z, t, and the clean estimate that the previous answer implied."""


@dataclass(frozen=True)
class Given:
    """Patches that generation keeps, for in-painting; every row keeps equally many."""

    mask_RN: Tensor
    """True where the patch is known."""
    x_RNP: Tensor
    """Clean patches; anything where unknown."""


@dataclass(frozen=True)
class FlowSpec:
    """A request to draw n patches in each of R rows."""

    sample: SampleConfig
    eps_RnP: Tensor
    """The noise that the sampler starts from."""
    noise: Noise
    """More noise, for samplers that add it."""
    scale: float
    """Of guidance."""
    given: Given | None = None
    """Patches that are known."""
    previews: bool = False
    """Whether questions carry the clean estimate so far."""


class ImageFlow:
    """Path, prediction, loss space and weight of a run, as a loss and as a sampler.

    Raises:
        ValueError: a name is unknown, or settings do not fit each other.
    """

    def __init__(self, settings: ObjectiveConfig) -> None:
        self.settings = settings
        self.path = build_path(settings)
        weight = None
        if settings.weight is not None:
            weight = choose(WEIGHTS, settings.weight, "objective.weight")
            space = WEIGHT_SPACES.get(settings.weight, settings.loss_space)
            if space != settings.loss_space:
                raise ValueError(
                    f"objective.weight '{settings.weight}' is made for an error measured in {space}, but "
                    f"objective.loss_space is {settings.loss_space}: set it to {space}"
                )
        self._error = FlowLoss(self.path, settings.prediction, settings.loss_space, settings.clip, weight)

    def loss(self, output: Tensor, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Loss of each patch [...] from outputs, clean patches and noise [..., P] and times [...]."""
        with torch.autocast(output.device.type, enabled=False):
            return self._error(output.to(x.dtype), x, eps, t)

    def draw(self, spec: FlowSpec) -> Generator[Question, Sequence[Tensor], Tensor]:
        """A generator that yields (z, t, preview), is sent the network's outputs, and returns clean patches.

        Outputs are one tensor per guidance lane, conditional first. Patches in `given` keep their clean estimate
        throughout, so the others are drawn beside them (the conditional flow of in-painting, Song et al. 2020,
        appendix I.2, with the estimate replaced where theirs replaces z).

        Raises:
            ValueError: the sampler is unknown, draws nothing, or adds no noise that a temperature could scale.
        """
        sample, given = spec.sample, spec.given
        times = shifted_grid(sample.steps, sample.time_shift)
        clip = self.path.smallest_level(times)
        kind = choose(SOLVERS, sample.solver, "sample.solver")
        if not kind.from_noise:
            raise ValueError(f"sample.solver '{sample.solver}' corrects at one time and draws nothing: choose another")
        heat = sample.noise_temperature
        if heat != 1 and not kind.stochastic:
            raise ValueError(
                f"sample.noise_temperature {heat} scales the noise that a sampler adds, and '{sample.solver}' adds "
                "none: set sample.solver to euler_maruyama, ancestral or ddim with eta, or the temperature to 1"
            )

        def heated(like: Tensor) -> Tensor:
            return heat * spec.noise(like)

        start = spec.eps_RnP * self.path.sigma(times[0]).to(spec.eps_RnP.dtype)
        solver = build_solver(sample.solver, start, times, self.path, heated, **sample.solver_options)
        interval, rescale = sample.guidance_interval, sample.guidance_rescale
        guidance = Guidance(spec.scale, interval, rescale, sample.guidance_renorm)
        convert = Conversion(self.path, clip, sample.clean_range)
        preview = None
        try:
            z, t = next(solver)
            while True:
                outputs = yield z, t, preview
                v = [self.path.convert(self.settings.prediction, "v", out.to(z.dtype), z, t, clip) for out in outputs]
                guided = classifier_free(v[0], v[1], t, guidance) if v[1:] else v[0]
                answer = convert("v", kind.asks, guided, z, t)
                if given is not None:
                    known = self.path.convert("x", kind.asks, given.x_RNP, z, t, clip)
                    answer = torch.where(given.mask_RN.unsqueeze(-1), known, answer)
                preview = self.path.convert(kind.asks, "x", answer, z, t, clip) if spec.previews else None
                z, t = solver.send(answer)
        except StopIteration as stop:
            clean: Tensor = stop.value
            return clean if given is None else torch.where(given.mask_RN.unsqueeze(-1), given.x_RNP, clean)


def build_path(settings: ObjectiveConfig) -> Path:
    """The path that `objective.path` names.

    Raises:
        ValueError: an unknown path or argument, or a velocity that the path cannot give.
    """
    try:
        path: Path = choose(PATHS, settings.path, "objective.path")(**settings.path_options)
    except TypeError as error:
        raise ValueError(f"objective.path_options of '{settings.path}': {error}") from None
    if "v" in (settings.prediction, settings.loss_space) and path.singular.get("v"):
        raise ValueError(
            f"the velocity of objective.path '{settings.path}' diverges at the data: set objective.prediction and "
            "objective.loss_space to x, eps or v_sh, or take the cosine path"
        )
    return path if settings.noise_scale == 1 else ScaledNoise(path, settings.noise_scale)
