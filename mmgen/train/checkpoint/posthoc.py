"""EMA of any width after training, from stored power-function EMAs (Karras et al. 2024, EDM2, section 3.2)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mmgen.model import MMGenModel
from mmgen.train.checkpoint.fragments import Store
from mmgen.train.checkpoint.read import candidates
from mmgen.train.optimizer import power_exponent
from mmgen.train.state import TrainerState

PREFIX = "power_"
Floats = NDArray[np.float64]


def inner(t_a: Floats, gamma_a: Floats, t_b: Floats, gamma_b: Floats) -> Floats:
    """Inner products of averaging profiles tau^gamma (gamma + 1) / t^(gamma + 1) on [0, t] (eq. 132)."""
    ratio = (t_a / t_b) ** np.where(t_a < t_b, gamma_b, -gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) * ratio / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b))


def solve(steps: Floats, widths: Floats, step: float, width: float) -> Floats:
    """Weights of stored averages whose sum is nearest to the profile of `width` at `step`, by least squares.

    `steps` and `widths` [N] give the step and the relative width of each stored average.
    """
    gamma: Floats = np.array([power_exponent(w) for w in widths])
    t = steps.astype(np.float64)
    gram = inner(t[:, None], gamma[:, None], t[None], gamma[None])
    target = inner(t, gamma, np.full_like(t, step), np.full_like(t, power_exponent(width)))
    weights: Floats = np.linalg.pinv(gram) @ target
    return weights


def fill(model: MMGenModel, run: Path, folder: Path, width: float) -> None:
    """Fill a model with the EMA of relative width `width` at the step of checkpoint `folder`.

    It is computed from the power-function EMAs of all kept checkpoints of `run` up to that step.

    Raises:
        ValueError: fewer than two of them are stored (train.ema_power, train.keep_every).
    """
    last = _steps(folder)
    stored = []
    for path in candidates(run):
        if _steps(path) <= last:
            store = Store(path)
            kinds = sorted(kind for kind in store.kinds() if kind.startswith(PREFIX))
            stored += [(store, kind, _steps(path), float(kind.removeprefix(PREFIX))) for kind in kinds]
    if len(stored) < 2:
        raise ValueError(
            f"{run} holds {len(stored)} power-function EMAs, and power:WIDTH needs two or more: train with "
            "train.ema_power (two widths, such as 0.05 and 0.1) and train.keep_every"
        )
    weights = solve(np.array([s for _, _, s, _ in stored]), np.array([w for *_, w in stored]), last, width)

    def mix(name: str) -> torch.Tensor:
        parts = [
            weight * store.whole(kind, name).double()
            for weight, (store, kind, _, _) in zip(weights, stored, strict=True)
        ]
        return torch.stack(parts).sum(0)

    stored[0][0].fill(model, "weight", mix)


def _steps(folder: Path) -> int:
    return TrainerState.from_json((folder / "trainer.json").read_text()).optimizer_steps
