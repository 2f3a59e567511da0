"""Scores of a trained model: tasks that read pictures, metrics, baselines and the report of a run."""
