"""Image objectives: the seam, and what stands behind it."""

from __future__ import annotations

from mmgen.config import ObjectiveConfig, choose
from mmgen.objective.interface import BackboneCall, Drawing, Embedded, Given, ImageObjective, ImageSite, ImageSpec
from mmgen.objective.mar import MARObjective
from mmgen.objective.transfusion import TransfusionObjective

__all__ = [
    "OBJECTIVES",
    "BackboneCall",
    "Drawing",
    "Embedded",
    "Given",
    "ImageObjective",
    "ImageSite",
    "ImageSpec",
    "MARObjective",
    "TransfusionObjective",
    "objective_class",
]

OBJECTIVES: dict[str, type[ImageObjective]] = {"transfusion": TransfusionObjective, "mar": MARObjective}


def objective_class(settings: ObjectiveConfig) -> type[ImageObjective]:
    """The class that `objective.kind` names; an unknown name raises a ValueError with the nearest one."""
    kind: type[ImageObjective] = choose(OBJECTIVES, settings.kind, "objective.kind")
    return kind
