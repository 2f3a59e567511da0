"""The flow of an objective: its loss in training, and its solver with guidance in generation."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmgen.config import ObjectiveConfig, SampleConfig, at_size, choose
from mmgen.flow.field import Conversion
from mmgen.flow.guide import Guidance, Guide, combine
from mmgen.flow.loss import WEIGHT_SPACES, WEIGHTS, FlowLoss
from mmgen.flow.path import Path
from mmgen.flow.schedule import PATHS, ScaledNoise
from mmgen.flow.solvers import NOISY, SOLVERS, TABLEAUX, adds_noise, build_solver, runge_kutta
from mmgen.flow.steps import Noise, Solver
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
class ImageToImage:
    """Start from a picture with noise instead of pure noise: z = alpha(t) x + sigma(t) eps at the first time t.

    Of the `steps` of the time grid, the last `strength * steps`, rounded down, are taken, as in diffusers.
    """

    x_RNP: Tensor
    strength: float
    """In (0, 1]: 1 is pure noise."""

    @staticmethod
    def steps(strength: float, steps: int) -> int:
        """Number of solver steps that are taken of `steps`."""
        return int(strength * steps + 1e-9)  # 0.29 * 100 is less than 29


@dataclass(frozen=True)
class Inversion:
    """Run the flow backwards, from a picture to the noise from which it is drawn, and return the noise."""

    x_RNP: Tensor


Start = ImageToImage | Inversion


@dataclass(frozen=True)
class FlowSpec:
    """A request to draw n patches in each of R images."""

    sample: SampleConfig
    eps_RnP: Tensor
    """The noise from which the solver starts."""
    noise: Noise
    """Source of further noise, for stochastic solvers."""
    guidance: Sequence[Guidance]
    """Guidance of each lane after that of the full prompt, in their order."""
    patches: int
    """Number of patches of a whole image, on which noise scale and time shift may depend."""
    given: Given | None = None
    """Known patches."""
    previews: bool = False
    """Whether the generator also yields the clean estimate."""
    start: Start | None = None
    """A picture to start from, instead of noise."""
    guide: Guide | None = None
    """Moves the clean estimate."""


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

        The outputs are one tensor [R, n, P] per guidance lane, the fullest one first. The clean estimate of known
        patches (`spec.given`) is replaced by their values at every step, so the other patches are drawn conditionally
        on them. (Song et al. 2020, appendix I.2, do this for in-painting, but replace z instead of the estimate.)

        Raises:
            ValueError: the solver is unknown or cannot start from noise, the path cannot run backwards, no step is left
                of the strength, or `sample.noise_temperature` is set for a solver that adds no noise.
        """
        sample, given, start, path = spec.sample, spec.given, spec.start, self.path_of(spec.patches)
        shift = self.settings.time.shift if sample.time_shift is None else sample.time_shift
        times = shifted_grid(sample.steps, at_size(shift, spec.patches))
        clip = path.smallest_level(times)
        kind = choose(SOLVERS, sample.solver, "sample.solver")
        if not kind.from_noise:
            raise ValueError(
                f"sample.solver '{sample.solver}' only corrects samples at one time: choose one that starts from noise"
            )
        temperature = sample.noise_temperature
        if temperature != 1 and not adds_noise(sample.solver, times, path, **sample.solver_options):
            options = " with these sample.solver_options" if kind.stochastic else ""
            raise ValueError(
                f"sample.noise_temperature is {temperature}, but the solver '{sample.solver}' adds no noise{options}: "
                f"set sample.solver to one that does ({', '.join(NOISY)}), or sample.noise_temperature to 1"
            )

        def noise(like: Tensor) -> Tensor:
            return temperature * spec.noise(like)

        scale = path.sigma(times[0]).to(spec.eps_RnP.dtype)
        backwards, asks = isinstance(start, Inversion), kind.asks
        if isinstance(start, Inversion):
            solver, asks = self._backwards(sample.solver, start, times, path), "v"
        else:
            z = spec.eps_RnP * scale
            if start is not None:
                times = times[sample.steps - start.steps(start.strength, sample.steps) :]
                if len(times) < 2:
                    raise ValueError(f"strength {start.strength} leaves none of the {sample.steps} steps: raise one")
                z = path.mix(start.x_RNP, spec.eps_RnP, times[0]) if len(times) <= sample.steps else z
            solver = build_solver(sample.solver, z, times, path, noise, **sample.solver_options)
        convert = Conversion(path, clip, None if backwards else sample.clean_range, spec.guide)
        preview, at_data = None, backwards
        try:
            z, t = next(solver)
            while True:
                outputs = yield z, t, preview
                v = [self._velocity(out.to(z.dtype), z, t, path, clip, at_data) for out in outputs]
                guided = combine(v, spec.guidance, t) if v[1:] else v[0]
                answer = convert("v", asks, guided, z, t)
                at_data = False
                if given is not None:
                    known = path.convert("x", asks, given.x_RNP, z, t, clip)
                    answer = torch.where(given.mask_RN.unsqueeze(-1), known, answer)
                preview = path.convert(asks, "x", answer, z, t, clip) if spec.previews else None
                z, t = solver.send(answer)
        except StopIteration as stop:
            clean: Tensor = stop.value
            if backwards:
                return clean / scale
            return clean if given is None else torch.where(given.mask_RN.unsqueeze(-1), given.x_RNP, clean)

    def _backwards(self, solver: str, start: Inversion, times: Tensor, path: Path) -> Solver:
        """The solver of an inversion: the chosen one if it is a Runge-Kutta scheme, else `heun` on the same `times`."""
        if path.singular.get("v"):
            raise ValueError(
                f"the velocity of objective.path '{self.settings.path}' diverges, so its flow cannot run backwards: "
                "train with objective.path linear or cosine"
            )
        scheme = solver if solver in TABLEAUX else "heun"
        return runge_kutta(start.x_RNP, times.flip(0), scheme=scheme, path=path, end="full")

    def _velocity(self, output: Tensor, z: Tensor, t: Tensor, path: Path, clip: float, at_data: bool) -> Tensor:
        """The velocity of an output of the network. `at_data`: t is 1, and z is a picture without noise."""
        if at_data and self.settings.prediction == "x":
            # The conversion divides by sigma = 0. Its limit, for data with a density, has the noise estimate zero.
            return path.convert("eps", "v", torch.zeros_like(z), z, t, clip)
        return path.convert(self.settings.prediction, "v", output, z, t, clip)


def guidance_of(sample: SampleConfig, ramp: Callable[[float], float] = float) -> list[Guidance]:
    """Guidance of each lane of `sample.guidance_lanes`; `ramp` maps the scales of the settings to those in use."""
    text = Guidance(
        ramp(sample.guidance_scale), sample.guidance_interval, sample.guidance_rescale, sample.guidance_renorm
    )
    interval, rescale, renorm = (
        sample.image_guidance_interval, sample.image_guidance_rescale, sample.image_guidance_renorm,
    )  # fmt: skip
    image = Guidance(
        ramp(sample.image_guidance_scale or 0.0),
        text.interval if interval is None else interval,
        text.rescale if rescale is None else rescale,
        text.renorm if renorm is None else renorm,
    )
    return [text, image][: len(sample.guidance_lanes)]


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
