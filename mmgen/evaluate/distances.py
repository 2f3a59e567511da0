"""Distances between sets of pictures, which are rows of features [n, d]."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

Features = NDArray[np.float64]
DIMENSIONS = 64
"""More features than this are first projected on as many principal components of real training pictures."""


def frechet(a: Features, b: Features) -> float:
    """Squared Fréchet (2-Wasserstein) distance of the Gaussians fitted to two sets (Dowson and Landau 1982).

    |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a^(1/2) S_b S_a^(1/2))^(1/2)), by symmetric eigendecompositions.
    """
    mean = np.square(a.mean(0) - b.mean(0)).sum()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ cov_b @ root), 0, None)).sum()
    return float(mean + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def frechet_unbiased(a: Features, b: Features, sizes: int = 8, draws: int = 8) -> float | None:
    """`frechet` as both sets grow without end (FD infinity, Chong and Forsyth 2020); may be a little below zero.

    The distance of n and n pictures exceeds that of their distributions by about c / n, which for a few hundred
    pictures is most of it: a line through subsets of n / 2 to n pictures is followed to 1 / n = 0. Subsets take the
    same places of both sets, as pictures of the same captions stand there. None where half of them are fewer than
    the features: the excess is no line there.
    """
    n, rng = min(len(a), len(b)), np.random.default_rng(0)
    if n // 2 <= a.shape[1]:
        return None
    counts = np.linspace(n // 2, n, sizes).astype(int)
    found = []
    for count in counts:
        chosen = [rng.permutation(n)[:count] for _ in range(draws)]
        found.append(np.mean([frechet(a[places], b[places]) for places in chosen]))
    return float(np.polyfit(1 / counts, found, 1)[1])


def compress(train: Features) -> PCA | None:
    """The projection that `frechet` needs where pictures have many pixels; None where they do not."""
    return PCA(DIMENSIONS, random_state=0).fit(train) if train.shape[1] > DIMENSIONS else None


def two_sample_accuracy(a: Features, b: Features) -> float:
    """Cross-validated accuracy of telling `a` from `b`, 0.5 where they are alike (Lopez-Paz and Oquab 2017)."""
    n = min(len(a), len(b))
    both, side = np.concatenate([a[:n], b[:n]]), np.repeat([0, 1], n)
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    return float(cross_val_score(make_pipeline(StandardScaler(), SVC(C=10)), both, side, cv=folds).mean())


def nearest_distance(a: Features, train: Features) -> float:
    """Mean Euclidean distance from each picture of `a` to the nearest one of `train`."""
    squares = np.square(a).sum(1)[:, None] + np.square(train).sum(1)[None] - 2 * a @ train.T
    return float(np.sqrt(np.clip(squares.min(1), 0, None)).mean())


def within_class_variance(classes: Mapping[int, Features]) -> float:
    """Variance summed over features, inside each class, averaged over classes."""
    inside = [rows.var(0, ddof=1).sum() for rows in classes.values() if len(rows) > 1]
    return float(np.mean(inside)) if inside else 0.0
