"""Samplers of flow time t, as quantile functions: a uniform number in [0, 1) in, t out.

Working with quantiles lets a caller choose how the uniform numbers are made: independent, or stratified
over a batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def uniform(u: Tensor, mu: float, sigma: float) -> Tensor:
    """t uniform on [0, 1); `mu` and `sigma` play no part."""
    return u


def logit_normal(u: Tensor, mu: float, sigma: float) -> Tensor:
    """t = sigmoid(mu + sigma n), n standard normal (Esser et al. 2024, section 3.1)."""
    return torch.sigmoid(mu + sigma * torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)))


TIMES: dict[str, Callable[[Tensor, float, float], Tensor]] = {"uniform": uniform, "logit_normal": logit_normal}


def stratified(u: float, ordinal: int, count: int) -> float:
    """The `ordinal`-th of `count` uniform numbers that share one draw `u`: (u + ordinal / count) mod 1.

    Each is uniform on its own; together they fill the unit interval evenly (Kingma et al. 2021, appendix I).
    """
    return (u + ordinal / count) % 1.0
