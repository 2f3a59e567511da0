"""Layers that objectives share: embeddings of time and cell, and how patches enter and leave the backbone.

Suffixes: I patches of a batch, P numbers per patch, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from mmgen.config import PatcherConfig, choose
from mmgen.sequence.batch import Cells


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


class CellEmbedding(nn.Module):
    """Sin-cos features of row and column, projected to the width; defined for grids never seen.

    Features per axis as in Vaswani et al. 2017, section 3.5, with the longest wavelength cut to 1,000 patches.
    """

    def __init__(self, width: int, features: int = 64) -> None:
        super().__init__()
        self.features = features
        self.project = nn.Linear(features, width, bias=False)

    def forward(self, cell_I2: Tensor) -> Tensor:
        """[..., 2] integer cells to [..., D]."""
        weight = self.project.weight
        quarter = self.features // 4
        exponent = torch.arange(quarter, device=weight.device, dtype=weight.dtype) / quarter
        angle = cell_I2.to(weight.dtype).unsqueeze(-1) * 1000.0**-exponent
        embedded: Tensor = self.project(torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(-2))
        return embedded


class PatchEntry(nn.Module, ABC):
    """The map from patches into the backbone's width."""

    mixes: bool = False
    """Whether what enters at a patch depends on other patches of its image. Causal orders cannot have that."""

    @abstractmethod
    def enter(self, x_IP: Tensor, t_I: Tensor, cells: Cells) -> tuple[Tensor, Tensor | None]:
        """Patches [I, P] at times [I] to [I, D], and a memory for the exit.

        A memory has first axis I (for example the skip connections of a U-Net). Images are always whole.
        """


class PatchExit(nn.Module, ABC):
    """The map from hidden states to patches."""

    @abstractmethod
    def leave(self, hidden_ID: Tensor, memory: Tensor | None, t_I: Tensor, cells: Cells) -> Tensor:
        """Hidden states [I, D] to patches [I, P], zero at initialisation.

        `memory` holds the entries of these patches in what `PatchEntry.enter` returned. Images are always whole.
        """


class PatchProjection(ABC):
    """How patches enter and leave the backbone; one class serves every objective.

    Transfusion uses both maps; MAR, whose head draws the patches, uses the entry alone.
    """

    def __init__(self, settings: PatcherConfig, width: int) -> None:
        self.settings, self.width = settings, width

    @abstractmethod
    def entry(self) -> PatchEntry:
        """A new entry."""

    @abstractmethod
    def exit(self) -> PatchExit:
        """A new exit."""


class OutputLinear(nn.Linear):
    """A linear map that is zero at initialisation, so that a fresh model predicts zero."""


class LinearEntry(nn.Linear, PatchEntry):
    """One linear map of single patches."""

    def enter(self, x_IP: Tensor, t_I: Tensor, cells: Cells) -> tuple[Tensor, Tensor | None]:
        return self(x_IP), None


class BottleneckEntry(nn.Sequential, PatchEntry):
    """Two linear maps through a narrow layer (Li and He 2025, JiT, section 4.3)."""

    def enter(self, x_IP: Tensor, t_I: Tensor, cells: Cells) -> tuple[Tensor, Tensor | None]:
        return self(x_IP), None


class LinearExit(OutputLinear, PatchExit):
    """One linear map to single patches."""

    def leave(self, hidden_ID: Tensor, memory: Tensor | None, t_I: Tensor, cells: Cells) -> Tensor:
        patches: Tensor = self(hidden_ID)
        return patches


class LinearProjection(PatchProjection):
    """One linear map in and one out."""

    def entry(self) -> PatchEntry:
        return LinearEntry(self.settings.patch_length, self.width)

    def exit(self) -> PatchExit:
        return LinearExit(self.width, self.settings.patch_length)


class BottleneckProjection(LinearProjection):
    """Two linear maps in, through `model.patcher.bottleneck` channels, and one out."""

    def entry(self) -> PatchEntry:
        narrow = nn.Linear(self.settings.patch_length, self.settings.bottleneck, bias=False)
        return BottleneckEntry(narrow, nn.Linear(self.settings.bottleneck, self.width))


PROJECTIONS: dict[str, type[PatchProjection]] = {"linear": LinearProjection, "bottleneck": BottleneckProjection}


def build_projection(settings: PatcherConfig, width: int) -> PatchProjection:
    """The projection that `model.patcher.projection` names; raises ValueError for an unknown name."""
    projection: PatchProjection = choose(PROJECTIONS, settings.projection, "model.patcher.projection")(settings, width)
    return projection
