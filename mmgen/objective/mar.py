"""MAR: the backbone reads clean patches and conditions a small denoiser that draws each patch (Li et al. 2024).

In the order `masked`, a learned vector replaces most patches of an image. They are predicted under bidirectional
attention, several per step of generation. In the orders `raster` and `random`, attention is causal, and each position
predicts the next patch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mmgen.config import HeadConfig, MaskRatioConfig, ObjectiveConfig, PatcherConfig, SampleConfig
from mmgen.flow.guide import Guidance, combine
from mmgen.flow.steps import Noise
from mmgen.image.patch import Floats, Grid, raster
from mmgen.objective.image_flow import FlowSpec, Given, ImageFlow, guidance_of
from mmgen.objective.interface import (
    BackboneCall,
    Drawing,
    Embedded,
    ImageLayout,
    ImageObjective,
    ImageSite,
    ImageSpec,
)
from mmgen.objective.layers import CellEmbedding, OutputLinear, ProjectionError, TimeEmbedding, build_projection
from mmgen.objective.replay import Replay, SampledImage, Trained, lane_scales, recorded, redraw
from mmgen.sequence.batch import Batch, Cells
from mmgen.sequence.document import Block


class AdaptiveBlock(nn.Module):
    """A residual block (LayerNorm, Linear, SiLU, Linear) with shift, scale and gate computed from a condition.

    Shift, scale and gate are zero at initialisation (AdaLN-Zero).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = OutputLinear(width, 3 * width)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        """`h` and `condition` [..., W] to [..., W]; their shapes broadcast."""
        shift, scale, gate = self.modulation(condition).chunk(3, dim=-1)
        out: Tensor = h + gate * self.mlp(self.norm(h) * (1 + scale) + shift)
        return out


class PatchHead(nn.Module):
    """A residual MLP that denoises one patch, given a hidden state of the backbone (Li et al. 2024, section 3.4)."""

    def __init__(self, patch_length: int, backbone_width: int, settings: HeadConfig) -> None:
        super().__init__()
        width = settings.width
        self.enter = nn.Linear(patch_length, width)
        self.time = TimeEmbedding(width, settings.time_features)
        self.state = nn.Linear(backbone_width, width)
        self.blocks = nn.ModuleList(AdaptiveBlock(width) for _ in range(settings.depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = OutputLinear(width, 2 * width)
        self.leave = OutputLinear(width, patch_length)

    def forward(self, z: Tensor, t: Tensor, state: Tensor) -> Tensor:
        """Noisy patches `z` [..., P] at times `t` [...] to outputs [..., P].

        `state` [..., W] is `self.state` of the hidden states.
        """
        condition = nn.functional.silu(self.time(t) + state)
        h = self.enter(z)
        for block in self.blocks:
            h = block(h, condition)
        shift, scale = self.modulation(condition).chunk(2, dim=-1)
        out: Tensor = self.leave(self.norm(h) * (1 + scale) + shift)
        return out


class MARLayout(ImageLayout):
    """One causal copy of clean patches, or a copy with masked patches followed by a clean copy."""

    def __init__(self, settings: ObjectiveConfig) -> None:
        super().__init__(settings)
        self.section = settings.mar
        self.noise_draws = self.section.draws_per_patch
        self.copies = 1 if self.section.causal else 2
        if settings.bidirectional is None:
            self.bidirectional = not self.section.causal

    def blocks(self, site: ImageSite, rng: np.random.Generator) -> list[Block]:
        n, k = site.grid[0] * site.grid[1], self.section.draws_per_patch
        stratified = self.settings.time.stratified
        even = (rng.permutation(n * k) + rng.random()) / (n * k) if stratified else rng.random(n * k)
        draws = {
            "t": self.times(torch.from_numpy(even), site.grid).numpy().astype(np.float32).reshape(n, k),
            "masked": np.zeros(n, dtype=np.float32),
        }
        if self.section.causal:
            return [Block(self.order(site.grid, rng), draws, bidirectional=False, key=site.key)]
        hidden = rng.permutation(n)[: math.ceil(n * mask_ratio(site.quantile, self.section.mask_ratio))]
        draws["masked"][hidden] = 1
        learned = draws["masked"] > 0
        noised = Block(np.arange(n), draws, self.bidirectional, noised=True, loss=learned, key=site.key)
        return [noised, self.context(site.grid)]

    def context(self, grid: Grid) -> Block:
        n, k = grid[0] * grid[1], self.section.draws_per_patch
        clean: dict[str, Floats] = {
            "t": np.ones((n, k), dtype=np.float32),
            "masked": np.zeros(n, dtype=np.float32),
        }
        return Block(np.arange(n), clean, self.bidirectional, loss=False)

    def order(self, grid: Grid, rng: np.random.Generator) -> NDArray[np.int64]:
        n = grid[0] * grid[1]
        return rng.permutation(n) if self.section.order == "random" else np.arange(n)


class MARObjective(ImageObjective):
    """MAR (Li et al. 2024): the backbone conditions a small denoiser, which draws each patch."""

    Layout = MARLayout

    def __init__(self, settings: ObjectiveConfig, patcher: PatcherConfig, width: int) -> None:
        super().__init__(settings, patcher, width)
        self.section = settings.mar
        self.flow = ImageFlow(settings)
        projection = build_projection(patcher, width)
        if projection.skips:
            raise ProjectionError(
                f"model.patcher.projection '{patcher.projection}' has skip connections to its up blocks, but the head "
                "of MAR draws each patch alone and has no up blocks: set model.patcher.projection to conv (with "
                "objective.mar.order masked) or linear, or objective.kind to transfusion"
            )
        self.enter = projection.entry()
        if self.section.causal and self.enter.mixes:
            raise ProjectionError(
                f"model.patcher.projection '{patcher.projection}' mixes the patches of an image, so in the order "
                f"'{self.section.order}' a patch would depend on later patches: set objective.mar.order to masked, or "
                "model.patcher.projection to linear"
            )
        self.place = CellEmbedding(width)  # the name in checkpoints
        self.head = PatchHead(patcher.patch_length, width, self.section.head)
        self.head_place = CellEmbedding(width) if self.section.head.cell else None
        self.norm = nn.LayerNorm(width, eps=1e-6) if self.section.entry_norm else None
        if self.section.causal:
            self.next_place = CellEmbedding(width)
        else:
            self.mask_vector = nn.Parameter(torch.randn(width) * width**-0.5)

    def _enter(self, x_IP: Tensor, cells: Cells) -> Tensor:
        """Clean patches [I, P] and their cells to inputs [I, D]."""
        entered, _ = self.enter.enter(x_IP, x_IP.new_ones(len(x_IP)), cells)
        placed: Tensor = entered + self.place(cells.cell_I2)
        return placed if self.norm is None else self.norm(placed)

    def _enter_masked(self, x_IP: Tensor, masked_I: Tensor, cells: Cells) -> Tensor:
        """Patches [I, P] and their cells to inputs [I, D]; the mask vector, not normalised, replaces masked patches."""
        masked_I1 = masked_I.unsqueeze(-1)
        # Masked patches are set to zero first, because an entry may mix the patches of an image.
        x_IP = x_IP.masked_fill(masked_I1, 0)
        entered, _ = self.enter.enter(x_IP, x_IP.new_ones(len(x_IP)), cells)
        placed = torch.where(masked_I1, self.mask_vector.to(entered.dtype), entered) + self.place(cells.cell_I2)
        return placed if self.norm is None else torch.where(masked_I1, placed, self.norm(placed))

    def _condition(self, hidden: Tensor, cell: Tensor) -> Tensor:
        """Hidden states [..., D] to the condition of the head [..., W], with the cells [..., 2] that they predict."""
        if self.head_place is not None:
            hidden = hidden + self.head_place(cell).to(hidden.dtype)
        state: Tensor = self.head.state(hidden)
        return state

    def embed(self, batch: Batch) -> Embedded:
        at_J = batch.at_I[batch.loss_at_J]
        if not self.section.causal:
            values = self._enter_masked(batch.x_IP, batch.draws["masked"] > 0, batch.cells)
            return Embedded(batch.at_I, values, at_J, batch)
        values = self._enter(batch.x_IP, batch.cells)
        # Each input also holds the cell of the patch that it predicts. The last input of an image predicts no patch.
        has_next = torch.ones_like(batch.image_I, dtype=torch.bool)
        has_next[-1:] = False
        has_next[:-1] = batch.image_I[1:] == batch.image_I[:-1]
        following = self.next_place(batch.cell_I2.roll(-1, 0)) * has_next.unsqueeze(-1).to(values.dtype)
        at = torch.cat([batch.at_I, batch.size_at_M])
        values = torch.cat([values + following, self.next_place(batch.first_M2)])
        return Embedded(at, values, at_J - 1, batch)

    def loss(self, hidden_JD: Tensor, state: Any) -> Tensor:
        batch: Batch = state
        j = batch.loss_at_J
        state_J1W = self._condition(hidden_JD, batch.cell_I2[j]).unsqueeze(1)
        x_JP = batch.x_IP[j]
        if self.section.head.kind == "mse":
            return (self._regress(state_J1W, x_JP.unsqueeze(1)) - x_JP.unsqueeze(1)).square().mean(dim=(1, 2))
        t_JK, eps_JKP = batch.draws["t"][j].to(x_JP.dtype), batch.eps_JKP.to(x_JP.dtype)
        x_JKP = x_JP.unsqueeze(1).expand_as(eps_JKP)
        path = self.flow.path_of(batch.image_patches.to(x_JP.dtype).view(-1, 1, 1))
        z_JKP = path.mix(x_JKP, eps_JKP, t_JK.unsqueeze(-1))
        return self.flow.loss(self.head(z_JKP, t_JK, state_J1W), x_JKP, eps_JKP, t_JK, batch.image_patches).mean(dim=1)

    def _regress(self, state: Tensor, like: Tensor) -> Tensor:
        """Clean patches [..., P], predicted by the same head with a constant input instead of a noisy patch.

        The constant is not zero: with a zero input, layers that are zero at initialisation would get no gradient.
        """
        out: Tensor = self.head(torch.ones_like(like), torch.zeros_like(like[..., 0]), state)
        return out

    def generate(self, spec: ImageSpec) -> Drawing:
        return self._next_patches(spec) if self.section.causal else self._unmask(spec)

    def _unmask(self, spec: ImageSpec) -> Drawing:
        """Reveal patches in random order, several per step. Known patches are visible from the start."""
        rows, n, _ = spec.noise_RNP.shape
        device = spec.noise_RNP.device
        cell_N2 = torch.from_numpy(raster(spec.grid)).to(device)
        image_I = torch.arange(rows, device=device).repeat_interleave(n)
        cells = Cells(image_I, cell_N2.repeat(rows, 1), [spec.grid] * rows)
        chance_RN = spec.noise(spec.noise_RNP[..., 0])
        x_RNP = torch.zeros_like(spec.noise_RNP)
        shown_RN = torch.zeros(rows, n, dtype=torch.bool, device=device)
        done = 0
        if spec.given is not None:
            shown_RN = spec.given.mask_RN.clone()
            x_RNP = torch.where(shown_RN.unsqueeze(-1), spec.given.x_RNP, x_RNP)
            chance_RN = chance_RN.masked_fill(shown_RN, -torch.inf)
            done = int(shown_RN[0].sum())
        reveal_RN = chance_RN.argsort(dim=1)
        for count in unmask_counts(n - done, spec.sample.unmask_steps):
            values = self._enter_masked(x_RNP.flatten(0, 1), ~shown_RN.flatten(), cells).view(rows, n, -1)
            preview = x_RNP.clone() if spec.previews else None
            hidden_GRND = yield BackboneCall(values, self.layout.bidirectional, False, preview)
            now_Rn = reveal_RN[:, done : done + count]
            done += count
            lanes = len(hidden_GRND)
            at_GRnD = now_Rn.expand(lanes, -1, -1).unsqueeze(-1).expand(-1, -1, -1, hidden_GRND.shape[-1])
            at_RnP = now_Rn.unsqueeze(-1).expand(-1, -1, x_RNP.shape[-1])
            state = self._condition(hidden_GRND.gather(2, at_GRnD), cell_N2[now_Rn])
            drawn = self._draw(state, spec.noise_RNP.gather(1, at_RnP), spec, done / n)
            x_RNP = x_RNP.scatter(1, at_RnP, drawn)
            shown_RN = shown_RN.scatter(1, now_Rn, True)
        return x_RNP

    def _next_patches(self, spec: ImageSpec) -> Drawing:
        """Draw one patch at a time, each from the hidden state before it. The cache keeps every patch."""
        rows, n, length = spec.noise_RNP.shape
        cell_N2 = torch.from_numpy(raster(spec.grid)).to(spec.noise_RNP.device)
        hidden_GR1D = spec.opening_GRD.unsqueeze(2)
        x_RNP = torch.zeros_like(spec.noise_RNP)
        for i in range(n):
            at_R1 = spec.order_RN[:, i : i + 1]
            at_R1P = at_R1.unsqueeze(-1).expand(-1, -1, length)
            given = None
            if spec.given is not None:
                given = Given(spec.given.mask_RN.gather(1, at_R1), spec.given.x_RNP.gather(1, at_R1P))
            state = self._condition(hidden_GR1D, cell_N2[at_R1])
            drawn = self._draw(state, spec.noise_RNP.gather(1, at_R1P), spec, (i + 1) / n, given)
            x_RNP = x_RNP.scatter(1, at_R1P, drawn)
            if i + 1 < n:
                following = self.next_place(cell_N2[spec.order_RN[:, i + 1 : i + 2]])
                cells = Cells(torch.arange(rows, device=drawn.device), cell_N2[at_R1.squeeze(1)])
                values = self._enter(drawn.squeeze(1), cells).unsqueeze(1) + following
                hidden_GR1D = yield BackboneCall(values, False, True, x_RNP.clone() if spec.previews else None, at_R1)
        return x_RNP

    def _draw(
        self, state_GRnW: Tensor, eps_RnP: Tensor, spec: ImageSpec, share: float, given: Given | None = None
    ) -> Tensor:
        """Draw clean patches [R, n, P] from conditions of the head [G, R, n, W].

        `share` is the share of patches of the image that are drawn after this call.
        """
        guidance = guidance_of(spec.sample, lambda scale: guidance_at(share, spec.sample, scale))
        if self.section.head.kind == "mse":
            x = self._regress(state_GRnW, eps_RnP.expand(len(state_GRnW), -1, -1, -1))
            scales = [Guidance(one.scale) for one in guidance]  # a regression has no t and no interval
            mean = combine([*x], scales, x.new_ones(())) if len(x) > 1 else x[0]
            return mean if given is None else torch.where(given.mask_RN.unsqueeze(-1), given.x_RNP, mean)
        patches = spec.grid[0] * spec.grid[1]
        flow = self.flow.draw(FlowSpec(spec.sample, eps_RnP, spec.noise, guidance, patches, given))
        try:
            z, t, _ = next(flow)
            while True:
                z, t, _ = flow.send(list(self.head(z, t.to(z.dtype), state_GRnW)))
        except StopIteration as stop:
            clean: Tensor = stop.value
            return clean

    def replay(self, replay: Replay) -> None:
        """Draw an image again: from one forward pass for a causal order, from one per unmasking step for `masked`."""
        if self.section.causal:
            self._replay_next_patches(replay)
        else:
            self._replay_unmasking(replay)

    def _replay_unmasking(self, replay: Replay) -> None:
        """The order of unmasking follows from the first recorded noise; the steps follow from the settings."""
        image, n, done = replay.image, len(replay.image.noise_NP), 0
        reveal_N, further = image.draws[0].argsort(), recorded(draw.unsqueeze(0) for draw in image.draws[1:])
        for i, count in enumerate(unmask_counts(n, image.sample.unmask_steps)):
            now_n, unseen_N = reveal_N[done : done + count], torch.ones(n, dtype=torch.bool)
            unseen_N[reveal_N[:done]] = False
            done += count

            def put(batch: Batch, at: Tensor, unseen_N: Tensor = unseen_N) -> None:
                batch.x_IP[at] = image.x_NP * ~unseen_N.unsqueeze(1)
                batch.draws["masked"][at] = unseen_N.to(torch.float64)
                batch.loss_at_J = at[unseen_N]

            learned_n = unseen_N.cumsum(0)[now_n] - 1  # index among the patches that are learned in this step
            trained = replay.train(f"step {i}", slice(i, i + 1), put)
            states = [self._trained_condition(one)[learned_n].unsqueeze(0) for one in trained]
            scales = [guidance_at(done / n, image.sample, scale) for scale in lane_scales(image.sample)]
            noise_1nP = image.noise_NP[now_n].unsqueeze(0)
            drawn = self._redraw(noise_1nP, states, scales, image, further)
            replay.compare(f"step {i}", image.x_NP[now_n], drawn[0])

    def _replay_next_patches(self, replay: Replay) -> None:
        image, n = replay.image, len(replay.image.noise_NP)

        def put(batch: Batch, at: Tensor) -> None:
            batch.x_IP[at] = image.x_NP[image.order_N]

        states = [self._trained_condition(trained).unsqueeze(1) for trained in replay.train("", slice(None), put)]
        scales = [
            torch.tensor([guidance_at((k + 1) / n, image.sample, w) for k in range(n)], dtype=torch.float64).view(
                n, 1, 1
            )
            for w in lane_scales(image.sample)
        ]
        each = len(image.draws) // n  # the decoder drew the patches one after another, here they are drawn together
        further = recorded(torch.stack(image.draws[d::each]) for d in range(each))
        noise_N1P = image.noise_NP[image.order_N].unsqueeze(1)
        drawn = self._redraw(noise_N1P, states, scales, image, further)
        replay.compare("", image.x_NP[image.order_N], drawn.squeeze(1))

    def _trained_condition(self, trained: Trained) -> Tensor:
        """The condition of the head [J, W] for the learned patches of a forward pass of training."""
        return self._condition(trained.hidden_JD, trained.batch.cell_I2[trained.at_J])

    def _redraw(
        self,
        noise_RnP: Tensor,
        states: list[Tensor],
        scales: Sequence[float | Tensor],
        image: SampledImage,
        further: Noise,
    ) -> Tensor:
        """Patches [R, n, P] that the head draws from its conditions [R, n, W], one tensor for each guidance lane."""
        if self.section.head.kind == "mse":
            means = [self._regress(state, noise_RnP) for state in states]
            lanes = zip(scales, pairwise(means), strict=True)
            return sum((scale * (fuller - poorer) for scale, (fuller, poorer) in lanes), means[-1])

        def outputs(z: Tensor, t: Tensor) -> list[Tensor]:
            return [self.head(z, t, state) for state in states]

        return redraw(self.flow, outputs, noise_RnP, scales, image, further)


def mask_ratio(quantile: float, settings: MaskRatioConfig) -> float:
    """The share of hidden patches: the given `quantile` in (0, 1) of the truncated normal distribution.

    Source: Li et al. 2024, appendix B, as MAGE (Li et al. 2023) draws it.
    """
    normal = NormalDist(settings.mean, settings.std)
    # erfc is accurate in the tail. NormalDist.cdf uses it only from Python 3.12 on.
    low, high = (math.erfc((settings.mean - x) / (settings.std * math.sqrt(2))) / 2 for x in (settings.low, 1.0))
    inside = low + quantile * (high - low)
    return min(max(normal.inv_cdf(inside), settings.low), 1.0) if 0 < inside < 1 else settings.low


def unmask_counts(hidden: int, steps: int) -> list[int]:
    """The number of patches that each step reveals: floor(hidden cos(pi/2 (i+1)/T)) stay hidden after step i of T.

    Every step reveals at least one patch, so there are at most `hidden` steps (Chang et al. 2022, MaskGIT,
    section 3.2, as MAR uses it).
    """
    counts, left = [], hidden
    for i in range(min(steps, hidden)):
        stay = math.floor(hidden * math.cos(math.pi / 2 * (i + 1) / min(steps, hidden)))
        stay = 0 if i + 1 == min(steps, hidden) else max(1, min(left - 1, stay))
        if left > stay:
            counts.append(left - stay)
            left = stay
    return counts


def guidance_at(share: float, sample: SampleConfig, scale: float) -> float:
    """The guidance `scale` w at which `share` of the patches are drawn: 1 + (w - 1) share for a linear ramp."""
    return scale if sample.guidance_ramp == "constant" else 1 + (scale - 1) * share
