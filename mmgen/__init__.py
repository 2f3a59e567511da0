"""One transformer for text and images: training, generation and fair comparison of objectives."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmgen.pipeline import MMGenPipeline

__version__ = "0.1.0"
__all__ = ["MMGenPipeline"]


def __getattr__(name: str) -> object:
    """Import `MMGenPipeline` on first use, because it imports torch."""
    if name == "MMGenPipeline":
        from mmgen.pipeline import MMGenPipeline

        return MMGenPipeline
    raise AttributeError(f"module 'mmgen' has no attribute '{name}'")
