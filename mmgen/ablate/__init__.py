"""Ablations: arms of settings made equal, trained and scored with several seeds, and compared."""

from mmgen.ablate.arms import AblationFile, Arm, read
from mmgen.ablate.runs import SCORES, VAL_BY_CELL, Comparison, ablate
from mmgen.ablate.statistics import Difference, Differences, Interval, Intervals

__all__ = [
    "SCORES",
    "VAL_BY_CELL",
    "AblationFile",
    "Arm",
    "Comparison",
    "Difference",
    "Differences",
    "Interval",
    "Intervals",
    "ablate",
    "read",
]
