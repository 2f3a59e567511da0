"""Checkpoints: writing, reading, averaged weights of any width, and export."""
