"""Benchmarks: each one times mmgen and a reference in alternating rounds."""
