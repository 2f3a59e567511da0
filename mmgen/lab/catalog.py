"""All experiments, in the order of the list."""

from __future__ import annotations

from mmgen.lab import exact, images, plane
from mmgen.lab.core import EXPERIMENTS, Experiment, check, execute

__all__ = ["EXPERIMENTS", "Experiment", "check", "exact", "execute", "images", "plane"]
