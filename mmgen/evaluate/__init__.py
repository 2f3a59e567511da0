"""Scores: what a picture shows, how good a set of pictures is, and the report of a run."""
