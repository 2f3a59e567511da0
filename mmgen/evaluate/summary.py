"""The scores of a report as a table that a person can read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One score of the table, and the keys that it is read against."""

    key: str
    meaning: str
    better: str
    """Which values are better: higher, lower, or near to a number."""
    against: Mapping[str, str]
    """A word to the key of a score that the value is compared with."""


ROWS = (
    Row("t2i_accuracy", "drawn pictures that show the class of their caption", "higher",
        {"real pictures": "t2i_ceiling", "chance": "t2i_accuracy_shuffled"}),
    Row("i2t_accuracy", "captions that name the class of their picture", "higher", {}),
    Row("i2t_exact", "captions with exactly the words of the real one", "higher",
        {"commonest caption": "i2t_exact_commonest", "shuffled": "i2t_exact_shuffled"}),
    Row("i2t_f1", "words that captions share with the real one (F1)", "higher",
        {"commonest caption": "i2t_f1_commonest", "shuffled": "i2t_f1_shuffled"}),
    Row("match_by_text", "pictures whose caption the model picks among others", "higher",
        {"with another picture": "match_by_text_shuffled"}),
    Row("match_by_image", "captions under which the model finds their picture likeliest", "higher",
        {"chance": "match_chance"}),
    Row("match_drawn_by_text", "drawn pictures whose caption the model picks", "higher",
        {"real pictures": "match_by_text", "another picture": "match_by_text_shuffled"}),
    Row("fd_unbiased", "distance of drawn from real pictures (Fréchet)", "lower", {"real": "fd_unbiased_floor"}),
    Row("fd", "the same, without removing its bias", "lower", {"real": "fd_floor"}),
    Row("kd", "distance of drawn from real pictures (kernel)", "lower", {"real": "kd_floor"}),
    Row("two_sample_accuracy", "how often a classifier separates drawn from real", "lower",
        {"real": "two_sample_accuracy_floor"}),
    Row("diversity_ratio", "variety of pictures of one caption, over that of real ones", "near 1", {}),
    Row("nn_distance_ratio", "distance to the nearest training picture, over that of real ones", "not below 1", {}),
    Row("val_loss_image_fixed_t", "image loss on validation data", "lower", {}),
    Row("val_loss_text_after_image", "loss of captions given their picture, nats per token", "lower",
        {"without picture": "val_loss_text_before_image"}),
)  # fmt: skip
"""Scores in the order of the table; those that a report lacks are left out."""


def table(report: Mapping[str, Any]) -> Table:
    """The scores of the first declared size, each with its interval and what it is read against."""
    found = Table(box=None, pad_edge=False)
    found.add_column("score", ratio=1)
    for heading in ("value", "95% interval"):
        found.add_column(heading, no_wrap=True)
    found.add_column("better if", no_wrap=True)
    found.add_column("compare with", ratio=1)
    for row in ROWS:
        value = report.get(row.key)
        if value is None:
            continue
        low, high = report.get(f"{row.key}_low"), report.get(f"{row.key}_high")
        interval = "" if low is None or high is None else f"{low:.3f}, {high:.3f}"
        known = {word: report[key] for word, key in row.against.items() if report.get(key) is not None}
        compared = ", ".join(f"{word} {number:.3f}" for word, number in known.items())
        found.add_row(f"{row.meaning} ({row.key})", f"{value:.3f}", interval, row.better, compared)
    return found
