"""The parity check: it passes for the decoder and fails for every fault."""

from __future__ import annotations

import numpy as np
import pytest

from mmgen.config import Config
from mmgen.config_io import override
from mmgen.parity import check_parity
from mmgen.parity.faults import FAULTS
from mmgen.parity.reference import Document, Picture, Reference
from tests.conftest import awake


@pytest.mark.parametrize(
    ("grids", "positions"), [("two sizes", "raster"), ("two sizes", "axial"), ("one size", "shared")]
)
def test_sampling_equals_training(config: Config, grids: str, positions: str) -> None:
    """Every backbone call equals training's forward pass, for every objective, order, context policy and position."""
    config = override(config, {"model": {"positions": positions}})
    if grids == "one size":
        config = override(config, {"model": {"patcher": {"image_sizes": [[4, 6]]}}})
    for variant in check_parity(config):
        assert variant.holds, variant
        assert variant.positions > 40


@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_fails_for_every_fault(config: Config, fault: str) -> None:
    for variant in check_parity(config, fault):
        unaffected = fault == "causal-mask" and variant.variant in ("mar, random", "mar, raster")  # these are causal
        assert variant.holds == unaffected, variant


def test_an_unknown_fault_raises_with_the_nearest_name(config: Config) -> None:
    with pytest.raises(ValueError, match="did you mean 'shifted-t'"):
        check_parity(config, "shift-t")


@pytest.mark.parametrize("learn", [True, False])
def test_an_image_of_the_prompt_has_only_a_clean_copy(config: Config, learn: bool) -> None:
    """In MAR's order `masked` a learned image has two copies, and an image of the prompt has one."""
    model, tokenizer = awake(override(config, {"objective": {"kind": "mar"}}))
    picture = Picture(np.zeros((4, 12), np.float32), (2, 2), np.arange(4), learn)
    fed = Reference(model, tokenizer).read(Document([picture])).fed
    assert {identity.kind for identity in fed} == ({"token", "patch", "copy 0"} if learn else {"token", "patch"})
