"""One transformer over text and images: training, generation and honest comparison of objectives."""

__version__ = "0.1.0"
