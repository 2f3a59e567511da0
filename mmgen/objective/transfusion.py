"""Transfusion: noisy patches enter the backbone, which is the denoiser (Zhou et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, count
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmgen.config import ObjectiveConfig, PatcherConfig
from mmgen.image.patch import Floats, Grid, raster
from mmgen.objective.image_flow import FlowSpec, ImageFlow, guidance_of
from mmgen.objective.interface import (
    BackboneCall,
    Drawing,
    Embedded,
    ImageLayout,
    ImageObjective,
    ImageSite,
    ImageSpec,
)
from mmgen.objective.layers import CellEmbedding, OutputModulation, PatchProjection, TimeEmbedding, build_projection
from mmgen.objective.replay import Replay, Trained, lane_scales, recorded, redraw
from mmgen.sequence.batch import Batch, Cells
from mmgen.sequence.document import Block


class TransfusionLayout(ImageLayout):
    """A noisy copy of the image with one t, followed by a clean copy if the context is `clean_copy`."""

    def __init__(self, settings: ObjectiveConfig) -> None:
        super().__init__(settings)
        self.section = settings.transfusion
        self.copies = 2 if self.section.context == "clean_copy" else 1
        self.lead = int("token" in self.section.time_input)

    def blocks(self, site: ImageSite, rng: np.random.Generator) -> list[Block]:
        t = float(self.times(torch.scalar_tensor(site.quantile, dtype=torch.float64), site.grid))
        # An image whose caption was dropped trains the unconditional model, so it needs every t.
        if self.section.context == "capped" and site.text_after and not site.text_before:
            t = self.section.cap + (1 - self.section.cap) * t
        n = site.grid[0] * site.grid[1]
        draws = {"t": np.full(n, t, dtype=np.float32)}
        noised = self._block(draws, noised=self.copies == 2, key=site.key)
        return [noised, self.context(site.grid)] if noised.noised else [noised]

    def context(self, grid: Grid) -> Block:
        n = grid[0] * grid[1]
        return self._block({"t": np.ones(n, dtype=np.float32)}, loss=False)

    def _block(self, draws: dict[str, Floats], noised: bool = False, loss: bool = True, key: int = 0) -> Block:
        return Block(np.arange(len(draws["t"])), draws, self.bidirectional, noised, loss, key, self.lead)


@dataclass(frozen=True)
class Noised:
    """What the loss of a batch needs: patches, their times, and the memory of the projection."""

    batch: Batch
    t_I: Tensor
    memory: Tensor | None


class Projections(nn.Module):
    """The entry and the exit of a patch projection."""

    def __init__(self, projection: PatchProjection) -> None:
        super().__init__()
        self.enter = projection.entry()
        self.leave = projection.exit()


class TransfusionObjective(ImageObjective):
    """Transfusion (Zhou et al. 2024): noisy patches enter the backbone, which is the denoiser.

    All patches of an image have the same t and attend to each other in both directions. A solver generates them
    together.
    """

    Layout = TransfusionLayout
    whole_images = True

    def __init__(self, settings: ObjectiveConfig, patcher: PatcherConfig, width: int) -> None:
        super().__init__(settings, patcher, width)
        self.flow = ImageFlow(settings)
        self.ways = settings.transfusion.time_input
        self.projection = Projections(build_projection(patcher, width))
        self.time = TimeEmbedding(width)
        self.place = CellEmbedding(width)  # the name in checkpoints
        self.modulation = OutputModulation(width) if "adaln" in self.ways else None

    def _enter(self, z_IP: Tensor, t_I: Tensor, cells: Cells) -> tuple[Tensor, Tensor | None]:
        entered, memory = self.projection.enter.enter(z_IP, t_I, cells)
        if "addition" in self.ways:
            entered = entered + self.time(t_I)
        return entered + self.place(cells.cell_I2), memory

    def _leave(self, hidden_ID: Tensor, memory: Tensor | None, t_I: Tensor, cells: Cells) -> Tensor:
        if self.modulation is not None:
            hidden_ID = self.modulation(hidden_ID, self.time(t_I))
        return self.projection.leave.leave(hidden_ID, memory, t_I, cells)

    def embed(self, batch: Batch) -> Embedded:
        at_J, t_I = batch.loss_at_J, batch.draws["t"].to(batch.x_IP.dtype)
        path = self.flow.path_of(batch.image_patches.to(t_I.dtype))
        noise_JP = path.sigma(t_I[at_J]).unsqueeze(-1) * batch.eps_JKP[:, 0].to(batch.x_IP.dtype)
        # Patches that are not learned are clean.
        z_IP = (path.alpha(t_I.unsqueeze(-1)) * batch.x_IP).index_add(0, at_J, noise_JP)
        values, memory = self._enter(z_IP, t_I, batch.cells)
        at = batch.at_I
        if self.layout.lead:
            # The time token of a copy is in front of its first patch.
            counts = [copy.grid[0] * copy.grid[1] for copy in batch.copies]
            first_C = torch.tensor([*accumulate(counts, initial=0)][:-1], dtype=torch.long).to(at.device)
            at = torch.cat([at, at[first_C] - 1])
            values = torch.cat([values, self.time(t_I[first_C])])
        return Embedded(at, values, batch.at_I[at_J], Noised(batch, t_I, memory))

    def loss(self, hidden_JD: Tensor, state: Any) -> Tensor:
        noised: Noised = state
        batch, j = noised.batch, noised.batch.loss_at_J
        t_J, memory = noised.t_I[j], None if noised.memory is None else noised.memory[j]
        output = self._leave(hidden_JD, memory, t_J, batch.learned_cells)
        return self.flow.loss(output, batch.x_IP[j], batch.eps_JKP[:, 0].to(t_J.dtype), t_J, batch.image_patches)

    def generate(self, spec: ImageSpec) -> Drawing:
        rows, n, length = spec.noise_RNP.shape
        device = spec.noise_RNP.device
        cell_I2 = torch.from_numpy(raster(spec.grid)).to(device).repeat(rows, 1)
        cells = Cells(torch.arange(rows, device=device).repeat_interleave(n), cell_I2, [spec.grid] * rows)
        flow = self.flow.draw(
            FlowSpec(
                spec.sample,
                spec.noise_RNP,
                spec.noise,
                guidance_of(spec.sample),
                n,
                given=spec.given,
                previews=spec.previews,
                start=spec.start,
                guide=spec.guide,
            )
        )
        try:
            z_RNP, t, preview = next(flow)
            while True:
                z_IP, t_I = z_RNP.reshape(rows * n, length), t.expand(rows * n)
                values, memory = self._enter(z_IP, t_I, cells)
                inputs_RND = values.view(rows, n, -1)
                if self.layout.lead:
                    inputs_RND = torch.cat([self.time(t.expand(rows, 1)), inputs_RND], dim=1)
                hidden_GRND = yield BackboneCall(inputs_RND, self.layout.bidirectional, False, preview)
                patches_GRND = hidden_GRND[:, :, self.layout.lead :]
                outputs = [self._leave(h.reshape(rows * n, -1), memory, t_I, cells) for h in patches_GRND]
                z_RNP, t, preview = flow.send([out.view_as(z_RNP) for out in outputs])
        except StopIteration as stop:
            clean: Tensor = stop.value
            return clean

    def replay(self, replay: Replay) -> None:
        """Draw an image again: each evaluation of the solver is one forward pass of training with its z and t."""
        image, steps = replay.image, count()
        path = self.flow.path_of(len(image.noise_NP))

        def output(trained: Trained, t: Tensor) -> Tensor:
            j = trained.at_J
            cells = trained.batch.cells_at(j, trained.batch.image_I[j].tolist())
            noised: Noised = trained.state
            memory = None if noised.memory is None else noised.memory[j]
            return self._leave(trained.hidden_JD, memory, t.expand(len(j)), cells).unsqueeze(0)

        def outputs(z: Tensor, t: Tensor) -> list[Tensor]:
            def put(batch: Batch, at: Tensor) -> None:
                # z is given as data alone or as noise alone, whichever has the larger weight.
                data, learned = bool(path.alpha(t) > path.sigma(t)), torch.isin(batch.loss_at_J, at)
                batch.x_IP[at], batch.draws["t"][at] = z[0] / path.alpha(t) if data else 0.0, t
                batch.eps_JKP[learned, 0] = 0.0 if data else z[0] / path.sigma(t)

            step = next(steps)
            return [output(trained, t) for trained in replay.train(f"t = {float(t):.2f}", slice(step, step + 1), put)]

        drawn = redraw(
            self.flow,
            outputs,
            image.noise_NP.unsqueeze(0),
            lane_scales(image.sample),
            image,
            recorded(draw.unsqueeze(0) for draw in image.draws),
        )
        replay.compare("", image.x_NP, drawn[0])
