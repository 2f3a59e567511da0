"""`mmgen data buckets`: which image sizes to declare, chosen from the sizes that an index holds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmgen.config import Config
from mmgen.data.shards.index import IMAGE, ensure, ensure_all
from mmgen.data.shards.store import Patterns, expand
from mmgen.image.resize import nearest_size
from mmgen.sequence.tokenizer import Tokenizer

OBLONG = 4
"""Largest ratio of the sides of a size that is proposed."""
Size = tuple[int, int]
"""(height, width) in pixels."""
Floats = NDArray[np.float64]


def image_sizes(patterns: Patterns, tokenizer: Tokenizer, config: Config) -> Counter[Size]:
    """How many images of each size the shards hold, from their indexes, which are made where they are missing."""
    shards, found = expand(patterns), Counter[Size]()
    ensure_all(shards, tokenizer, config.data)
    for shard in shards:
        index = ensure(shard, tokenizer, config.data)
        here = index.column("kind_s") == IMAGE
        sizes = np.stack([index.column("height_s")[here], index.column("width_s")[here]], axis=1)
        kinds, counts = np.unique(sizes, axis=0, return_counts=True)
        found.update({(h, w): n for (h, w), n in zip(kinds.tolist(), counts.tolist(), strict=True)})
    return found


def candidates(pixels: int, patch_size: int) -> list[Size]:
    """Sizes of whole patches with at most `pixels` pixels, as large as they come at each height and width.

    Raises:
        ValueError: not one patch fits.
    """
    patches = pixels // patch_size**2
    sides = range(1, math.isqrt(OBLONG * patches) + 1)
    grids = {(side, patches // side) for side in sides} | {(patches // side, side) for side in sides}
    fitting = [(r, c) for r, c in grids if r and c and max(r, c) <= OBLONG * min(r, c)]
    if not fitting:
        raise ValueError(f"{pixels} pixels hold no patch of {patch_size}x{patch_size}: raise --pixels")
    return sorted(((r * patch_size, c * patch_size) for r, c in fitting), key=lambda size: size[0] / size[1])


def kept(sizes_N2: NDArray[np.int64], declared: Sequence[Size]) -> Floats:
    """Share of each image's area that is left once it is scaled to cover its declared size and cropped to it."""
    chosen = np.array(declared, dtype=np.float64)[nearest_size(sizes_N2, declared)]
    given = np.asarray(sizes_N2, dtype=np.float64)
    return np.asarray(np.exp(-np.abs(np.log(given[:, 0] / given[:, 1]) - np.log(chosen[:, 0] / chosen[:, 1]))))


def choose_sizes(counts: Counter[Size], pixels: int, patch_size: int, most: int) -> list[Size]:
    """At most `most` of the candidates, such that cropping takes least from the images; fewer where more do not help.

    An image goes to the nearest logarithm of its ratio of sides, and loses 1 - exp(-distance) of its area. Between two
    neighbours of the choice nothing depends on the others, so dynamic programming over the sorted candidates is exact.
    """
    offered = candidates(pixels, patch_size)
    at_C = np.log([h / w for h, w in offered])
    ratios = sorted((math.log(h / w), n) for (h, w), n in counts.items())
    x_N, n_N = np.array([x for x, _ in ratios]), np.array([n for _, n in ratios], dtype=np.float64)
    lost_CN = n_N * (1 - np.exp(-np.abs(at_C[:, None] - x_N)))
    sum_CN = np.concatenate([np.zeros((len(offered), 1)), np.cumsum(lost_CN, axis=1)], axis=1)

    def between(low: int, high: int) -> float:
        """What the images from candidate `low` to candidate `high` lose where nothing between them is chosen."""
        start, middle, end = np.searchsorted(x_N, [at_C[low], (at_C[low] + at_C[high]) / 2, at_C[high]])
        return float(sum_CN[low, middle] - sum_CN[low, start] + sum_CN[high, end] - sum_CN[high, middle])

    first_C = np.array([sum_CN[c, np.searchsorted(x_N, at_C[c])] for c in range(len(offered))])
    last_C = np.array([sum_CN[c, -1] - sum_CN[c, np.searchsorted(x_N, at_C[c])] for c in range(len(offered))])
    pairs = np.full((len(offered), len(offered)), np.inf)
    for high in range(len(offered)):
        pairs[:high, high] = [between(low, high) for low in range(high)]
    cost_C, steps, best = first_C, list[NDArray[np.int64]](), (np.inf, [0])
    for number in range(1, min(most, len(offered)) + 1):
        if number > 1:
            through = cost_C[:, None] + pairs
            steps.append(through.argmin(axis=0))
            cost_C = through.min(axis=0)
        total = cost_C + last_C
        if total.min() < best[0] - 1e-9 * n_N.sum():
            path = [int(total.argmin())]
            for step in reversed(steps):
                path.append(int(step[path[-1]]))
            best = float(total.min()), path
    return [offered[c] for c in reversed(best[1])]


@dataclass(frozen=True)
class Proposal:
    """Image sizes to declare, and what they keep of the images."""

    images: int
    image_sizes: list[Size]
    area_kept: float
    area_kept_now: float
    """By the sizes that are declared now."""
    enlarged: float
    """Share of images that are smaller than their size."""
    shares: list[float]
    """Of images, for each size."""

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        shares = {f"{h}x{w}": share for (h, w), share in zip(self.image_sizes, self.shares, strict=True)}
        return {**asdict(self), "image_sizes": [list(size) for size in self.image_sizes], "shares": shares}


def propose(patterns: Patterns, tokenizer: Tokenizer, config: Config, most: int, pixels: Size) -> Proposal:
    """Sizes for `model.patcher.image_sizes`, and what they keep of the images, beside what the present ones keep.

    Raises:
        ValueError, FileNotFoundError: a shard is missing, there are no images, or no patch fits.
    """
    counts = image_sizes(patterns, tokenizer, config)
    if not counts:
        raise ValueError("the shards hold no images: there is nothing to choose sizes from")
    patcher = config.model.patcher
    chosen = choose_sizes(counts, pixels[0] * pixels[1], patcher.patch_size, most)
    sizes, weights = np.array(list(counts)), np.array(list(counts.values()), dtype=np.float64)
    where = nearest_size(sizes, chosen)
    target = np.array(chosen)[where]
    shares = np.bincount(where, weights, len(chosen)) / weights.sum()

    def mean(values: NDArray[Any]) -> float:
        return float((values * weights).sum() / weights.sum())

    return Proposal(
        images=int(weights.sum()),
        image_sizes=chosen,
        area_kept=mean(kept(sizes, chosen)),
        area_kept_now=mean(kept(sizes, patcher.image_sizes)),
        enlarged=mean(np.any(sizes < target, axis=1)),
        shares=shares.tolist(),
    )
