"""Runs training's forward pass on the documents that the decoder generated, and draws their images again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmgen.backbone import attention_mask
from mmgen.config import SampleConfig
from mmgen.image.patch import Grid
from mmgen.model import MMGenModel
from mmgen.objective import ImageSite
from mmgen.objective.replay import Put, Replay, SampledImage, Trained
from mmgen.parity.record import DrawnImage, Fed, Identity, names_of
from mmgen.parity.report import Report
from mmgen.sequence.attention import dense_visible
from mmgen.sequence.batch import Batch, RowFormat, collate, prepare
from mmgen.sequence.document import Block, ImageSegment, Strip, TextSegment, Writer
from mmgen.sequence.tokenizer import Tokenizer


@dataclass(frozen=True)
class Picture:
    """An image of a document: patches in raster order, and the order in which they were generated."""

    x_NP: NDArray[Any]
    grid: Grid
    order_N: NDArray[np.int64]
    learn: bool = True
    """False for an image of the prompt: training writes it as a clean segment without loss."""


@dataclass(frozen=True)
class Document:
    """Segments of a document, and the index of the image that is being drawn; the other images are context."""

    segments: Sequence[TextSegment | Picture]
    drawing: int | None = None


@dataclass(frozen=True)
class Reading:
    """Results of the training code for one document: each position by its identity, and states of the drawn image."""

    fed: dict[Identity, Fed]
    trained: Trained


class Reference:
    """Runs training's forward pass in float64, with chosen images."""

    def __init__(self, model: MMGenModel, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.layout = model.objective.layout

    def read(self, document: Document, put: Put | None = None) -> Reading:
        """Lay out and embed a document and run the backbone; `put` changes the drawn image of the batch before that."""
        strip, names = self._written(document)
        patcher = self.model.build_patcher()
        nothing, draws = self.layout.context((0, 0)), self.layout.noise_draws
        form = RowFormat(len(strip), self.tokenizer, nothing, patcher.ready, draws)
        batch = prepare(collate([[strip]], form), patcher, "cpu", torch.float64)
        drawn = [i for i, name in enumerate(names) if (name.kind, name.number) == ("patch", document.drawing)]
        at = torch.tensor(drawn, dtype=torch.long)
        if put is not None:
            put(batch, torch.nonzero(torch.isin(batch.at_I, at)).flatten())
        inputs, embedded = self.model.embed(batch)
        hidden = self.model.hidden(inputs, batch.position_BS, attention_mask(batch.sites), batch.modality)[0]
        learned = torch.isin(batch.at_I[batch.loss_at_J], at)
        trained = Trained(batch, embedded.state, hidden[embedded.read_at_J[learned]], batch.loss_at_J[learned])
        return Reading(_fed(names, batch, inputs[0], hidden), trained)

    def _written(self, document: Document) -> tuple[Strip, list[Identity]]:
        """Write the document as training does; returns it with the identity of each position."""
        rng = np.random.default_rng(0)
        written: list[TextSegment | ImageSegment] = []
        roles: list[str] = []
        images = 0
        for segment in document.segments:
            if isinstance(segment, TextSegment):
                written.append(segment)
                continue
            learning = images == document.drawing
            blocks = self._blocks(segment, learning, rng)
            last = len(blocks) - 1
            roles += ["patch" if b == (0 if learning else last) else f"copy {b}" for b in range(len(blocks))]
            written.append(ImageSegment(segment.x_NP, segment.grid, blocks, segment.learn))
            images += 1
        strip = Writer(self.tokenizer, self.model.positions).document(written)
        return strip, names_of(strip, roles.__getitem__)

    def _blocks(self, picture: Picture, learning: bool, rng: np.random.Generator) -> list[Block]:
        if not picture.learn:
            return [self.layout.context(picture.grid)]
        site = ImageSite(picture.grid, text_before=True, text_after=True, quantile=0.4, key=0)
        blocks = self.layout.blocks(site, rng)
        if self.layout.copies == 1 and not learning:
            # In sampling a finished image is always clean, at t = 1; in training its only copy may be noisy, and few
            # timestep distributions come near t = 1.
            clean = self.layout.context(picture.grid).draws
            blocks = [replace(block, draws=clean, loss=False) for block in blocks]
        return [replace(block, order_N=picture.order_N) for block in blocks]


def _fed(names: list[Identity], batch: Batch, inputs_SD: Tensor, hidden_SD: Tensor) -> dict[Identity, Fed]:
    """Return every position of a document by its identity."""
    seen = dense_visible(batch.sites)[0]
    return {
        name: Fed(
            name,
            int(batch.position_BS[0, i]),
            frozenset(names[k] for k in torch.nonzero(seen[i]).flatten().tolist()),
            inputs_SD[i],
            hidden_SD[i],
        )
        for i, name in enumerate(names)
    }


class ImageReplay(Replay):
    """Compares every backbone call of one drawn image with training."""

    def __init__(self, reference: Reference, report: Report, drawn: DrawnImage, sample: SampleConfig) -> None:
        self.reference, self.report, self.drawn = reference, report, drawn
        self.image = SampledImage(
            grid=drawn.grid,
            order_N=torch.from_numpy(drawn.order_N),
            noise_NP=drawn.noise_NP,
            x_NP=drawn.x_NP,
            draws=drawn.draws,
            sample=sample,
        )
        self.where = ""
        self.used = 0
        """Number of backbone calls that were compared."""
        self.documents: list[Document] = []
        """The document of each guidance lane."""

    def run(self, where: str, segments: Sequence[TextSegment | Picture]) -> None:
        """Compare the image with training; `segments` are the whole document that contains it."""
        at = [i for i, segment in enumerate(segments) if isinstance(segment, Picture)][self.drawn.number]
        self.where = where
        self.documents = [Document(segments[: at + 1], self.drawn.number)]
        for kept in self.image.sample.guidance_lanes:
            pictures = [one for one in segments[:at] if isinstance(one, Picture)] if kept == "images" else []
            self.documents.append(Document([*pictures, *self._negative(), segments[at]], len(pictures)))
        if len(self.documents) != self.drawn.lanes:
            self.report.calls(f"{where}, lanes", self.drawn.lanes, len(self.documents))
            self.documents = self.documents[: self.drawn.lanes]
        self.reference.model.objective.replay(self)
        self.report.calls(where, len(self.drawn.calls), self.used)

    def _negative(self) -> list[TextSegment]:
        """The negative prompt, which takes the place of the text that guidance removes."""
        text = self.image.sample.negative_prompt
        return [TextSegment(self.reference.tokenizer.encode(text))] if text else []

    def train(self, step: str, calls: slice, put: Put) -> list[Trained]:
        trained = []
        self.used += len(range(*calls.indices(len(self.drawn.calls))))
        for lane, document in enumerate(self.documents):
            reading = self.reference.read(document, put)
            sampled = [fed for call in self.drawn.calls[calls] for fed in call[lane]]
            self.report.same(self._at(step), sampled, reading.fed)
            trained.append(reading.trained)
        return trained

    def compare(self, step: str, sampled: Tensor, drawn: Tensor) -> None:
        self.report.patches(self._at(step), sampled, drawn)

    def _at(self, step: str) -> str:
        return f"{self.where}, {step}" if step else self.where
