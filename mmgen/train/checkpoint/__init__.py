"""Checkpoints: reading, writing, averages and export."""
