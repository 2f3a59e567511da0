"""Guidance by text and by images: every lane sees the right context, and the scales act on the right differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mmgen.config import Config, SampleConfig
from mmgen.config_io import override
from mmgen.flow import guide
from mmgen.generate import Decoder, Request, drawing
from mmgen.generate.drawing import Drawings
from mmgen.generate.exchange import Draw
from mmgen.generate.parts import REAL, Observer, Parts
from mmgen.objective import image_flow
from mmgen.parity import ScriptedGrammar, _generated, _piece
from mmgen.parity.record import Identity, Recorder
from mmgen.parity.reference import ImageReplay, Reference
from mmgen.parity.report import Report
from mmgen.sequence.document import Writer
from tests.conftest import awake, picture, tiny

RNG = np.random.default_rng(3)
FIRST, SECOND = picture(RNG), picture(RNG, (6, 4))
TEXT, IMAGE = 2.5, 1.7
OBJECTIVES = {
    "transfusion": {},
    "clean copy": {"transfusion": {"context": "clean_copy"}},
    "masked": {"kind": "mar", "mar": {"order": "masked", "head": {"width": 24}}},
    "random": {"kind": "mar", "mar": {"order": "random", "head": {"width": 24}}},
}
REQUESTS = [
    Request([FIRST, "ab"], seed=0),  # continues with words and two images, see `SCRIPTS`
    Request([FIRST, "cd", SECOND, "e"], "image", seed=1, grid=(3, 2)),
    Request(["only text"], "image", seed=2, negative_prompt="not this"),
    Request([SECOND], "image", seed=3, negative_prompt="nor this"),
    Request([], "image", seed=4),
]


def decoder_of(tmp_path: Path, objective: str, **sample: object) -> Decoder:
    settings = {
        "steps": 3, "unmask_steps": 3, "max_images": 3, "max_new_tokens": 8, "temperature": 1.0,
        "guidance_scale": TEXT, "image_guidance_scale": IMAGE, **sample,
    }  # fmt: skip
    config = override(tiny(tmp_path), {"objective": OBJECTIVES[objective], "sample": settings})
    model, tokenizer = awake(config)
    return Decoder(model, tokenizer, config.sample)


class Drawn(Observer):
    """Stores the patches of finished images by request."""

    def __init__(self) -> None:
        self.patches: dict[int, list[Tensor]] = {}

    def drew(self, requests: Sequence[int], x_RNP: Tensor) -> None:
        for request, x_NP in zip(requests, x_RNP, strict=True):
            self.patches.setdefault(request, []).append(x_NP.clone())


def drawn(decoder: Decoder, requests: Sequence[Request], **sample: object) -> list[Tensor]:
    """Patches of the one image of each request, with other sampling settings."""
    observer = Drawn()
    settings = decoder.sample.model_copy(update=sample)
    Decoder(decoder.model, decoder.tokenizer, settings, Parts(observer=observer)).generate(requests)
    return [observer.patches[i][0] for i in range(len(requests))]


SCRIPTS = ["wiwi"]


class Grammar(ScriptedGrammar):
    """Allows the next choice of `SCRIPTS`."""

    def __init__(self, tokenizer: object, vocabulary: int) -> None:
        super().__init__(tokenizer, vocabulary)  # type: ignore[arg-type]
        self._scripts = [iter((*script, "end")) for script in SCRIPTS]


def check(tmp_path: Path, objective: str) -> Report:
    """Compare every backbone call of every lane with training's forward pass, and the images as parity does."""
    plain = decoder_of(tmp_path, objective)
    recorder, report = Recorder(REAL.generate), Report(objective)
    parts = Parts(grammar=Grammar, observer=recorder, generate=recorder.generate)
    decoder = Decoder(plain.model, plain.tokenizer, plain.sample, parts)
    events = list(decoder.stream(REQUESTS, previews=False))
    reference = Reference(decoder.model, decoder.tokenizer)
    with torch.no_grad():
        for number, request in enumerate(REQUESTS):
            segments = [_piece(decoder, piece) for piece in request.prompt]
            images = recorder.drawn[number]
            segments += _generated([event for event in events if event.request == number], images)
            sample = decoder.sample.model_copy(update={"negative_prompt": request.negative_prompt})
            for image in images:
                replay = ImageReplay(reference, report, image, sample)
                replay.run(f"request {number}, image {image.number}", segments)
            if len(images) == 1:  # lanes that were cleared once
                for g, document in enumerate(replay.documents):
                    fed = recorder.fed[g * len(REQUESTS) + number]
                    report.same(f"request {number}, lane {g}", fed, reference.read(document).fed)
    assert [len(recorder.drawn[number]) for number in range(len(REQUESTS))] == [2, 1, 1, 1, 1]
    return report


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_lane_sees_its_context_and_the_formula_holds(tmp_path: Path, objective: str) -> None:
    """Three lanes, prompts of text and images, images drawn in a document, negative prompts, one batch."""
    report = check(tmp_path, objective)
    assert report.holds, report
    assert report.positions > 150


def _forgets_the_images(self: Drawings, draw: Draw, kept: str) -> Writer:
    return REDUCED(self, replace(draw, images=()), kept)


def _forgets_the_last_image(self: Drawings, draw: Draw, kept: str) -> Writer:
    return REDUCED(self, replace(draw, images=draw.images[:-1]), kept)


def _swaps_the_lanes(self: Drawings, draw: Draw, kept: str) -> Writer:
    return REDUCED(self, draw, "nothing" if kept == "images" else "images")


def _keeps_the_images(self: Drawings, draw: Draw, kept: str) -> Writer:
    return REDUCED(self, draw, "images")


def _forgets_the_negative_prompt(self: Drawings, draw: Draw, kept: str) -> Writer:
    return REDUCED(self, replace(draw, negative=()), kept)


REDUCED = Drawings._reduced
CONTEXTS = [
    _forgets_the_images, _forgets_the_last_image, _swaps_the_lanes, _keeps_the_images, _forgets_the_negative_prompt,
]  # fmt: skip


@pytest.mark.parametrize("broken", CONTEXTS)
def test_a_wrong_context_is_found(
    tmp_path: Path, broken: Callable[..., Writer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing.Drawings, "_reduced", broken)
    try:
        found = not check(tmp_path, "transfusion").holds
    except KeyError as error:  # the decoder fed a position that training's document does not have
        found = isinstance(error.args[0], Identity)
    assert found


def _reversed_scales(v: Sequence[Tensor], guidance: Sequence[guide.Guidance], t: Tensor) -> Tensor:
    return guide.combine(v, guidance[::-1], t)


def _text_against_nothing(v: Sequence[Tensor], guidance: Sequence[guide.Guidance], t: Tensor) -> Tensor:
    text, image = (one.scale for one in guidance)
    return v[2] + image * (v[1] - v[2]) + text * (v[0] - v[2])


def _image_against_all(v: Sequence[Tensor], guidance: Sequence[guide.Guidance], t: Tensor) -> Tensor:
    text, image = (one.scale for one in guidance)
    return v[2] + image * (v[0] - v[2]) + text * (v[0] - v[1])


def _swapped_outputs(v: Sequence[Tensor], guidance: Sequence[guide.Guidance], t: Tensor) -> Tensor:
    return guide.combine([v[0], v[2], v[1]], guidance, t)


@pytest.mark.parametrize("broken", [_reversed_scales, _text_against_nothing, _image_against_all, _swapped_outputs])
def test_a_wrong_formula_is_found(
    tmp_path: Path, broken: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_flow, "combine", broken)
    assert not check(tmp_path, "transfusion").holds


IMAGES = [Request([FIRST, "cd", SECOND, "e"], "image", seed=1, grid=(3, 2)), Request(["t", FIRST], "image", seed=2)]


@pytest.mark.parametrize("objective", ["transfusion", "masked"])
def test_special_scales(tmp_path: Path, objective: str) -> None:
    """Equal scales are one lane, (1, 1) is no guidance, and (image 1, text s) is guidance against the image lane."""
    decoder = decoder_of(tmp_path, objective)

    def draw(text: float, image: float | None, requests: Sequence[Request] = IMAGES, **more: object) -> list[Tensor]:
        return drawn(decoder, requests, guidance_scale=text, image_guidance_scale=image, **more)

    def same(one: list[Tensor], other: list[Tensor]) -> bool:
        return all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(one, other, strict=True))

    assert same(draw(3.0, 3.0), draw(3.0, None))
    assert same(draw(1.0, 1.0), draw(1.0, None))
    assert not same(draw(3.0, 1.0), draw(3.0, None))
    assert same(draw(3.0, 1.0), draw(3.0, 1.0 + 1e-12)), "two lanes, and three where one cancels"
    assert same(draw(1.0, 0.0), draw(1.0, 1e-300))
    # (0, 1) and (0, 0) are the models without the text, and without the prompt.
    without_text = [replace(r, prompt=[p for p in r.prompt if isinstance(p, Image.Image)]) for r in IMAGES]
    constant = {"guidance_ramp": "constant"}
    assert same(draw(0.0, 1.0, **constant), draw(1.0, None, without_text, **constant))
    assert same(draw(0.0, 0.0, **constant), draw(1.0, None, [replace(r, prompt=[]) for r in IMAGES], **constant))
    # Without images, the image scale has no effect; without text, the text scale has none.
    texts = [replace(request, prompt=["words"]) for request in IMAGES]
    assert same(draw(3.0, 1.7, texts), draw(3.0, None, texts))
    assert same(draw(3.0, 1.7, without_text), draw(1.7, None, without_text))


@pytest.mark.parametrize("objective", ["transfusion", "random"])
def test_a_negative_prompt_is_the_prompt_at_scale_zero(tmp_path: Path, objective: str) -> None:
    """With text scale 0 the negative prompt is drawn; a setting acts like the argument, and "" removes it."""
    decoder = decoder_of(tmp_path, objective, guidance_ramp="constant")
    negative = [replace(request, negative_prompt="bad") for request in IMAGES]
    alone = [replace(request, prompt=["bad"]) for request in IMAGES]
    kept = [replace(r, prompt=[*(p for p in r.prompt if isinstance(p, Image.Image)), "bad"]) for r in IMAGES]

    def draw(requests: Sequence[Request], text: float, image: float | None, **more: object) -> list[Tensor]:
        return drawn(decoder, requests, guidance_scale=text, image_guidance_scale=image, **more)

    for made, expected in (
        (draw(negative, 0.0, None), draw(alone, 1.0, None)),
        (draw(negative, 0.0, 1.0), draw(kept, 1.0, None)),
        (draw(negative, 2.0, 1.5), draw(IMAGES, 2.0, 1.5, negative_prompt="bad")),
        (draw([replace(r, negative_prompt="") for r in IMAGES], 2.0, 1.5, negative_prompt="bad"),
         draw(IMAGES, 2.0, 1.5)),
    ):  # fmt: skip
        for one, other in zip(made, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert (draw(negative, 2.0, None)[0] - draw(IMAGES, 2.0, None)[0]).abs().max() > 1e-6


def test_a_request_has_the_same_result_in_any_batch(tmp_path: Path) -> None:
    """Prefixes of different lengths share a call; each request still gets the hidden state of its own last position."""
    for objective in ("transfusion", "random"):
        decoder = decoder_of(tmp_path, objective)
        requests = [replace(request, mode="image") for request in REQUESTS]
        for request, together in zip(requests, drawn(decoder, requests), strict=True):
            torch.testing.assert_close(drawn(decoder, [request])[0], together, rtol=1e-9, atol=1e-9)


def test_corrections_of_the_image_lane(tmp_path: Path) -> None:
    decoder = decoder_of(tmp_path, "transfusion")
    plain = drawn(decoder, IMAGES)[0]
    followed = drawn(decoder, IMAGES, guidance_rescale=0.7)[0]
    own = drawn(decoder, IMAGES, guidance_rescale=0.7, image_guidance_rescale=0.7)[0]
    other = drawn(decoder, IMAGES, guidance_rescale=0.7, image_guidance_rescale=0.0)[0]
    torch.testing.assert_close(followed, own, rtol=0, atol=0)
    assert (followed - other).abs().max() > 1e-6
    only_image = drawn(decoder, IMAGES, guidance_interval=(1.0, 1.0), image_guidance_interval=(0.0, 1.0))[0]
    torch.testing.assert_close(only_image, drawn(decoder, IMAGES, guidance_scale=1.0)[0], rtol=1e-9, atol=1e-9)
    assert (only_image - plain).abs().max() > 1e-6


def test_lanes_and_refusals(config: Config) -> None:
    def lanes(text: float, image: float | None) -> tuple[str, ...]:
        return SampleConfig(guidance_scale=text, image_guidance_scale=image).guidance_lanes

    assert lanes(1.0, None) == lanes(1.0, 1.0) == ()
    assert lanes(2.0, None) == ("nothing",)
    assert lanes(2.0, 1.0) == ("images",)
    assert lanes(1.0, 2.0) == lanes(2.0, 2.0) == ("images", "nothing")
    with pytest.raises(ValueError, match=r"sample.image_guidance_interval must rise"):
        override(config, {"sample": {"image_guidance_interval": [0.8, 0.2]}})
    model, tokenizer = awake(config)
    unguided = Decoder(model, tokenizer, config.sample.model_copy(update={"guidance_scale": 1.0}))
    with pytest.raises(ValueError, match="negative_prompt acts through guidance"):
        unguided.generate([Request(["a"], "image", negative_prompt="b")])
    guided = Decoder(model, tokenizer, config.sample.model_copy(update={"guidance_scale": 2.0}))
    with pytest.raises(ValueError, match="negative_prompt acts through guidance"):
        guided.generate([Request(["a"], "text", negative_prompt="b")])
    with pytest.raises(ValueError, match="cannot contain special tokens"):
        guided.generate([Request(["a"], "image", negative_prompt="<|boi|>")])
