"""Checks that sampling computes the same as training, by comparing every backbone call of the decoder.

A model of random weights serves scripted requests: text before and after images, several images per document, images
of all declared sizes. Images are drawn with the sampling settings of the configuration. The check records all inputs
and outputs of the backbone, and all noise. Then the training code lays out the same documents and computes them without
a cache in float64, and the check compares positions, visibility, inputs and hidden states. It also draws each image
again from training's outputs (`mmgen.objective.replay.redraw`).

What it proves: with these settings, the decoder computes what training computes at equal z, t and context, and uses the
solver, times, guidance, clipping and temperature that the settings name. What it does not prove: that training covers
what sampling asks for. Training may rarely draw the t, the contexts or the mask ratios that sampling needs, and the
check would not notice. One case is the clean image that later positions see in sampling, which has t = 1: where the
context is noisy or capped, training draws t from `objective.time`, and a logit-normal distribution ends below 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mmgen.config import Config, ObjectiveConfig, PatcherConfig, choose
from mmgen.config_io import override
from mmgen.generate import Decoder, Event, Request
from mmgen.generate.grammar import Grammar
from mmgen.generate.parts import REAL, Parts
from mmgen.model import MMGenConfig, MMGenModel
from mmgen.objective import OBJECTIVES, ImageObjective, build_objective
from mmgen.objective.layers import ProjectionError
from mmgen.parity.faults import FAULTS
from mmgen.parity.record import DrawnImage, Recorder
from mmgen.parity.reference import Document, ImageReplay, Picture, Reference
from mmgen.parity.report import Report
from mmgen.sequence.document import TextSegment
from mmgen.sequence.tokenizer import Tokenizer
from mmgen.train.checkpoint.read import known_facts

VARIANTS: dict[str, dict[str, Any]] = {
    "transfusion, noisy": {"kind": "transfusion", "transfusion": {"context": "noisy"}},
    "transfusion, capped": {"kind": "transfusion", "transfusion": {"context": "capped"}},
    "transfusion, clean copy": {"kind": "transfusion", "transfusion": {"context": "clean_copy"}},
    "mar, masked": {"kind": "mar", "mar": {"order": "masked"}},
    "mar, random": {"kind": "mar", "mar": {"order": "random"}},
    "mar, raster": {"kind": "mar", "mar": {"order": "raster"}},
}
SCRIPTS = ("wwiwiw", "iiw", "wiw")
"""The choices of each request in order: `w` is a text token, `i` an image; EOS follows."""


class ScriptedGrammar(Grammar):
    """Allows each request only the next choice of its script; the seed of a request is its index in `SCRIPTS`."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int) -> None:
        super().__init__(tokenizer, vocabulary)
        ids = np.arange(vocabulary)
        self._choices: dict[str, NDArray[np.bool_]] = {
            "w": self.words_V,
            "i": ids == tokenizer.boi,
            "end": ids == tokenizer.eos,
        }
        self._scripts = [iter((*script, "end")) for script in SCRIPTS]

    def allowed(self, request: Request, more_images: bool, words: int) -> NDArray[np.bool_]:
        if request.mode != "auto":
            return super().allowed(request, more_images, words)
        return self._choices[next(self._scripts[request.seed])]


def check_parity(config: Config, inject: str | None = None) -> list[Report]:
    """Compare sampling with training for every objective, order and context policy, with the model of a configuration.

    Returns one report per variant, without variants that reject the patch projection of the configuration. `inject`
    names a fault of `FAULTS`, which breaks the decoder; the check must then fail.

    `objective.bidirectional` and all settings of `sample` that concern images are those of the configuration. The
    causal orders of MAR refuse `bidirectional: true`, so they are checked without it.

    Raises:
        ValueError: the fault is unknown, the objective has no method `replay`, or the sampling settings contradict
            each other.
    """
    parts = REAL if inject is None else choose(FAULTS, inject, "fault")
    kind = config.objective.kind
    known = any(change["kind"] == kind for change in VARIANTS.values())
    patcher = config.model.patcher
    build_objective(config.objective, patcher, 8)  # raises if the configuration itself cannot be built
    variants = {name: change for name, change in VARIANTS.items() if _fits(_varied(config, change), patcher)}
    variants = variants if known else {kind: {"kind": kind}}
    if not known and not can_replay(config):
        raise ValueError(
            f"objective.kind '{kind}' has no `replay`, so its sampling cannot be compared with training: "
            "implement `ImageObjective.replay`"
        )
    return [_check_variant(name, config, change, parts) for name, change in variants.items()]


def can_replay(config: Config) -> bool:
    """Return whether the objective of a configuration implements `replay`."""
    return OBJECTIVES[config.objective.kind].replay is not ImageObjective.replay


def _varied(config: Config, change: dict[str, Any]) -> ObjectiveConfig:
    """Return the objective of a configuration with the settings of a variant."""
    neutral: dict[str, Any] = {"kind": "transfusion", "mar": {"head": {"kind": "flow"}}}
    if config.objective.bidirectional and change.get("mar", {}).get("order") in ("random", "raster"):
        neutral["bidirectional"] = None  # they refuse true
    return override(override(config, {"objective": neutral}), {"objective": change}).objective


def _fits(objective: ObjectiveConfig, patcher: PatcherConfig) -> bool:
    """Return whether an objective accepts the patch projection."""
    try:
        build_objective(objective, patcher, 8)
    except ProjectionError:
        return False
    return True


def _check_variant(name: str, config: Config, change: dict[str, Any], parts: Parts) -> Report:
    # The script chooses text and images, so that only how images are drawn is left to the settings.
    scripted = {"max_images": 3, "max_new_tokens": 8, "temperature": 1.0}
    sample = config.sample.model_copy(update=scripted)
    objective = _varied(config, change)
    tokenizer = Tokenizer.of(config)
    model = _random_model(config.model_copy(update={"objective": objective}), tokenizer)
    requests, recorder = _requests(config), Recorder(parts.generate)
    parts = replace(parts, grammar=ScriptedGrammar, observer=recorder, generate=recorder.generate)
    decoder = Decoder(model, tokenizer, sample, parts)
    events = list(decoder.stream(requests, previews=False))
    report, reference = Report(name), Reference(model, tokenizer)
    with torch.no_grad():
        for number, request in enumerate(requests):
            drawn = recorder.drawn.get(number, [])
            segments = [_piece(decoder, piece) for piece in request.prompt]
            segments += _generated([event for event in events if event.request == number], drawn)
            report.same(f"request {number}", recorder.fed[number], reference.read(Document(segments)).fed)
            for image in drawn:
                replay = ImageReplay(reference, report, image, sample)
                replay.run(f"request {number}, image {image.number}", segments)
    return report


def _generated(events: Sequence[Event], drawn: Sequence[DrawnImage]) -> list[TextSegment | Picture]:
    """Return the segments that the events of a request add to its document."""
    images = iter(drawn)
    segments: list[TextSegment | Picture] = []
    for event in events:
        if event.kind == "token":
            segments.append(TextSegment([event.token or 0]))
        elif event.kind == "image":
            image = next(images)
            segments.append(Picture(image.x_NP.float().numpy(), image.grid, image.order_N))
    return segments


def _random_model(config: Config, tokenizer: Tokenizer) -> MMGenModel:
    """Build a float64 model whose weights are all non-zero; a zero weight would hide differences behind it."""
    torch.manual_seed(0)
    model = MMGenModel(MMGenConfig.of(config, len(tokenizer), known_facts(config)))
    model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def _requests(config: Config) -> list[Request]:
    """Return requests whose prompts begin with text or with images, of the first and the last declared size."""
    rng = np.random.default_rng(0)
    sizes = config.model.patcher.image_sizes
    channels = (3,) if config.model.patcher.channels == 3 else ()
    first, last = (
        Image.fromarray(rng.integers(0, 256, (*size, *channels), np.uint8)) for size in (sizes[0], sizes[-1])
    )
    return [
        Request(["ab"], seed=0),
        Request([first, "cd", last], seed=1),
        Request([last, "e"], seed=2),
        Request(["fgh"], "image", seed=3, grid=config.model.patcher.grids[-1]),
    ]


def _piece(decoder: Decoder, piece: str | Image.Image) -> TextSegment | Picture:
    """Convert a piece of a prompt to the segment that training writes, which has no loss."""
    segment = decoder.segment(piece)
    if isinstance(segment, TextSegment):
        return replace(segment, learn=False)
    return Picture(segment.x_NP, segment.grid, np.arange(len(segment.x_NP)), learn=False)
