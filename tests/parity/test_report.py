"""The report of the parity check: the differences that it reports."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmgen.config import ObjectiveConfig, PatcherConfig
from mmgen.objective import ImageObjective
from mmgen.parity.record import Fed, Identity
from mmgen.parity.report import Report

PATCH = Identity("patch", 0, 3)
FED = Fed(
    PATCH,
    5,
    frozenset({PATCH, Identity("token", 1)}),
    torch.ones(4, dtype=torch.float64),
    torch.ones(4, dtype=torch.float64),
)


def compared(fed: Fed) -> Report:
    report = Report("one")
    report.same("request 0", [fed], {PATCH: FED})
    return report


def test_equal_positions_hold() -> None:
    report = compared(FED)
    assert report.holds
    assert report.as_dict() == {
        "variant": "one", "holds": True, "positions": 1, "largest_difference_inputs": 0.0,
        "largest_difference_hidden": 0.0, "largest_difference_patches": 0.0, "first": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fed", "what"),
    [
        (replace(FED, position=6), "position is 6, in training 5"),
        (
            replace(FED, sees=FED.sees | {Identity("stale", 9)}),
            "attends to other positions than in training (1, such as",
        ),
        (replace(FED, inputs_D=FED.inputs_D + 1e-8), "inputs differ by 1e-08"),
        (replace(FED, hidden_D=FED.hidden_D * torch.nan), "hidden differ by nan"),
    ],
)
def test_each_difference_is_named(fed: Fed, what: str) -> None:
    report = compared(fed)
    assert not report.holds
    assert str(report.as_dict()["first"]).startswith(f"request 0, patch 0 3: {what}")


def test_the_first_difference_is_reported() -> None:
    report = Report("one")
    report.patches("request 1", torch.zeros(2), torch.ones(2))
    report.patches("request 2", torch.zeros(2), torch.ones(2))
    assert str(report.first) == "request 1: patches differ by 1"
    assert report.largest.patches == 1


def test_an_objective_without_replay_raises() -> None:
    class Bare(ImageObjective):
        from mmgen.objective.transfusion import TransfusionLayout as Layout

        def embed(self, batch): ...
        def loss(self, hidden_JD, state): ...
        def generate(self, spec): ...

    with pytest.raises(NotImplementedError, match="Bare has no `replay`"):
        Bare(ObjectiveConfig(), PatcherConfig(), 8).replay(None)
