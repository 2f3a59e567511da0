"""Layers that objectives share: embeddings of time and place, and how patch rows enter and leave the backbone.

Suffixes: I patches of a batch, P numbers per patch, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mmgen.config import PatcherConfig, choose
from mmgen.sequence.batch import Places


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


class PlaceEmbedding(nn.Module):
    """Sin-cos features of row and column, projected to the width; defined for grids never seen.

    Features per axis as in Vaswani et al. 2017, section 3.5, with the longest wavelength cut to 1,000 patches.
    """

    def __init__(self, width: int, features: int = 64) -> None:
        super().__init__()
        self.features = features
        self.project = nn.Linear(features, width, bias=False)

    def forward(self, place_I2: Tensor) -> Tensor:
        """[..., 2] integer places to [..., D]."""
        weight = self.project.weight
        quarter = self.features // 4
        exponent = torch.arange(quarter, device=weight.device, dtype=weight.dtype) / quarter
        angle = place_I2.to(weight.dtype).unsqueeze(-1) * 1000.0**-exponent
        embedded: Tensor = self.project(torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(-2))
        return embedded


class PatchProjection(nn.Module, ABC):
    """The two maps between patch rows and the backbone's width.

    `encode` may return a memory, first axis I (for example the skip connections of a U-Net); `decode` is given
    its entries of the patches it decodes, always whole images. Time and places are passed for projections that
    need them.
    """

    @abstractmethod
    def encode(self, x_IP: Tensor, t_I: Tensor, places: Places) -> tuple[Tensor, Tensor | None]:
        """Patch rows [I, P] to [I, D], and a memory for `decode`."""

    @abstractmethod
    def decode(self, hidden_ID: Tensor, memory: Tensor | None, t_I: Tensor, places: Places) -> Tensor:
        """Hidden states [I, D] to patch rows [I, P]; zero at initialisation."""


class OutputLinear(nn.Linear):
    """A linear map that is zero at initialisation, so that a fresh model predicts zero."""


def _bottleneck(settings: PatcherConfig, width: int) -> nn.Module:
    """Two linear maps through a narrow layer (Li and He 2025, JiT, section 4.3)."""
    narrow = nn.Linear(settings.patch_length, settings.bottleneck, bias=False)
    return nn.Sequential(narrow, nn.Linear(settings.bottleneck, width))


ENTRIES: dict[str, Callable[[PatcherConfig, int], nn.Module]] = {
    "linear": lambda settings, width: nn.Linear(settings.patch_length, width),
    "bottleneck": _bottleneck,
}
"""Maps of single patch rows into the backbone's width, by name of the projection."""


class LinearProjection(PatchProjection):
    """A map of single patch rows on the way in, and one linear map on the way out."""

    def __init__(self, settings: PatcherConfig, width: int) -> None:
        super().__init__()
        self.enter = ENTRIES[settings.projection](settings, width)
        self.leave = OutputLinear(width, settings.patch_length)

    def encode(self, x_IP: Tensor, t_I: Tensor, places: Places) -> tuple[Tensor, Tensor | None]:
        return self.enter(x_IP), None

    def decode(self, hidden_ID: Tensor, memory: Tensor | None, t_I: Tensor, places: Places) -> Tensor:
        leave: Tensor = self.leave(hidden_ID)
        return leave


PROJECTIONS: dict[str, Callable[[PatcherConfig, int], PatchProjection]] = {
    "linear": LinearProjection,
    "bottleneck": LinearProjection,
}


def build_projection(settings: PatcherConfig, width: int) -> PatchProjection:
    """The projection that `model.patcher.projection` names."""
    projection: PatchProjection = choose(PROJECTIONS, settings.projection, "model.patcher.projection")(settings, width)
    return projection
