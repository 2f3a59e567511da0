"""Distances between sets of pictures, each set an array of features [n, d]."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

Features = NDArray[np.float64]
DIMENSIONS = 64
"""Pictures of more features than this are projected on this many principal components of real training pictures."""


def frechet(a: Features, b: Features) -> float:
    """Return the squared Fréchet (2-Wasserstein) distance of the Gaussians fitted to two sets.

    |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a^(1/2) S_b S_a^(1/2))^(1/2)) (Dowson and Landau 1982), computed by symmetric
    eigendecompositions.
    """
    mean = np.square(a.mean(0) - b.mean(0)).sum()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ cov_b @ root), 0, None)).sum()
    return float(mean + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def frechet_unbiased(a: Features, b: Features, sizes: int = 8, draws: int = 8) -> float | None:
    """Return `frechet` extrapolated to infinitely many pictures (FD infinity, Chong and Forsyth 2020).

    The distance of n and n pictures exceeds the distance of their distributions by about c / n. For a few hundred
    pictures this excess is most of the distance. The function computes the distance of random subsets of n / 2 to n
    pictures, fits a line over 1 / n and returns its value at 1 / n = 0, which may be slightly negative. A subset takes
    the same indices from both sets, because pictures of equal index have the same caption.

    Returns None if half of the pictures are not more than the features, because the excess is then not linear in 1 / n.
    """
    n, rng = min(len(a), len(b)), np.random.default_rng(0)
    if n // 2 <= a.shape[1]:
        return None
    counts = np.linspace(n // 2, n, sizes).astype(int)
    means = []
    for count in counts:
        subsets = [rng.permutation(n)[:count] for _ in range(draws)]
        means.append(np.mean([frechet(a[subset], b[subset]) for subset in subsets]))
    return float(np.polyfit(1 / counts, means, 1)[1])


def kernel_distance(a: Features, b: Features) -> float:
    """Return the squared kernel distance (KID) of two sets: the unbiased MMD^2 of the kernel (x y / d + 1)^3.

    Binkowski et al. 2018, arXiv:1801.01401, over all pictures at once. It may be slightly negative.
    """
    n, m = len(a), len(b)
    aa, bb, ab = (polynomial_kernel(x, y, degree=3) for x, y in ((a, a), (b, b), (a, b)))
    same = (aa.sum() - np.trace(aa)) / (n * (n - 1)) + (bb.sum() - np.trace(bb)) / (m * (m - 1))
    return float(same - 2 * ab.mean())


def spread_ratio(drawn: Features, real: Features, groups: Sequence[Hashable]) -> float | None:
    """Return the mean squared distance of drawn pictures of one group, over that of the real ones.

    `groups` has the group of each picture, which is that of the real one of equal index. Groups of one picture do not
    count; without a larger one the result is None.
    """
    members = defaultdict(list)
    for i, group in enumerate(groups):
        members[group].append(i)
    several = [at for at in members.values() if len(at) > 1]
    if not several:
        return None
    variances = [[side[at].var(0, ddof=1).sum() for at in several] for side in (drawn, real)]
    below = float(np.mean(variances[1]))
    return float(np.mean(variances[0])) / below if below else None


def projection(train: Features) -> PCA | None:
    """Fit the projection on `DIMENSIONS` principal components; None if there are not more features than that."""
    if train.shape[1] <= DIMENSIONS:
        return None
    return PCA(min(DIMENSIONS, len(train) - 1), random_state=0).fit(train)


def two_sample_accuracy(a: Features, b: Features) -> float:
    """Return the cross-validated accuracy of a classifier that separates `a` from `b` (Lopez-Paz and Oquab 2017).

    It is about 0.5 for two sets of equal distribution and 1 for sets that the classifier always separates.
    """
    n = min(len(a), len(b))
    both, side = np.concatenate([a[:n], b[:n]]), np.repeat([0, 1], n)
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    return float(cross_val_score(make_pipeline(StandardScaler(), SVC(C=10)), both, side, cv=folds).mean())


def nearest_distance(a: Features, train: Features) -> float:
    """Return the Euclidean distance of a picture of `a` to the nearest one of `train`, averaged over `a`."""
    squares = np.square(a).sum(1)[:, None] + np.square(train).sum(1)[None] - 2 * a @ train.T
    return float(np.sqrt(np.clip(squares.min(1), 0, None)).mean())


def within_class_variance(classes: Mapping[int, Features]) -> float:
    """Return the variance inside each class, summed over features and averaged over classes."""
    inside = [members.var(0, ddof=1).sum() for members in classes.values() if len(members) > 1]
    return float(np.mean(inside)) if inside else 0.0


class Comparison:
    """Features of real training and held-out pictures [n, d], and the distances of other pictures to them.

    Distances use the first `n` pictures of each side, in at most `DIMENSIONS` principal components.
    """

    def __init__(self, train: Features, test: Features, n: int) -> None:
        self.n = min(n, len(test), len(train))
        self.train, self.test = train, test
        self._pca = projection(train)
        self._nearest = nearest_distance(test[: self.n], train)

    def _pair(self, drawn: Features) -> tuple[Features, Features]:
        a, b = drawn[: self.n], self.test[: self.n]
        return (self._pca.transform(a), self._pca.transform(b)) if self._pca else (a, b)

    def frechet(self, drawn: Features) -> float:
        """Return the Fréchet distance to the held-out pictures."""
        return frechet(*self._pair(drawn))

    def frechet_unbiased(self, drawn: Features) -> float | None:
        """Return that distance extrapolated to infinitely many pictures; None if there are too few pictures."""
        return frechet_unbiased(*self._pair(drawn))

    def kernel(self, drawn: Features) -> float:
        """Return the kernel distance to the held-out pictures."""
        return kernel_distance(*self._pair(drawn))

    def separable(self, drawn: Features) -> float:
        """Return the accuracy of a classifier that separates pictures from the held-out ones."""
        return two_sample_accuracy(*self._pair(drawn))

    def nearest_ratio(self, drawn: Features) -> float | None:
        """Return the mean distance to the nearest training picture, over that of held-out ones; None if that is 0."""
        return nearest_distance(drawn[: self.n], self.train) / self._nearest if self._nearest else None
