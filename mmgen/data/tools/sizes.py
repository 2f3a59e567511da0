"""`mmgen data buckets`: propose the image sizes to declare, from the sizes of the images in the index."""

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
"""Largest ratio of the sides of a proposed size."""
Size = tuple[int, int]
"""(height, width) in pixels."""
Floats = NDArray[np.float64]


def image_sizes(patterns: Patterns, tokenizer: Tokenizer, config: Config) -> Counter[Size]:
    """The number of images of each size, from the indexes of the shards; missing indexes are made."""
    shards, images = expand(patterns), Counter[Size]()
    ensure_all(shards, tokenizer, config.data)
    for shard in shards:
        index = ensure(shard, tokenizer, config.data)
        here = index.column("kind_s") == IMAGE
        sizes = np.stack([index.column("height_s")[here], index.column("width_s")[here]], axis=1)
        kinds, counts = np.unique(sizes, axis=0, return_counts=True)
        images.update({(h, w): n for (h, w), n in zip(kinds.tolist(), counts.tolist(), strict=True)})
    return images


def candidates(pixels: int, patch_size: int) -> list[Size]:
    """The largest sizes of whole patches with at most `pixels` pixels, one for each height and each width.

    Raises:
        ValueError: a single patch has more pixels.
    """
    patches = pixels // patch_size**2
    sides = range(1, math.isqrt(OBLONG * patches) + 1)
    grids = {(side, patches // side) for side in sides} | {(patches // side, side) for side in sides}
    fitting = [(r, c) for r, c in grids if r and c and max(r, c) <= OBLONG * min(r, c)]
    if not fitting:
        raise ValueError(f"{pixels} pixels hold no patch of {patch_size}x{patch_size}: raise --pixels")
    return sorted(((r * patch_size, c * patch_size) for r, c in fitting), key=lambda size: size[0] / size[1])


def kept(sizes_N2: NDArray[np.int64], declared: Sequence[Size]) -> Floats:
    """The share of each image's area that remains after it is scaled to cover its declared size and cropped."""
    chosen = np.array(declared, dtype=np.float64)[nearest_size(sizes_N2, declared)]
    own_N2 = np.asarray(sizes_N2, dtype=np.float64)
    return np.asarray(np.exp(-np.abs(np.log(own_N2[:, 0] / own_N2[:, 1]) - np.log(chosen[:, 0] / chosen[:, 1]))))


def choose_sizes(counts: Counter[Size], pixels: int, patch_size: int, most: int) -> list[Size]:
    """At most `most` of the candidates, chosen so that cropping removes least area; fewer if more do not help.

    An image is assigned to the size with the nearest logarithm of the aspect ratio, and loses 1 - exp(-distance) of its
    area. The loss between two adjacent sizes of the choice does not depend on the other sizes, so dynamic programming
    over the sorted candidates is exact.
    """
    offered = candidates(pixels, patch_size)
    at_C = np.log([h / w for h, w in offered])
    ratios = sorted((math.log(h / w), n) for (h, w), n in counts.items())
    x_N, n_N = np.array([x for x, _ in ratios]), np.array([n for _, n in ratios], dtype=np.float64)
    lost_CN = n_N * (1 - np.exp(-np.abs(at_C[:, None] - x_N)))
    sum_CN = np.concatenate([np.zeros((len(offered), 1)), np.cumsum(lost_CN, axis=1)], axis=1)

    def between(low: int, high: int) -> float:
        """The loss of the images between candidates `low` and `high` if no candidate between them is chosen."""
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
    """Image sizes to declare, and the share of the images' area that they keep."""

    images: int
    image_sizes: list[Size]
    area_kept: float
    area_kept_now: float
    """The share that the sizes declared now keep."""
    enlarged: float
    """Share of images that are smaller than their size."""
    shares: list[float]
    """Share of images that are assigned to each size."""

    def as_dict(self) -> dict[str, object]:
        """The fields as a dictionary, for JSON."""
        shares = {f"{h}x{w}": share for (h, w), share in zip(self.image_sizes, self.shares, strict=True)}
        return {**asdict(self), "image_sizes": [list(size) for size in self.image_sizes], "shares": shares}


def propose(patterns: Patterns, tokenizer: Tokenizer, config: Config, most: int, pixels: Size) -> Proposal:
    """Propose `model.patcher.image_sizes`, and compare the area that they keep with that of the present sizes.

    Raises:
        FileNotFoundError: a shard does not exist.
        ValueError: there are no images, or a single patch has more than `pixels` pixels.
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
