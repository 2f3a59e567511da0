"""One transformer for text and images: training, generation and fair comparison of objectives."""

__version__ = "0.1.0"
