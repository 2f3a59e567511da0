"""The attention rule: which position may attend to which."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Sites(NamedTuple):
    """What the attention rule asks of a position; all tensors have one shape."""

    slot: Tensor
    """Order in the row."""
    document: Tensor
    block: Tensor
    """Number of the image block, -1 for tokens."""
    bidirectional: Tensor
    noised: Tensor


def visible(q: Sites, k: Sites) -> Tensor:
    """THE attention rule: may position q attend to position k? Shapes broadcast; the result is boolean.

    Causal inside a document, both ways inside a bidirectional image block, and a noised copy of an image
    is hidden from everything outside that copy.
    """
    same_block = (q.block == k.block) & (k.block >= 0)
    reachable = (k.slot <= q.slot) | (same_block & q.bidirectional)
    return (q.document == k.document) & reachable & ~(k.noised & ~same_block)


def dense_visible(q: Sites, k: Sites | None = None) -> Tensor:
    """The rule for every pair: sites of shape [B, Q] and [B, K] (by default the same) to [B, Q, K]."""
    k = q if k is None else k
    return visible(Sites(*(a.unsqueeze(2) for a in q)), Sites(*(a.unsqueeze(1) for a in k)))


def flex_rule(sites: Sites) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The rule as a FlexAttention `mask_mod` over sites of shape [B, S]."""

    def mask_mod(b: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return visible(Sites(*(a[b, q] for a in sites)), Sites(*(a[b, k] for a in sites)))

    return mask_mod
