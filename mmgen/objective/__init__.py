"""The registry of image objectives, and the functions that build the chosen one."""

from __future__ import annotations

from mmgen.config import ObjectiveConfig, PatcherConfig, choose
from mmgen.objective.image_flow import Given, ImageToImage, Inversion
from mmgen.objective.interface import (
    BackboneCall,
    Drawing,
    Embedded,
    ImageLayout,
    ImageObjective,
    ImageSite,
    ImageSpec,
)
from mmgen.objective.mar import MARObjective
from mmgen.objective.transfusion import TransfusionObjective

__all__ = [
    "OBJECTIVES",
    "BackboneCall",
    "Drawing",
    "Embedded",
    "Given",
    "ImageLayout",
    "ImageObjective",
    "ImageSite",
    "ImageSpec",
    "ImageToImage",
    "Inversion",
    "MARObjective",
    "TransfusionObjective",
    "build_layout",
    "build_objective",
]

OBJECTIVES: dict[str, type[ImageObjective]] = {"transfusion": TransfusionObjective, "mar": MARObjective}
"""Name of an objective, the value of `objective.kind`, to its class."""


def build_layout(settings: ObjectiveConfig) -> ImageLayout:
    """The layout of the objective `objective.kind`. An unknown name raises a ValueError."""
    kind: type[ImageObjective] = choose(OBJECTIVES, settings.kind, "objective.kind")
    return kind.Layout(settings)


def build_objective(settings: ObjectiveConfig, patcher: PatcherConfig, width: int) -> ImageObjective:
    """The objective `objective.kind` for a backbone of the given width. An unknown name raises a ValueError."""
    objective: ImageObjective = choose(OBJECTIVES, settings.kind, "objective.kind")(settings, patcher, width)
    return objective
