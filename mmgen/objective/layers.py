"""Layers that objectives share: embeddings of time and cell, and the patch projections.

Suffixes: I patches of a batch, P numbers per patch, D width, s pixels along the side of a patch, C channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmgen.config import PatcherConfig, choose
from mmgen.objective.convolution import ImageMap, OutputConv, PixelConv, ResidualBlock, enlarged, prime_factors
from mmgen.sequence.batch import Cells


class TimeEmbedding(nn.Module):
    """Sine and cosine features of t, followed by a two-layer network (Nichol and Dhariwal 2021)."""

    def __init__(self, width: int, features: int = 64) -> None:
        super().__init__()
        self.features = features
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """Times [...] in [0, 1] to embeddings [..., D]."""
        (weight, *_) = self.mlp.parameters()
        half = self.features // 2
        exponent = torch.arange(half, device=t.device, dtype=torch.float32) / half
        angle = 1000.0 * t.float().unsqueeze(-1) * 1e-4**exponent
        features = torch.cat([angle.sin(), angle.cos()], dim=-1).to(weight.dtype)
        embedded: Tensor = self.mlp(features)
        return embedded


class CellEmbedding(nn.Module):
    """Sine and cosine features of row and column, projected to the width. It is defined for grids of any size.

    The features of an axis follow Vaswani et al. 2017, section 3.5, with a longest wavelength of 1,000 patches.
    """

    def __init__(self, width: int, features: int = 64) -> None:
        super().__init__()
        self.features = features
        self.project = nn.Linear(features, width, bias=False)

    def forward(self, cell_I2: Tensor) -> Tensor:
        """Integer cells (row, column) [..., 2] to embeddings [..., D]."""
        weight = self.project.weight
        quarter = self.features // 4
        # In bf16 the angles of a row of 64 patches would be wrong by up to 5 %.
        dtype = torch.promote_types(weight.dtype, torch.float32)
        exponent = torch.arange(quarter, device=weight.device, dtype=dtype) / quarter
        angle = cell_I2.to(dtype).unsqueeze(-1) * 1000.0**-exponent
        features = torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(-2).to(weight.dtype)
        embedded: Tensor = self.project(features)
        return embedded


class PatchEntry(nn.Module, ABC):
    """The map from patches to the width of the backbone."""

    mixes: bool = False
    """Whether the output at a patch depends on other patches of its image. Causal orders reject such a map."""

    @abstractmethod
    def enter(self, x_IP: Tensor, t_I: Tensor, cells: Cells) -> tuple[Tensor, Tensor | None]:
        """Patches [I, P] at times [I] to inputs [I, D], and a memory [I, ...] for the exit, or None.

        The memory can hold, for example, the skip connections of a U-Net. `cells` has the image and the cell of each
        patch. In the masked order of MAR and in Transfusion, the patches of an image are always passed together.
        """


class PatchExit(nn.Module, ABC):
    """The map from hidden states to patches."""

    @abstractmethod
    def leave(self, hidden_ID: Tensor, memory: Tensor | None, t_I: Tensor, cells: Cells) -> Tensor:
        """Hidden states [I, D] to patches [I, P], which are zero at initialisation.

        `memory` is the memory that `PatchEntry.enter` returned for these patches. The patches of an image are always
        passed together.
        """


class ProjectionError(ValueError):
    """The patch projection does not fit the objective."""


class PatchProjection(ABC):
    """How patches enter and leave the backbone. The same class works with every objective.

    Transfusion uses both maps. MAR uses only the entry, because its head draws the patches.
    """

    skips: bool = False
    """Whether the exit needs the memory of the entry, as a U-Net does. An objective without an exit rejects it."""

    def __init__(self, settings: PatcherConfig, width: int) -> None:
        self.settings, self.width = settings, width

    @abstractmethod
    def entry(self) -> PatchEntry:
        """Create the entry."""

    @abstractmethod
    def exit(self) -> PatchExit:
        """Create the exit."""


class OutputLinear(nn.Linear):
    """A linear map that is zero at initialisation, so that a new model predicts zero."""


class OutputModulation(nn.Module):
    """The last layer's shift and scale of a normalised hidden state, computed from the time (Peebles and Xie 2023).

    Shift and scale are zero at initialisation.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = OutputLinear(width, 2 * width)

    def forward(self, hidden_ID: Tensor, time_ID: Tensor) -> Tensor:
        """Hidden states and time embeddings [I, D] to [I, D]."""
        shift, scale = self.modulation(F.silu(time_ID)).chunk(2, dim=-1)
        out: Tensor = self.norm(hidden_ID) * (1 + scale) + shift
        return out


class LinearEntry(nn.Linear, PatchEntry):
    """One linear map, applied to each patch."""

    def enter(self, x_IP: Tensor, t_I: Tensor, cells: Cells) -> tuple[Tensor, Tensor | None]:
        return self(x_IP), None


class BottleneckEntry(nn.Sequential, PatchEntry):
    """Two linear maps with a narrow layer between them (Li and He 2025, JiT, section 4.3)."""

    def enter(self, x_IP: Tensor, t_I: Tensor, cells: Cells) -> tuple[Tensor, Tensor | None]:
        return self(x_IP), None


class LinearExit(OutputLinear, PatchExit):
    """One linear map from each hidden state to its patch."""

    def leave(self, hidden_ID: Tensor, memory: Tensor | None, t_I: Tensor, cells: Cells) -> Tensor:
        patches: Tensor = self(hidden_ID)
        return patches


class LinearProjection(PatchProjection):
    """One linear map in, and one linear map out."""

    def entry(self) -> PatchEntry:
        return LinearEntry(self.settings.patch_length, self.width)

    def exit(self) -> PatchExit:
        return LinearExit(self.width, self.settings.patch_length)


class BottleneckProjection(LinearProjection):
    """Two linear maps in, with `model.patcher.bottleneck` channels between them, and one linear map out."""

    def entry(self) -> PatchEntry:
        narrow = nn.Linear(self.settings.patch_length, self.settings.bottleneck, bias=False)
        return BottleneckEntry(narrow, nn.Linear(self.settings.bottleneck, self.width))


class ConvEntry(PatchEntry):
    """One linear map, plus a linear map of a convolution over the image."""

    mixes = True

    def __init__(self, settings: PatcherConfig, width: int) -> None:
        super().__init__()
        self.side, channels = settings.patch_size, settings.conv_channels
        self.linear = nn.Linear(settings.patch_length, width)
        self.conv = PixelConv(settings.patch_length // self.side**2, channels)
        self.project = nn.Linear(channels * self.side**2, width)

    def enter(self, x_IP: Tensor, t_I: Tensor, cells: Cells) -> tuple[Tensor, Tensor | None]:
        seen = F.silu(self.conv(pixels(x_IP, self.side), ImageMap(cells)))
        return self.linear(x_IP) + self.project(seen.flatten(1)), None


class ConvExit(PatchExit):
    """One linear map, plus two convolutions over the image, which see across the edges of patches."""

    def __init__(self, settings: PatcherConfig, width: int) -> None:
        super().__init__()
        self.side, self.channels = settings.patch_size, settings.conv_channels
        self.linear = OutputLinear(width, settings.patch_length)
        self.project = nn.Linear(width, self.channels * self.side**2)
        self.conv = PixelConv(self.channels, self.channels)
        self.last = OutputConv(self.channels, settings.patch_length // self.side**2)

    def leave(self, hidden_ID: Tensor, memory: Tensor | None, t_I: Tensor, cells: Cells) -> Tensor:
        images = ImageMap(cells)
        h = F.silu(self.conv(pixels(self.project(hidden_ID), self.side), images))
        patches: Tensor = self.linear(hidden_ID) + self.last(h, images).flatten(1)
        return patches


class ConvProjection(PatchProjection):
    """Linear maps in and out, each next to convolutions that see across the edges of patches."""

    def entry(self) -> PatchEntry:
        return ConvEntry(self.settings, self.width)

    def exit(self) -> PatchExit:
        return ConvExit(self.settings, self.width)


class UNetBlocks(nn.Module):
    """What the down blocks and the up blocks of a U-Net share: its resolutions, and the embedding of the time.

    The first resolution is that of pixels, the last one that of patches; each prime factor of the patch size is a step
    from one to the next, which doubles the number of channels.
    """

    def __init__(self, settings: PatcherConfig) -> None:
        super().__init__()
        self.side, self.depth = settings.patch_size, settings.conv_depth
        self.factors = prime_factors(self.side)
        self.sides = [self.side]
        for factor in self.factors:
            self.sides.append(self.sides[-1] // factor)
        self.channels = [settings.conv_channels * 2**level for level in range(len(self.sides))]
        self.time_width = 4 * settings.conv_channels
        self.time = TimeEmbedding(self.time_width)
        self.blocks = nn.ModuleList()

    def of_level(self, level: int) -> nn.ModuleList:
        """The residual blocks of a resolution; level 0 is that of pixels."""
        return self.blocks[level * self.depth : (level + 1) * self.depth]


class UNetDown(UNetBlocks, PatchEntry):
    """Residual blocks and strided convolutions from the pixels to one vector per patch; the memory is their outputs."""

    mixes = True

    def __init__(self, settings: PatcherConfig, width: int) -> None:
        super().__init__(settings)
        self.stem = PixelConv(settings.patch_length // self.side**2, self.channels[0])
        self.blocks = nn.ModuleList(
            ResidualBlock(wide, wide, self.time_width) for wide in self.channels for _ in range(self.depth)
        )
        steps = zip(pairwise(self.channels), self.factors, strict=True)
        self.down = nn.ModuleList(PixelConv(fine, coarse, factor) for (fine, coarse), factor in steps)
        self.leave = nn.Linear(self.channels[-1], width)

    def enter(self, x_IP: Tensor, t_I: Tensor, cells: Cells) -> tuple[Tensor, Tensor | None]:
        images, time_IE = ImageMap(cells), self.time(t_I)
        h = self.stem(pixels(x_IP, self.side), images)
        skips: list[Tensor] = []
        for level in range(len(self.sides)):
            h = self.down[level - 1](h, images) if level else h
            for block in self.of_level(level):
                h = block(h, time_IE, images)
            skips.append(h.flatten(1))
        return self.leave(h.flatten(1)), torch.cat(skips, dim=1)


class UNetUp(UNetBlocks, PatchExit):
    """Residual blocks and enlargements from hidden states to pixels; the memory joins them at each resolution."""

    def __init__(self, settings: PatcherConfig, width: int) -> None:
        super().__init__(settings)
        self.enter = nn.Linear(width, self.channels[-1])
        self.blocks = nn.ModuleList(
            ResidualBlock(wide if number else 2 * wide, wide, self.time_width)
            for wide in self.channels
            for number in range(self.depth)
        )
        self.up = nn.ModuleList(PixelConv(coarse, fine) for fine, coarse in pairwise(self.channels))
        self.norm = nn.LayerNorm(self.channels[0])
        self.last = OutputConv(self.channels[0], settings.patch_length // self.side**2)

    def leave(self, hidden_ID: Tensor, memory: Tensor | None, t_I: Tensor, cells: Cells) -> Tensor:
        assert memory is not None
        images, time_IE = ImageMap(cells), self.time(t_I)
        lengths = [side**2 * wide for side, wide in zip(self.sides, self.channels, strict=True)]
        skips = memory.split(lengths, dim=1)
        h = pixels(self.enter(hidden_ID), 1)
        for level in reversed(range(len(self.sides))):
            h = torch.cat([h, pixels(skips[level], self.sides[level]).to(h.dtype)], dim=-1)
            for block in self.of_level(level):
                h = block(h, time_IE, images)
            if level:
                h = self.up[level - 1](enlarged(h, self.factors[level - 1]), images)
        patches: Tensor = self.last(F.silu(self.norm(h)), images).flatten(1)
        return patches


class UNetProjection(PatchProjection):
    """Down blocks of a U-Net in and up blocks out, with skip connections around the backbone (Zhou et al. 2024)."""

    skips = True

    def entry(self) -> PatchEntry:
        return UNetDown(self.settings, self.width)

    def exit(self) -> PatchExit:
        return UNetUp(self.settings, self.width)


def pixels(x_IP: Tensor, side: int) -> Tensor:
    """Patches [I, s * s * C] to their pixels [I, s, s, C]."""
    return x_IP.reshape(len(x_IP), side, side, x_IP.shape[1] // side**2)


PROJECTIONS: dict[str, type[PatchProjection]] = {
    "linear": LinearProjection,
    "bottleneck": BottleneckProjection,
    "conv": ConvProjection,
    "unet": UNetProjection,
}
"""Name of a patch projection, the value of `model.patcher.projection`, to its class."""


def build_projection(settings: PatcherConfig, width: int) -> PatchProjection:
    """The projection `model.patcher.projection`. An unknown name raises a ValueError."""
    projection: PatchProjection = choose(PROJECTIONS, settings.projection, "model.patcher.projection")(settings, width)
    return projection
