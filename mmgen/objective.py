"""How images are learned and generated: the seam between a language model and diffusion.

An objective says how an image stands in a row, what enters the backbone there, what is learned from the
hidden states, and how an image is generated from them. Everything else is shared by all objectives.

Suffixes: I patches of a batch, J patches that are learned, R rows being generated, N patches of one image,
G guidance lanes (conditional, then unconditional), P patch length, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmgen.config import ObjectiveConfig, PatcherConfig, SampleConfig, choose
from mmgen.flow.field import clipped
from mmgen.flow.guide import classifier_free
from mmgen.flow.loss import WEIGHT_SPACES, WEIGHTS, flow_loss
from mmgen.flow.path import Path
from mmgen.flow.schedule import PATHS, ScaledNoise
from mmgen.flow.solve import SOLVERS, Noise, build_solver, normal
from mmgen.flow.time import TIMES, shifted_grid
from mmgen.patch import Grid, PlaceEmbedding, Places, build_projection
from mmgen.sequence import Batch, Block


@dataclass(frozen=True)
class ImageSite:
    """What a layout may depend on."""

    grid: Grid
    patch_length: int
    text_before: bool
    text_after: bool
    quantile: float
    """Uniform number in [0, 1) from which t is made; stratified over the global step where asked."""


@dataclass
class Embedded:
    """What an objective puts into a batch."""

    at: Tensor
    """Flat positions to add to (patches; perhaps size tokens)."""
    values: Tensor
    """[len(at), D], added to the token embedding, which is zero at patches."""
    read_at_J: Tensor
    """For each learned patch, the flat position whose hidden state predicts it."""
    state: Any
    """What `loss` needs later."""


@dataclass(frozen=True)
class ImageSpec:
    """A request to generate one image in each of R rows."""

    grid: Grid
    noise_RNP: Tensor
    """Standard normal; the only randomness of a deterministic solver."""
    sample: SampleConfig
    opening_GRD: Tensor
    """Hidden states at the size token."""
    noise: Noise = field(default_factory=normal)
    """More standard normal numbers, like its argument [R, N, P], for samplers that need them."""


@dataclass(frozen=True)
class BackboneCall:
    """A request of a generating objective: run the backbone on these inputs and send back [G, R, n, D]."""

    inputs_RND: Tensor
    bidirectional: bool
    keep: bool
    """Keep the positions in the cache; else they are forgotten after the call."""


Drawing = Generator[BackboneCall, Tensor, Tensor]


class ImageObjective(nn.Module, ABC):
    """The seam. `layout` and `context` are pure functions of settings, so that loader workers need no model."""

    def __init__(self, settings: ObjectiveConfig, patcher: PatcherConfig, width: int) -> None:
        super().__init__()
        self.settings = settings

    @classmethod
    @abstractmethod
    def layout(cls, settings: ObjectiveConfig, site: ImageSite, rng: np.random.Generator) -> list[Block]:
        """The blocks of a training image, drawn from `rng` alone; the last one is the clean or only copy."""

    @classmethod
    @abstractmethod
    def context(cls, settings: ObjectiveConfig, grid: Grid, patch_length: int) -> Block:
        """The block of a finished image, as later positions see it."""

    @classmethod
    def copies(cls, settings: ObjectiveConfig) -> int:
        """How many blocks `layout` returns."""
        return 1

    @abstractmethod
    def embed(self, batch: Batch) -> Embedded:
        """What stands at image positions."""

    @abstractmethod
    def loss(self, hidden_JD: Tensor, state: Any) -> Tensor:
        """Loss of each learned patch [J], averaged over its entries, already in the chosen loss space."""

    @abstractmethod
    def generate(self, spec: ImageSpec) -> Drawing:
        """Yield requests to the backbone, be sent hidden states, return clean patch rows [R, N, P] in raster order."""


class TimeEmbedding(nn.Module):
    """Sin-cos features of t through a two-layer network (Nichol and Dhariwal 2021)."""

    def __init__(self, width: int, features: int = 64) -> None:
        super().__init__()
        self.features = features
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """[...] in [0, 1] to [..., D]."""
        (weight, *_) = self.mlp.parameters()
        half = self.features // 2
        exponent = torch.arange(half, device=t.device, dtype=torch.float32) / half
        angle = 1000.0 * t.float().unsqueeze(-1) * 1e-4**exponent
        features = torch.cat([angle.sin(), angle.cos()], dim=-1).to(weight.dtype)
        embedded: Tensor = self.mlp(features)
        return embedded


class TransfusionObjective(ImageObjective):
    """The backbone denoises: noisy patches with one t per image enter it, and it outputs x, eps or v.

    Zhou et al. 2024 (Transfusion). Attention inside the image is bidirectional; all patches are generated in
    parallel by solving the flow.
    """

    def __init__(self, settings: ObjectiveConfig, patcher: PatcherConfig, width: int) -> None:
        super().__init__(settings, patcher, width)
        self.path = build_path(settings)
        self.weight = None
        if settings.weight is not None:
            self.weight = choose(WEIGHTS, settings.weight, "objective.weight")
            space = WEIGHT_SPACES.get(settings.weight, settings.loss_space)
            if space != settings.loss_space:
                raise ValueError(
                    f"objective.weight '{settings.weight}' is made for an error measured in {space}, but "
                    f"objective.loss_space is {settings.loss_space}: set it to {space}"
                )
        self.projection = build_projection(patcher, width)
        self.time = TimeEmbedding(width)
        self.place = PlaceEmbedding(width)

    @classmethod
    def layout(cls, settings: ObjectiveConfig, site: ImageSite, rng: np.random.Generator) -> list[Block]:
        time = settings.time
        quantile = torch.scalar_tensor(site.quantile, dtype=torch.float64)
        t = float(choose(TIMES, time.sampler, "objective.time.sampler")(quantile, time.mu, time.sigma))
        # An image that loses its caption must still be learned at every t: it trains the unconditional branch.
        if settings.context == "capped" and site.text_after and not site.text_before:
            t = settings.cap + (1 - settings.cap) * t
        n = site.grid[0] * site.grid[1]
        draws = {
            "t": np.full(n, t, dtype=np.float32),
            "eps": rng.standard_normal((n, site.patch_length), dtype=np.float32),
        }
        return [Block(np.arange(n), draws, bidirectional=settings.bidirectional)]

    @classmethod
    def context(cls, settings: ObjectiveConfig, grid: Grid, patch_length: int) -> Block:
        n = grid[0] * grid[1]
        clean = {"t": np.ones(n, dtype=np.float32), "eps": np.zeros((n, patch_length), dtype=np.float32)}
        return Block(np.arange(n), clean, bidirectional=settings.bidirectional, loss=False)

    def _enter(self, z_IP: Tensor, t_I: Tensor, places: Places) -> tuple[Tensor, Tensor | None]:
        entered, memory = self.projection.encode(z_IP, t_I, places)
        return entered + self.time(t_I) + self.place(places.place_I2), memory

    def embed(self, batch: Batch) -> Embedded:
        t_I, eps_IP = batch.draws["t"].to(batch.x_IP.dtype), batch.draws["eps"].to(batch.x_IP.dtype)
        z_IP = self.path.mix(batch.x_IP, eps_IP, t_I.unsqueeze(-1))
        values, memory = self._enter(z_IP, t_I, batch.places)
        state = (batch, t_I, eps_IP, memory)
        return Embedded(batch.at_I, values, batch.at_I[batch.loss_at_J], state)

    def loss(self, hidden_JD: Tensor, state: Any) -> Tensor:
        batch, t_I, eps_IP, memory = state
        j = batch.loss_at_J
        t_J, places = t_I[j], Places(batch.image_I[j], batch.place_I2[j])
        output = self.projection.decode(hidden_JD, None if memory is None else memory[j], t_J, places)
        kinds = (self.settings.prediction, self.settings.loss_space)
        with torch.autocast(output.device.type, enabled=False):
            output = output.to(batch.x_IP.dtype)
            return flow_loss(self.path, output, batch.x_IP[j], eps_IP[j], t_J, *kinds, self.settings.clip, self.weight)

    def generate(self, spec: ImageSpec) -> Drawing:
        sample = spec.sample
        rows, n, length = spec.noise_RNP.shape
        device, dtype = spec.noise_RNP.device, spec.noise_RNP.dtype
        column = torch.arange(n, device=device)
        place = torch.stack([column // spec.grid[1], column % spec.grid[1]], dim=1).repeat(rows, 1)
        places = Places(torch.arange(rows, device=device).repeat_interleave(n), place)
        times = shifted_grid(sample.steps, sample.time_shift)
        clip = self.path.smallest_level(times)
        kind = choose(SOLVERS, sample.solver, "sample.solver")
        if not kind.from_noise:
            raise ValueError(f"sample.solver '{sample.solver}' corrects at one time and draws nothing: choose another")
        start = spec.noise_RNP * self.path.sigma(times[0]).to(dtype)
        solver = build_solver(sample.solver, start, times, self.path, spec.noise, **sample.solver_options)
        guidance = (sample.guidance_interval, sample.guidance_rescale, sample.guidance_renorm)
        try:
            z_RNP, t = next(solver)
            while True:
                z_IP, t_I = z_RNP.reshape(rows * n, length), t.expand(rows * n)
                values, memory = self._enter(z_IP, t_I, places)
                hidden_GRND = yield BackboneCall(values.view(rows, n, -1), self.settings.bidirectional, keep=False)
                outputs = [self.projection.decode(h.reshape(rows * n, -1), memory, t_I, places) for h in hidden_GRND]
                v = [
                    self.path.convert(self.settings.prediction, "v", out.to(dtype), z_IP, t, clip).view_as(z_RNP)
                    for out in outputs
                ]
                guided = classifier_free(v[0], v[1], t, sample.guidance_scale, *guidance) if v[1:] else v[0]
                z_RNP, t = solver.send(clipped(self.path, guided, z_RNP, t, kind.asks, clip, sample.clean_range))
        except StopIteration as stop:
            clean: Tensor = stop.value
            return clean


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


OBJECTIVES: dict[str, type[ImageObjective]] = {"transfusion": TransfusionObjective}


def objective_class(settings: ObjectiveConfig) -> type[ImageObjective]:
    """The class that `objective.kind` names; an unknown name raises a ValueError with the nearest one."""
    kind: type[ImageObjective] = choose(OBJECTIVES, settings.kind, "objective.kind")
    return kind
