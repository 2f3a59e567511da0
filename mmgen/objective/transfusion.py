"""Transfusion: the backbone is the denoiser."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmgen.config import ObjectiveConfig, PatcherConfig, choose
from mmgen.flow.time import TIMES
from mmgen.image.patch import Grid, raster
from mmgen.objective.image_flow import ImageFlow
from mmgen.objective.interface import BackboneCall, Drawing, Embedded, ImageObjective, ImageSite, ImageSpec
from mmgen.objective.layers import PlaceEmbedding, TimeEmbedding, build_projection
from mmgen.sequence.batch import Batch, Places
from mmgen.sequence.document import Block


class TransfusionObjective(ImageObjective):
    """The backbone denoises: noisy patches with one t per image enter it, and it outputs x, eps or v.

    Zhou et al. 2024 (Transfusion). Attention inside the image is bidirectional; all patches are generated in
    parallel by solving the flow.
    """

    def __init__(self, settings: ObjectiveConfig, patcher: PatcherConfig, width: int) -> None:
        super().__init__(settings, patcher, width)
        self.flow = ImageFlow(settings)
        self.projection = build_projection(patcher, width)
        self.time = TimeEmbedding(width)
        self.place = PlaceEmbedding(width)

    @classmethod
    def layout(cls, settings: ObjectiveConfig, site: ImageSite, rng: np.random.Generator) -> list[Block]:
        time = settings.time
        quantile = torch.scalar_tensor(site.quantile, dtype=torch.float64)
        t = float(choose(TIMES, time.sampler, "objective.time.sampler")(quantile, time.mu, time.sigma))
        # An image that loses its caption must still be learned at every t: it trains the unconditional branch.
        if settings.policy == "capped" and site.text_after and not site.text_before:
            t = settings.cap + (1 - settings.cap) * t
        n = site.grid[0] * site.grid[1]
        draws = {
            "t": np.full(n, t, dtype=np.float32),
            "eps": rng.standard_normal((n, site.patch_length), dtype=np.float32),
        }
        noised = Block(np.arange(n), draws, settings.both_ways, noised=settings.policy == "clean_copy")
        return [noised, cls.context(settings, site.grid, site.patch_length)] if noised.noised else [noised]

    @classmethod
    def copies(cls, settings: ObjectiveConfig) -> int:
        return 2 if settings.policy == "clean_copy" else 1

    @classmethod
    def context(cls, settings: ObjectiveConfig, grid: Grid, patch_length: int) -> Block:
        n = grid[0] * grid[1]
        clean = {"t": np.ones(n, dtype=np.float32), "eps": np.zeros((n, patch_length), dtype=np.float32)}
        return Block(np.arange(n), clean, settings.both_ways, loss=False)

    def _enter(self, z_IP: Tensor, t_I: Tensor, places: Places) -> tuple[Tensor, Tensor | None]:
        entered, memory = self.projection.encode(z_IP, t_I, places)
        return entered + self.time(t_I) + self.place(places.place_I2), memory

    def embed(self, batch: Batch) -> Embedded:
        t_I, eps_IP = batch.draws["t"].to(batch.x_IP.dtype), batch.draws["eps"].to(batch.x_IP.dtype)
        z_IP = self.flow.path.mix(batch.x_IP, eps_IP, t_I.unsqueeze(-1))
        values, memory = self._enter(z_IP, t_I, batch.places)
        state = (batch, t_I, eps_IP, memory)
        return Embedded(batch.at_I, values, batch.at_I[batch.loss_at_J], state)

    def loss(self, hidden_JD: Tensor, state: Any) -> Tensor:
        batch, t_I, eps_IP, memory = state
        j = batch.loss_at_J
        t_J, places = t_I[j], Places(batch.image_I[j], batch.place_I2[j])
        output = self.projection.decode(hidden_JD, None if memory is None else memory[j], t_J, places)
        return self.flow.loss(output, batch.x_IP[j], eps_IP[j], t_J)

    def generate(self, spec: ImageSpec) -> Drawing:
        rows, n, length = spec.noise_RNP.shape
        device = spec.noise_RNP.device
        place = torch.from_numpy(raster(spec.grid)).to(device).repeat(rows, 1)
        places = Places(torch.arange(rows, device=device).repeat_interleave(n), place)
        scale = spec.sample.guidance_scale
        flow = self.flow.draw(spec.sample, spec.noise_RNP, spec.noise, scale, spec.given, spec.previews)
        try:
            z_RNP, t, preview = next(flow)
            while True:
                z_IP, t_I = z_RNP.reshape(rows * n, length), t.expand(rows * n)
                values, memory = self._enter(z_IP, t_I, places)
                hidden_GRND = yield BackboneCall(values.view(rows, n, -1), self.settings.both_ways, False, preview)
                outputs = [self.projection.decode(h.reshape(rows * n, -1), memory, t_I, places) for h in hidden_GRND]
                z_RNP, t, preview = flow.send([out.view_as(z_RNP) for out in outputs])
        except StopIteration as stop:
            clean: Tensor = stop.value
            return clean
