"""Sampling against training, and every fault of the decoder that the comparison must see."""

from __future__ import annotations

import numpy as np
import pytest

from mmgen.config import Config
from mmgen.config_io import override
from mmgen.parity import check_parity
from mmgen.parity.faults import FAULTS
from mmgen.parity.reference import Document, Picture, Reference
from tests.conftest import awake


@pytest.mark.parametrize("grids", ["two sizes", "one size"])
def test_sampling_equals_training(config: Config, grids: str) -> None:
    """Every backbone call of every objective, order and policy against the training forward pass."""
    if grids == "one size":
        config = override(config, {"model": {"patcher": {"image_sizes": [[4, 6]]}}})
    for variant in check_parity(config):
        assert variant.holds, variant
        assert variant.positions > 40


@pytest.mark.parametrize("fault", FAULTS)
def test_the_parity_check_turns_red(config: Config, fault: str) -> None:
    for variant in check_parity(config, fault):
        blind = fault == "causal-mask" and variant.variant in ("mar, random", "mar, raster")  # these are causal
        assert variant.holds == blind, variant


def test_an_unknown_fault_is_named(config: Config) -> None:
    with pytest.raises(ValueError, match="did you mean 'shifted-t'"):
        check_parity(config, "shift-t")


@pytest.mark.parametrize("learn", [True, False])
def test_an_image_of_the_prompt_is_written_as_given(config: Config, learn: bool) -> None:
    """Under MAR's masked order a learned image has two copies, one of a prompt its clean copy alone."""
    model, tokenizer = awake(override(config, {"objective": {"kind": "mar"}}))
    picture = Picture(np.zeros((4, 12), np.float32), (2, 2), np.arange(4), learn)
    fed = Reference(model, tokenizer).read(Document([picture])).fed
    assert {identity.kind for identity in fed} == ({"token", "patch", "copy 0"} if learn else {"token", "patch"})
