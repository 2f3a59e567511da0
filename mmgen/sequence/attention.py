"""The attention rule: which positions a position may attend to."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Sites(NamedTuple):
    """The facts about positions that the attention rule uses. All tensors have the same shape."""

    slot: Tensor
    """Index of the position in its row."""
    document: Tensor
    """Number of the document, -1 for padding."""
    block: Tensor
    """Number of the image block, -1 for tokens."""
    bidirectional: Tensor
    """Whether positions of the block attend to each other in both directions."""
    noised: Tensor
    """Whether the block is hidden from all positions outside it."""


def visible(q: Sites, k: Sites) -> Tensor:
    """The attention rule: whether position q may attend to position k. Shapes broadcast; the result is boolean.

    Attention is causal inside a document and bidirectional inside a bidirectional image block. A noisy copy of an
    image is hidden from all positions outside that copy. Every mask is derived from this function.
    """
    same_block = (q.block == k.block) & (k.block >= 0)
    reachable = (k.slot <= q.slot) | (same_block & q.bidirectional)
    return (q.document == k.document) & reachable & ~(k.noised & ~same_block)


def dense_visible(q: Sites, k: Sites | None = None) -> Tensor:
    """The rule for every pair of positions: sites [B, Q] and [B, K] (by default the same) to booleans [B, Q, K]."""
    k = q if k is None else k
    return visible(Sites(*(a.unsqueeze(2) for a in q)), Sites(*(a.unsqueeze(1) for a in k)))


def flex_rule(sites: Sites) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The rule as a `mask_mod` of FlexAttention, for sites [B, S]."""

    def mask_mod(b: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return visible(Sites(*(a[b, q] for a in sites)), Sites(*(a[b, k] for a in sites)))

    return mask_mod
