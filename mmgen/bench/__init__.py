"""Speed against a floor, in one interleaved run."""
