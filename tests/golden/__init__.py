"""Recorded results of small runs: what a change that should compute the same must reproduce."""
