"""Layers that objectives share: embeddings of time and cell, and the patch projections.

Suffixes: I patches of a batch, P numbers per patch, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from mmgen.config import PatcherConfig, choose
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


class PatchProjection(ABC):
    """How patches enter and leave the backbone. The same class works with every objective.

    Transfusion uses both maps. MAR uses only the entry, because its head draws the patches.
    """

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


PROJECTIONS: dict[str, type[PatchProjection]] = {"linear": LinearProjection, "bottleneck": BottleneckProjection}
"""Name of a patch projection, the value of `model.patcher.projection`, to its class."""


def build_projection(settings: PatcherConfig, width: int) -> PatchProjection:
    """The projection `model.patcher.projection`. An unknown name raises a ValueError."""
    projection: PatchProjection = choose(PROJECTIONS, settings.projection, "model.patcher.projection")(settings, width)
    return projection
