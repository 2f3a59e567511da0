"""The flow of an objective: its loss in training, and its solver with guidance in generation."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmgen.config import ObjectiveConfig, SampleConfig, at_size, choose
from mmgen.flow.field import Conversion
from mmgen.flow.guide import Guidance, classifier_free
from mmgen.flow.loss import WEIGHT_SPACES, WEIGHTS, FlowLoss
from mmgen.flow.path import Path
from mmgen.flow.schedule import PATHS, ScaledNoise
from mmgen.flow.solvers import NOISY, SOLVERS, adds_noise, build_solver
from mmgen.flow.steps import Noise
from mmgen.flow.time import shifted_grid

Question = tuple[Tensor, Tensor, Tensor | None]
"""z, t, and the clean estimate from the previous output (None without previews)."""


@dataclass(frozen=True)
class Given:
    """Known patches that generation keeps, for in-painting. R images have the same number of known patches."""

    mask_RN: Tensor
    """True where the patch is known."""
    x_RNP: Tensor
    """Clean patches. Values at unknown patches are ignored."""


@dataclass(frozen=True)
class FlowSpec:
    """A request to draw n patches in each of R images."""

    sample: SampleConfig
    eps_RnP: Tensor
    """The noise from which the solver starts."""
    noise: Noise
    """Source of further noise, for stochastic solvers."""
    scale: float
    """Guidance scale."""
    patches: int
    """Number of patches of a whole image, on which noise scale and time shift may depend."""
    given: Given | None = None
    """Known patches."""
    previews: bool = False
    """Whether the generator also yields the clean estimate."""


class ImageFlow:
    """Loss and solver for the path, prediction, loss space and weight that a run has chosen.

    The path depends on the size of the image, because `objective.noise_scale` may.

    Raises:
        ValueError: a name is unknown, or settings contradict each other.
    """

    def __init__(self, settings: ObjectiveConfig) -> None:
        self.settings = settings
        self._path = build_path(settings)
        self._weight = None
        if settings.weight is not None:
            self._weight = choose(WEIGHTS, settings.weight, "objective.weight")
            space = WEIGHT_SPACES.get(settings.weight, settings.loss_space)
            if space != settings.loss_space:
                raise ValueError(
                    f"objective.weight '{settings.weight}' needs an error measured in {space}, but "
                    f"objective.loss_space is {settings.loss_space}: set objective.loss_space to {space}"
                )

    def path_of(self, patches: int | Tensor) -> Path:
        """The path of images of `patches` patches, a number or a tensor that broadcasts against the times."""
        scale = at_size(self.settings.noise_scale, patches)
        return self._path if isinstance(scale, float) and scale == 1 else ScaledNoise(self._path, scale)

    def loss(self, output: Tensor, x: Tensor, eps: Tensor, t: Tensor, patches: Tensor) -> Tensor:
        """Loss of each patch [J, ...], from outputs, clean patches and noise [J, ..., P] and times [J, ...].

        `patches` [J] is the number of patches of the image to which each patch belongs.
        """
        with torch.autocast(output.device.type, enabled=False):
            path = self.path_of(patches.to(t.dtype).view(-1, *[1] * t.ndim))
            error = FlowLoss(path, self.settings.prediction, self.settings.loss_space, self.settings.clip, self._weight)
            return error(output.to(x.dtype), x, eps, t)

    def draw(self, spec: FlowSpec) -> Generator[Question, Sequence[Tensor], Tensor]:
        """Draw patches: a generator that yields (z, t, preview), receives outputs and returns clean patches [R, n, P].

        The outputs are one tensor [R, n, P] per guidance lane, the conditional one first. The clean estimate of known
        patches (`spec.given`) is replaced by their values at every step, so the other patches are drawn conditionally
        on them. (Song et al. 2020, appendix I.2, do this for in-painting, but replace z instead of the estimate.)

        Raises:
            ValueError: the solver is unknown or cannot start from noise, or `sample.noise_temperature` is set for a
                solver that adds no noise.
        """
        sample, given, path = spec.sample, spec.given, self.path_of(spec.patches)
        shift = self.settings.time.shift if sample.time_shift is None else sample.time_shift
        times = shifted_grid(sample.steps, at_size(shift, spec.patches))
        clip = path.smallest_level(times)
        kind = choose(SOLVERS, sample.solver, "sample.solver")
        if not kind.from_noise:
            raise ValueError(
                f"sample.solver '{sample.solver}' only corrects samples at one time: choose one that starts from noise"
            )
        temperature = sample.noise_temperature
        if temperature != 1 and not adds_noise(sample.solver, times, self.path, **sample.solver_options):
            options = " with these sample.solver_options" if kind.stochastic else ""
            raise ValueError(
                f"sample.noise_temperature is {temperature}, but the solver '{sample.solver}' adds no noise{options}: "
                f"set sample.solver to one that does ({', '.join(NOISY)}), or sample.noise_temperature to 1"
            )

        def noise(like: Tensor) -> Tensor:
            return temperature * spec.noise(like)

        start = spec.eps_RnP * path.sigma(times[0]).to(spec.eps_RnP.dtype)
        solver = build_solver(sample.solver, start, times, path, noise, **sample.solver_options)
        interval, rescale = sample.guidance_interval, sample.guidance_rescale
        guidance = Guidance(spec.scale, interval, rescale, sample.guidance_renorm)
        convert = Conversion(path, clip, sample.clean_range)
        preview = None
        try:
            z, t = next(solver)
            while True:
                outputs = yield z, t, preview
                v = [path.convert(self.settings.prediction, "v", out.to(z.dtype), z, t, clip) for out in outputs]
                guided = classifier_free(v[0], v[1], t, guidance) if v[1:] else v[0]
                answer = convert("v", kind.asks, guided, z, t)
                if given is not None:
                    known = path.convert("x", kind.asks, given.x_RNP, z, t, clip)
                    answer = torch.where(given.mask_RN.unsqueeze(-1), known, answer)
                preview = path.convert(kind.asks, "x", answer, z, t, clip) if spec.previews else None
                z, t = solver.send(answer)
        except StopIteration as stop:
            clean: Tensor = stop.value
            return clean if given is None else torch.where(given.mask_RN.unsqueeze(-1), given.x_RNP, clean)


def build_path(settings: ObjectiveConfig) -> Path:
    """The path `objective.path` with its options, before the noise scale.

    Raises:
        ValueError: the path or an option is unknown, or the velocity of the path diverges but is needed.
    """
    try:
        path: Path = choose(PATHS, settings.path, "objective.path")(**settings.path_options)
    except TypeError as error:
        raise ValueError(f"objective.path_options of '{settings.path}': {error}") from None
    if "v" in (settings.prediction, settings.loss_space) and path.singular.get("v"):
        raise ValueError(
            f"the velocity of objective.path '{settings.path}' diverges at the data: set objective.prediction and "
            "objective.loss_space to x, eps or v_sh, or set objective.path to cosine"
        )
    return path
