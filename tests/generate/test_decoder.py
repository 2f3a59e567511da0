"""The decoder: requests in a batch and alone, streams, in-painting, text sampling, budgets and errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmgen.backbone import RowCache
from mmgen.config import Config
from mmgen.config_io import override
from mmgen.flow.solvers import SOLVERS
from mmgen.generate import Decoder, Inpaint, Request
from mmgen.generate.exchange import Feed
from mmgen.generate.parts import LaneCall, Observer, Parts
from mmgen.generate.tokens import TokenChooser
from mmgen.objective import ImageSpec
from mmgen.sequence.document import Strip
from tests.conftest import awake, picture, tiny

RNG = np.random.default_rng(5)
PICTURES = [picture(RNG), picture(RNG, (6, 4))]
PROMPTS = [
    Request(["ab"], "text"),
    Request([PICTURES[0]], "text", 1),
    Request(["x", PICTURES[1], "yz", PICTURES[0]], "auto", 2),
    Request(["a picture"], "image", 3),
    Request(["longer text here"], "image", 4, (3, 2)),
    Request([PICTURES[1], "q"], "auto", 5),
    Request(["paint"], "image", 6, inpaint=Inpaint(PICTURES[1], np.array([[True, False]] * 3))),
]


OBJECTIVES = {
    "transfusion": {},
    "masked": {"kind": "mar", "mar": {"order": "masked"}},
    "random": {"kind": "mar", "mar": {"order": "random"}},
    "raster": {"kind": "mar", "mar": {"order": "raster"}},
}
SETTINGS = {"temperature": 0.7, "max_images": 2, "top_p": 0.9, "unmask_steps": 2, "steps": 3, "max_new_tokens": 6}


def decoder_of(config: Config, objective: str, **sample: object) -> Decoder:
    changes = {
        "objective": {**OBJECTIVES[objective], "mar": {**OBJECTIVES[objective].get("mar", {}), "head": {"width": 24}}},
        "sample": {**SETTINGS, **sample},
    }
    config = override(config, changes)
    model, tokenizer = awake(config)
    return Decoder(model, tokenizer, config.sample)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_request_has_the_same_result_in_any_batch(tmp_path: Path, objective: str) -> None:
    """The result of a request of any kind, with guidance, does not depend on the other requests of the batch."""
    decoder = decoder_of(tiny(tmp_path), objective)
    alone = [decoder.generate([request])[0] for request in PROMPTS]

    @settings(max_examples=12, deadline=None, derandomize=True)
    @given(st.lists(st.sampled_from(range(len(PROMPTS))), min_size=2, max_size=5))
    def check(chosen: list[int]) -> None:
        for i, result in zip(chosen, decoder.generate([PROMPTS[i] for i in chosen]), strict=True):
            assert [_plain(segment) for segment in result.segments] == [_plain(s) for s in alone[i].segments], i
            assert result.finished == alone[i].finished
            assert len(result.images) <= 2
            assert all(image.size in ((4, 4), (4, 6)) for image in result.images)

    check()


class FirstLane(Observer):
    """Stores the last hidden state of the first request after each of its strips."""

    def __init__(self) -> None:
        self.states: list[torch.Tensor] = []

    def called(self, call: LaneCall, hidden_LWD: torch.Tensor) -> None:
        if 0 in call.strips:
            self.states.append(hidden_LWD[call.lanes.index(0), len(call.strips[0]) - 1].clone())


def test_single_precision_requests_agree_to_rounding(tmp_path: Path) -> None:
    """In fp32, kernels depend on the batch size; the logits of a request differ by at most 1e-5."""
    decoder = decoder_of(tiny(tmp_path), "transfusion", temperature=0.0)
    decoder.model.float()

    def logits(requests: list[Request]) -> list[torch.Tensor]:
        observer = FirstLane()
        Decoder(decoder.model, decoder.tokenizer, decoder.sample, Parts(observer=observer)).generate(requests)
        with torch.no_grad():
            return [decoder.model.logits(state) for state in observer.states]

    alone, together = logits(PROMPTS[:1]), logits(PROMPTS)
    assert len(alone) > 1
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_stream_has_the_contents_of_the_results(tmp_path: Path, objective: str) -> None:
    decoder = decoder_of(tiny(tmp_path), objective)
    results = decoder.generate(PROMPTS)
    stream = list(decoder.stream(PROMPTS))
    for number, result in enumerate(results):
        events = [event for event in stream if event.request == number]
        assert events[-1].kind == "end"
        assert events[-1].result is not None
        assert [_plain(segment) for segment in events[-1].result.segments] == [_plain(s) for s in result.segments]
        assert [_plain(event.image) for event in events if event.kind == "image"] == [_plain(i) for i in result.images]
        text = decoder.tokenizer.decode([event.token for event in events if event.kind == "token"])
        assert text.strip() == result.text
        previews = sum(event.kind == "preview" for event in events)
        if PROMPTS[number].mode == "image":
            patches = result.images[0].width * result.images[0].height // 4
            assert previews == {"transfusion": 2, "masked": 2}.get(objective, patches - 1)
    assert not [event for event in decoder.stream(PROMPTS, previews=False) if event.kind == "preview"]


def test_a_stream_raises_before_its_first_event(tmp_path: Path) -> None:
    decoder = decoder_of(tiny(tmp_path), "transfusion")
    with pytest.raises(ValueError, match="the prompt is empty"):
        decoder.stream([Request([])])


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2m", "ancestral"])
def test_in_painting_keeps_known_patches(tmp_path: Path, objective: str, solver: str) -> None:
    decoder = decoder_of(tiny(tmp_path), objective, solver=solver)
    keep = np.array([[True, False], [False, False], [True, True]])
    requests = [
        Request(["a"], "image", seed, inpaint=Inpaint(PICTURES[1], keep if seed else ~keep)) for seed in range(3)
    ]
    kept = np.kron(keep, np.ones((2, 2))).astype(bool)
    original = np.asarray(PICTURES[1])
    drawn = [np.asarray(result.images[0]) for result in decoder.generate(requests)]
    assert (drawn[0][~kept] == original[~kept]).all()
    for image in drawn[1:]:
        assert (image[kept] == original[kept]).all()
    assert (drawn[1][~kept] != drawn[2][~kept]).any(), "the rest depends on the seed"
    assert (drawn[1][~kept] != original[~kept]).any()


def test_sampling_controls_narrow_the_choice(tmp_path: Path) -> None:
    """The frequencies of 4,000 draws from one set of logits equal the probabilities after top-k, top-p and min-p."""
    greedy = decoder_of(tiny(tmp_path), "transfusion", temperature=0.0, top_p=1.0)
    text = [Request(["abc"], "text", seed) for seed in range(40)]
    best = {result.text for result in greedy.generate(text)}
    assert len(best) == 1
    assert {r.text for r in decoder_of(tiny(tmp_path), "transfusion", temperature=3.0, top_k=1).generate(text)} == best
    hidden = torch.randn(1, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for control in ({"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.3}, {}):
        decoder = decoder_of(tiny(tmp_path), "transfusion", **{"top_p": 1.0, "temperature": 0.8, **control})
        allowed = decoder.grammar.words_V
        rng = np.random.default_rng(0)
        feeds = [Feed(Strip(), allowed, rng.gumbel(size=len(allowed))) for _ in range(4000)]
        with torch.no_grad():
            chosen = TokenChooser(decoder.model, decoder.sample).choose(hidden.expand(4000, -1), feeds)
            scores = decoder.model.logits(hidden)[0].masked_fill(~torch.from_numpy(allowed), -torch.inf) / 0.8
        p = scores.softmax(0)
        order = p.argsort(descending=True)
        keep = torch.zeros_like(p, dtype=torch.bool)
        if "top_k" in control:
            keep[order[:5]] = True
        elif "top_p" in control:
            keep[order[: int((p[order].cumsum(0) < 0.5).sum()) + 1]] = True
        else:
            keep = p >= control.get("min_p", 0) * p.max()
        expected = torch.where(keep, p, 0) / p[keep].sum()
        frequency = torch.bincount(torch.tensor(chosen), minlength=len(p)) / 4000
        assert not frequency[~keep].any()
        assert (frequency - expected).abs().max() < 5 * (0.25 / 4000) ** 0.5


def test_stop_rules_and_budgets_of_one_request(tmp_path: Path) -> None:
    decoder = decoder_of(tiny(tmp_path), "transfusion", temperature=2.0, top_p=1.0, max_new_tokens=12)
    (free,) = decoder.generate([Request(["z"], "text", 4)])
    text = free.segments[0]
    assert isinstance(text, str)
    stop = text[2:4]
    stopped, short, again = decoder.generate(
        [Request(["z"], "text", 4, stop=[stop]), Request(["z"], "text", 4, max_new_tokens=3), Request(["z"], "text", 4)]
    )
    assert stopped.segments == [text[: text.index(stop)]]
    assert stopped.finished
    assert text.startswith(str(short.segments[0]))
    assert not short.finished
    assert again.segments == free.segments
    results = decoder.generate([Request(["z"], "auto", seed, max_images=0) for seed in range(20)])
    assert not any(result.images for result in results)


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
    with pytest.raises(ValueError, match="not declared"):
        decoder.generate([Request(["a"], "image", 0, (9, 9))])
    with pytest.raises(ValueError, match="cannot contain special tokens"):
        decoder.generate([Request(["a <|boi|>"], "text")])
    keep = np.ones((2, 2), bool)
    with pytest.raises(ValueError, match="one entry per patch"):
        decoder.generate([Request(["a"], "image", inpaint=Inpaint(PICTURES[1], keep))])
    with pytest.raises(ValueError, match="in-painting needs mode 'image'"):
        decoder.generate([Request(["a"], "text", inpaint=Inpaint(PICTURES[0], keep))])
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
def test_an_exact_network_draws_its_picture_with_every_prediction(config: Config, prediction: str, solver: str) -> None:
    """A network whose prediction is exact for one picture draws this picture from any noise, with any solver."""
    config = override(config, {"objective": {"prediction": prediction}, "sample": {"steps": 8, "solver": solver}})
    model, _ = awake(config)
    patch = model.patcher.patch_length
    target = torch.linspace(-1, 1, 4 * patch, dtype=torch.float64).view(1, 4, patch)
    seen: dict[str, torch.Tensor] = {}

    def enter(z_IP, t_I, cells):
        seen["z"], seen["t"] = z_IP, t_I
        return torch.zeros(len(z_IP), 32, dtype=z_IP.dtype), None

    def decode(hidden, memory, t_I, cells):
        z, t = seen["z"], seen["t"].unsqueeze(1)
        x = target.expand(3, -1, -1).reshape(z.shape)
        return {"x": x, "eps": (z - t * x) / (1 - t), "v": (x - z) / (1 - t)}[prediction]

    model.objective.projection.enter.enter = enter
    model.objective.projection.leave.leave = decode
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


def test_a_prompt_that_is_no_list_and_an_unknown_mode_are_refused(tmp_path: Path) -> None:
    decoder = decoder_of(tiny(tmp_path), "transfusion")
    for prompt in ("a red 7", [Path("a.png")]):
        with pytest.raises(ValueError, match="a prompt is a list of texts and PIL images, such as"):
            decoder.generate([Request(prompt, "image")])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown mode 'images': give one of image, text, auto"):
        decoder.generate([Request(["a"], "images")])  # type: ignore[arg-type]
