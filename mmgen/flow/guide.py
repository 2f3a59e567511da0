"""Classifier-free guidance."""

from __future__ import annotations

import torch
from torch import Tensor


def classifier_free(
    conditional: Tensor, unconditional: Tensor, t: Tensor, scale: float, interval: tuple[float, float] = (0.0, 1.0)
) -> Tensor:
    """v_u + w (v_c - v_u) with w = `scale` for t inside `interval` and w = 1 outside.

    w = 0 is unconditional, w = 1 conditional (Ho and Salimans 2022, with w one larger than theirs);
    the interval is that of Kynkäänniemi et al. 2024. `t` broadcasts against the velocities.
    """
    low, high = interval
    weight = torch.where((t >= low) & (t <= high), scale, 1.0).to(conditional.dtype)
    return unconditional + weight * (conditional - unconditional)
