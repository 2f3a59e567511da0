"""Does sampling compute what training computed? The decoder's every backbone call against the training forward.

A model with random weights serves scripted documents (text before and after images, several images each, of all
declared sizes) while everything that enters and leaves the backbone is recorded. Each call is then computed again
from a document that the training code lays out, without cache, and compared: positions, who sees whom, inputs,
hidden states; and each image is drawn again by an Euler loop written here.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mmgen.config import Config, SampleConfig, choose
from mmgen.config_io import override
from mmgen.generate import decoder as generate
from mmgen.generate.decoder import Decoder, Request
from mmgen.model import MMGenConfig, MMGenModel
from mmgen.parity.faults import FAULTS
from mmgen.parity.record import Recorder
from mmgen.parity.reference import Picture, Reference, Report
from mmgen.sequence.document import TextSegment
from mmgen.sequence.tokenizer import Tokenizer

STEPS = 3
WEIGHT = 1.7
"""Guidance scale of the check."""
VARIANTS: dict[str, dict[str, Any]] = {
    "transfusion, noisy": {"kind": "transfusion", "transfusion": {"context": "noisy"}},
    "transfusion, capped": {"kind": "transfusion", "transfusion": {"context": "capped"}},
    "transfusion, clean copy": {"kind": "transfusion", "transfusion": {"context": "clean_copy"}},
    "mar, masked": {"kind": "mar", "mar": {"order": "masked"}},
    "mar, random": {"kind": "mar", "mar": {"order": "random"}},
    "mar, raster": {"kind": "mar", "mar": {"order": "raster"}},
}
SCRIPTS = ("wwiwiw", "iiw", "wiw")
"""What each row chooses: w a word, i an image; then the end."""


class _Scripted(Decoder):
    """A decoder whose rows choose what `SCRIPTS` says; a request's seed is its row."""

    def __init__(self, model: MMGenModel, tokenizer: Tokenizer, sample: SampleConfig) -> None:
        super().__init__(model, tokenizer, sample)
        self._boi = np.arange(len(self._words)) == tokenizer.boi
        self._eos = np.arange(len(self._words)) == tokenizer.eos
        self._scripts = [iter((*script, "end")) for script in SCRIPTS]

    def legal(self, request: Request, images: int, words: int) -> NDArray[np.bool_]:
        if request.mode != "auto":
            return super().legal(request, images, words)
        wish = next(self._scripts[request.seed])
        only: NDArray[np.bool_] = {"w": self._words, "i": self._boi, "end": self._eos}[wish]
        return only


def check_parity(config: Config, inject: str | None = None) -> list[dict[str, Any]]:
    """Compare sampling with training for every objective, order and context policy of a configuration's model.

    Returns one object per variant: `holds`, how many positions were compared, the largest differences, and the
    first that is too large. `inject` breaks the decoder in a named way, to show that the check sees it.

    Raises:
        ValueError: an unknown fault.
    """
    fault = nullcontext if inject is None else choose(FAULTS, inject, "fault")
    return [_check_variant(name, config, change, fault) for name, change in VARIANTS.items()]


def _check_variant(
    name: str, config: Config, change: dict[str, Any], fault: Callable[[], AbstractContextManager[Any]]
) -> dict[str, Any]:
    sample = SampleConfig(
        steps=STEPS, guidance_scale=WEIGHT, unmask_steps=STEPS, max_images=3, max_new_tokens=8, temperature=1.0
    )
    neutral = {"kind": "transfusion", "bidirectional": None, "mar": {"head": {"kind": "flow"}}}
    objective = override(override(config, {"objective": neutral}), {"objective": change}).objective
    tokenizer = Tokenizer.load(config.data.tokenizer, config.model.patcher.grids)
    model = _awake(config.model_copy(update={"objective": objective}), tokenizer)
    requests = _requests(config)
    recorders: list[Recorder] = []

    def recording(*args: Any, **kwargs: Any) -> Recorder:
        recorders.append(Recorder(*args, **kwargs))
        return recorders[-1]

    decoder = _Scripted(model, tokenizer, sample)
    with mock.patch.object(generate, "Schedule", recording), fault():
        events = list(decoder.stream(requests, previews=False))
    report, reference = Report(), Reference(model, tokenizer, sample)
    with torch.no_grad():
        for row, request in enumerate(requests):
            images = iter(recorders[0].drawn.get(row, []))
            segments: list[TextSegment | Picture] = [_piece(decoder, piece) for piece in request.prompt]
            for event in events:
                if event.row == row and event.kind == "token":
                    segments.append(TextSegment([event.token or 0]))
                elif event.row == row and event.kind == "image":
                    image = next(images)
                    segments.append(Picture(image.x_NP.float().numpy(), image.grid, image.order_N))
            report.same(f"row {row}", recorders[0].fed[row], reference.read(segments, None))
            for image in recorders[0].drawn.get(row, []):
                reference.check(report, f"row {row}, image {image.number}", image, segments)
    return report.as_dict(name)


def _awake(config: Config, tokenizer: Tokenizer) -> MMGenModel:
    """A model in float64 whose zero-initialised parts are random, so that nothing hides behind a zero."""
    torch.manual_seed(0)
    model = MMGenModel(MMGenConfig.of(config, len(tokenizer)))
    model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def _requests(config: Config) -> list[Request]:
    """Prompts that begin with text and with images, of the first and the last declared size."""
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
    segment = decoder.segment(piece)
    if isinstance(segment, TextSegment):
        return segment
    return Picture(segment.x_NP, segment.grid, np.arange(len(segment.x_NP)))
