"""What loader workers send: exact, and small next to the pixels."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch

from mmgen.config import Config
from mmgen.config_io import override
from mmgen.data.loader import Corpus
from mmgen.sequence import wire
from mmgen.sequence.batch import RawBatch
from mmgen.sequence.tokenizer import Tokenizer

TENSORS = {
    "runs": torch.arange(600).reshape(2, 300),
    "far": torch.tensor([2**63 - 1, -(2**63), 0, -1]),
    "steps of 127 and -128": torch.tensor([0, 127, -1, 126]),
    "steps of 128 and -129": torch.tensor([0, 128, -1, 40000, -40000, 2**31, 0]),
    "none": torch.zeros(0, 2, dtype=torch.int64),
    "scalar": torch.tensor(7),
    "small": torch.tensor([[-128, 127], [127, -128]], dtype=torch.int8),
    "flags": torch.tensor([[True, False, True]]),
    "times": torch.tensor([0.1, -0.0, torch.inf, torch.nan]),
    "bytes": torch.tensor([[255, 0]], dtype=torch.uint8),
    "columns": torch.arange(12).reshape(3, 4).t(),
}


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.contiguous().numpy().tobytes()


def test_every_tensor_returns_with_its_bits() -> None:
    returned = wire.unpack(wire.pack(TENSORS))
    assert list(returned) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert bits(returned[name]) == bits(tensor), name
        returned[name].view(-1)[:1].zero_()  # the result can be written to


def raw(config: Config, **objective: Any) -> RawBatch:
    config = override(config, {"objective": objective})
    return Corpus(config.data.train, Tokenizer.of(config), config).first_step().micro[0]


@pytest.mark.parametrize(
    "objective",
    [{"kind": "transfusion"}, {"kind": "transfusion", "transfusion": {"context": "clean_copy"}}]
    + [{"kind": "mar", "mar": {"order": order}} for order in ("masked", "random", "raster")],
)
def test_a_batch_that_was_sent_has_the_same_bits(config: Config, objective: dict[str, Any]) -> None:
    batch = raw(config, **objective)
    again = pickle.loads(pickle.dumps(batch))
    assert vars(again).keys() == vars(batch).keys()
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            assert bits(getattr(again, name)) == bits(value), name
    assert {name: bits(draw) for name, draw in again.draws.items()} == {n: bits(d) for n, d in batch.draws.items()}
    assert (again.grids, again.noise_draws) == (batch.grids, batch.noise_draws)


@pytest.mark.parametrize("kind", ["transfusion", "mar"])
def test_the_facts_about_256_patches_take_few_bytes(config: Config, kind: str) -> None:
    """Apart from t in fp32 (one for each draw), less than a byte per patch; each of some ten numbers took eight."""
    patcher = {"patch_size": 1, "image_sizes": [[16, 16]]}
    batch = raw(
        override(config, {"model": {"patcher": patcher}, "data": {"row_length": 600, "image_first": 0.0}}), kind=kind
    )
    facts = {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    del facts["patches_UP"]
    images = len(batch.grids)
    assert len(wire.pack(facts).data) / images < 256
    assert sum(value.numpy().nbytes for value in facts.values()) / images > 20000
    times = batch.draws["t"].numpy().nbytes / images
    assert len(wire.pack(batch.draws).data) / images < (256 if kind == "transfusion" else times)


@pytest.mark.parametrize("fault", ["narrow", "unsigned"])
def test_a_coder_that_loses_bits_is_detected(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = wire._differences
    wrong = {
        "narrow": lambda values: right(values).astype(np.int8),
        "unsigned": lambda values: np.abs(right(values)),
    }
    monkeypatch.setattr(wire, "_differences", wrong[fault])
    with pytest.raises(AssertionError):
        test_every_tensor_returns_with_its_bits()
