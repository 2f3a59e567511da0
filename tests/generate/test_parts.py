"""The parts of the decoder: grammar, lanes and observer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from mmgen.config import Config
from mmgen.generate import Decoder, Request
from mmgen.generate.grammar import Grammar
from mmgen.generate.lanes import Lanes, LaneShape
from mmgen.generate.parts import LaneCall, Observer, Parts, Setup
from mmgen.objective import ImageSpec
from mmgen.sequence.document import Strip, Writer
from tests.conftest import awake


@pytest.fixture
def decoder(config: Config) -> Decoder:
    model, tokenizer = awake(config)
    return Decoder(model, tokenizer, config.sample)


def lanes_of(decoder: Decoder, requests: int = 2, guidance: int = 0) -> Lanes:
    setup = Setup(decoder.model, decoder.tokenizer, decoder.patcher, decoder.sample)
    return Lanes(setup, LaneShape(requests, guidance, capacity=32))


def strip(decoder: Decoder, text: str) -> Strip:
    writer = Writer(decoder.tokenizer, decoder.model.positions)
    writer.tokens(decoder.tokenizer.encode(text))
    return writer.take()


def test_the_grammar_of_each_mode(decoder: Decoder) -> None:
    tokenizer, size = decoder.tokenizer, decoder.model.get_input_embeddings().weight.shape[0]
    grammar = Grammar(tokenizer, size)
    eos, boi, word = tokenizer.eos, tokenizer.boi, tokenizer.encode("a")[0]
    for request, more, words, expected in (
        (Request(["a"], "auto"), True, 0, {eos, boi, word}),
        (Request(["a"], "auto"), False, 0, {eos, word}),
        (Request(["a"], "text"), True, 0, {word}),
        (Request(["a"], "text"), True, 1, {eos, word}),
    ):
        allowed = grammar.allowed(request, more, words)
        assert {token for token in (eos, boi, word) if allowed[token]} == expected
        assert not allowed[[*tokenizer.grid, tokenizer.bos, tokenizer.pad, tokenizer.eoi]].any()
    assert set(np.flatnonzero(grammar.sizes_V)) == set(tokenizer.grid)


def test_lanes_are_numbered_by_request(decoder: Decoder) -> None:
    assert lanes_of(decoder, 3, guidance=2).of([0, 2]) == [[0, 2], [3, 5], [6, 8]]
    assert lanes_of(decoder, 3).of([0, 2]) == [[0, 2]]


def test_a_cleared_or_rewound_lane_gives_the_same_hidden_states_again(decoder: Decoder) -> None:
    lanes, (one, other) = lanes_of(decoder), (strip(decoder, "abc"), strip(decoder, "de"))
    with torch.no_grad():
        first = lanes.forward({0: one})[0]
        lengths = lanes.lengths([[0]])
        second = lanes.forward({0: other})[0]
        assert not torch.equal(lanes.forward({0: other})[0], second)
        lanes.rewind([[0]], lengths)
        torch.testing.assert_close(lanes.forward({0: other})[0], second)
        lanes.clear([0])
        torch.testing.assert_close(lanes.forward({0: one})[0], first)


class Journal(Observer):
    """Stores the name of each event."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def called(self, call: LaneCall, hidden_LWD: torch.Tensor) -> None:
        assert hidden_LWD.shape[:2] == call.slots_LW.shape
        assert call.mask.shape[2:] == (call.slots_LW.shape[1], call.keys.slot.shape[1])
        self.events.append("text" if call.strips else "patches")

    def opened(self, requests: Sequence[int], spec: ImageSpec) -> None:
        self.events.append(f"opened {list(requests)}")

    def drew(self, requests: Sequence[int], x_RNP: torch.Tensor) -> None:
        self.events.append(f"drew {list(requests)}")


def test_an_observer_sees_every_step_of_an_image_and_changes_nothing(decoder: Decoder) -> None:
    journal = Journal()
    sample = decoder.sample.model_copy(update={"steps": 3, "guidance_scale": 2.0})
    requests = [Request(["a"], "image", seed) for seed in range(2)]
    observed = Decoder(decoder.model, decoder.tokenizer, sample, Parts(observer=journal)).generate(requests)
    assert journal.events == ["text", "text", "opened [0, 1]", *["patches"] * 3, "drew [0, 1]"]
    plain = Decoder(decoder.model, decoder.tokenizer, sample).generate(requests)
    assert [r.images[0].tobytes() for r in observed] == [r.images[0].tobytes() for r in plain]
