"""Data sets of the lab, and distances between sets of points."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

MEANS = torch.tensor([[1.5, 0.0], [-0.8, 1.2], [-0.6, -1.4]], dtype=torch.float64)
"""Means of the lab's mixture of three Gaussians, [3, 2]."""


def spiral(count: int, generator: torch.Generator | None = None) -> Tensor:
    """Points on a spiral of two turns and length 13 inside the disc of radius 2, without noise, [count, 2]."""
    u = torch.rand(count, generator=generator)
    angle = 4 * math.pi * u.sqrt()
    radius = 2 * angle / (4 * math.pi)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1)


def moons(count: int, generator: torch.Generator | None = None) -> Tensor:
    """Two interleaved half circles with a little noise, [count, 2]."""
    angle = math.pi * torch.rand(count, generator=generator)
    upper = torch.rand(count, generator=generator) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos()) - 0.5
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin()) - 0.25
    noise = 0.05 * torch.randn(count, 2, generator=generator)
    return 1.4 * torch.stack([x, y], 1) + noise


def drawn_text(text: str, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Points drawn uniformly from the ink of a word, [count, 2]."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(60)
    left, top, right, bottom = (int(side) for side in font.getbbox(text))
    picture = Image.new("L", (right - left + 8, bottom - top + 8))
    ImageDraw.Draw(picture).text((4 - left, 4 - top), text, fill=255, font=font)
    ink = torch.from_numpy(np.argwhere(np.asarray(picture) > 128).astype(np.float32))
    chosen = ink[torch.randint(len(ink), (count,), generator=generator)] + torch.rand(count, 2, generator=generator)
    centre = torch.tensor([picture.height / 2, picture.width / 2])
    placed: Tensor = ((chosen - centre) * 4.0 / picture.width).flip(1) * torch.tensor([1.0, -1.0])
    return placed


def plane(dimension: int, seed: int = 0) -> Tensor:
    """Two orthonormal directions in `dimension` dimensions, [2, dimension]."""
    g = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(dimension, 2, generator=g))
    axes: Tensor = q.T.contiguous()
    return axes


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 handwritten digits, [1797, 64] in [-1, 1], and their labels, [1797]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.from_numpy(data.data.astype(np.float32)) / 8 - 1, torch.from_numpy(data.target)


def sliced_w2(a: Tensor, b: Tensor, directions: int = 128) -> float:
    """Sliced 2-Wasserstein distance of two sets of equally many points [n, D], over fixed random directions."""
    g = torch.Generator().manual_seed(0)
    u = torch.nn.functional.normalize(torch.randn(a.shape[1], directions, generator=g), dim=0).to(a.dtype)
    return float(((a @ u).sort(0).values - (b @ u).sort(0).values).square().mean().sqrt())


def near(points: Tensor, reference: Tensor) -> float:
    """Mean distance from each of `points` to the nearest of `reference`."""
    return float(torch.cdist(points, reference).min(1).values.mean())
