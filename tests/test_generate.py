"""The decoder against the training forward pass, row by row, and within its grammar."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mmgen.backbone import RowCache
from mmgen.config import Config, override
from mmgen.flow.solve import SOLVERS
from mmgen.generate import Decoder, Request
from mmgen.objective import ImageSpec
from mmgen.parity import check_parity
from mmgen.parity.faults import FAULTS
from tests.conftest import awake, picture

RNG = np.random.default_rng(5)
PICTURES = [picture(RNG), picture(RNG, (6, 4))]
PROMPTS = [
    Request(["ab"], "text"),
    Request([PICTURES[0]], "text", 1),
    Request(["x", PICTURES[1], "yz", PICTURES[0]], "auto", 2),
    Request(["a picture"], "image", 3),
    Request(["longer text here"], "image", 4, (3, 2)),
    Request([PICTURES[1], "q"], "auto", 5),
]


@pytest.mark.parametrize("grids", ["two sizes", "one size"])
def test_sampling_equals_training(config: Config, grids: str) -> None:
    """Every backbone call of every objective, order and policy against the training forward pass."""
    if grids == "one size":
        config = override(config, {"model": {"patcher": {"image_sizes": [[4, 6]]}}})
    for variant in check_parity(config):
        assert variant["holds"], variant
        assert variant["positions"] > 40


@pytest.mark.parametrize("fault", FAULTS)
def test_the_parity_check_turns_red(config: Config, fault: str) -> None:
    for variant in check_parity(config, fault):
        blind = fault == "causal-mask" and variant["variant"] in ("mar, random", "mar, raster")  # these are causal
        assert variant["holds"] == blind, variant


def test_an_unknown_fault_is_named(config: Config) -> None:
    with pytest.raises(ValueError, match="did you mean 'shifted-t'"):
        check_parity(config, "shift-t")


def test_a_row_is_alone_in_any_batch(config: Config) -> None:
    """Text, images of two sizes, guidance: each prompt gives what it gives alone."""
    config = override(config, {"sample": {"temperature": 0.7, "max_images": 2}})
    model, tokenizer = awake(config)
    decoder = Decoder(model, tokenizer, config.sample)
    together = decoder.generate(PROMPTS)
    backwards = decoder.generate(PROMPTS[::-1])[::-1]
    for i, request in enumerate(PROMPTS):
        alone = decoder.generate([request])[0]
        for other in (together[i], backwards[i]):
            assert [_plain(s) for s in other.segments] == [_plain(s) for s in alone.segments], i
            assert other.finished == alone.finished


def _plain(segment: str | Image.Image) -> object:
    return segment if isinstance(segment, str) else (segment.size, segment.tobytes())


def test_budgets_and_modes_hold(config: Config) -> None:
    config = override(config, {"sample": {"max_images": 1, "max_new_tokens": 3, "temperature": 5.0, "steps": 1}})
    model, tokenizer = awake(config)
    decoder = Decoder(model, tokenizer, config.sample)
    for result in decoder.generate([Request(["z"], "auto", seed) for seed in range(30)]):
        assert len(result.images) <= 1
        assert sum(len(tokenizer.encode(s)) for s in result.segments if isinstance(s, str)) <= 12
    for result in decoder.generate([Request(["z"], "text", seed) for seed in range(10)]):
        assert not result.images
    for result in decoder.generate([Request(["z"], "image", seed, (3, 2)) for seed in range(3)]):
        assert [image.size for image in result.images] == [(4, 6)]
        assert result.finished


def test_bad_requests_are_refused(config: Config) -> None:
    model, tokenizer = awake(config)
    decoder = Decoder(model, tokenizer, config.sample)
    with pytest.raises(ValueError, match="the prompt is empty"):
        decoder.generate([Request([], "auto")])
    with pytest.raises(ValueError, match="the prompt is empty"):
        decoder.generate([Request(["  "], "text")])
    with pytest.raises(ValueError, match="never declared"):
        decoder.generate([Request(["a"], "image", 0, (9, 9))])
    none = Decoder(model, tokenizer, config.sample.model_copy(update={"max_images": 0}))
    with pytest.raises(ValueError, match="max_images"):
        none.generate([Request(["a"], "image")])


def test_cache_capacity_is_checked() -> None:
    cache = RowCache(1, 2, 4, torch.device("cpu"))
    with pytest.raises(ValueError, match="capacity of 4"):
        cache.begin(torch.tensor([0, 1]), 5)


def test_training_mode_is_restored(config: Config) -> None:
    model, tokenizer = awake(config)
    model.train()
    Decoder(model, tokenizer, config.sample).generate([Request(["a"], "text")])
    assert model.training


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name not in ("langevin", "annealed_langevin")])
@pytest.mark.parametrize("prediction", ["x", "eps", "v"])
def test_every_prediction_samples_what_it_knows(config: Config, prediction: str, solver: str) -> None:
    """A network that is exact for one picture draws that picture, whatever it predicts, from any noise."""
    config = override(config, {"objective": {"prediction": prediction}, "sample": {"steps": 8, "solver": solver}})
    model, _ = awake(config)
    patch = model.patcher.patch_length
    target = torch.linspace(-1, 1, 4 * patch, dtype=torch.float64).view(1, 4, patch)
    seen: dict[str, torch.Tensor] = {}

    def enter(z_IP, t_I, places):
        seen["z"], seen["t"] = z_IP, t_I
        return torch.zeros(len(z_IP), 32, dtype=z_IP.dtype), None

    def decode(hidden, memory, t_I, places):
        z, t = seen["z"], seen["t"].unsqueeze(1)
        x = target.expand(3, -1, -1).reshape(z.shape)
        return {"x": x, "eps": (z - t * x) / (1 - t), "v": (x - z) / (1 - t)}[prediction]

    model.objective._enter = enter
    model.objective.projection.decode = decode
    noise = torch.randn(3, 4, patch, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawing = model.objective.generate(
        ImageSpec((2, 2), noise, config.sample, torch.zeros(1, 3, 32), torch.zeros(3, 4).long())
    )
    drawn = None
    with torch.no_grad():
        next(drawing)
        while drawn is None:
            try:
                drawing.send(torch.zeros(1, 3, 4, 32, dtype=torch.float64))
            except StopIteration as stop:
                drawn = stop.value
    torch.testing.assert_close(drawn, target.expand(3, -1, -1), rtol=1e-9, atol=1e-9)
