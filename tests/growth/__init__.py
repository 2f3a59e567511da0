"""Tests of the contract for growth in CONTRIBUTING.md: each file adds one extension and changes no other file."""
