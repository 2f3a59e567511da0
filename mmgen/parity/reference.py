"""The training forward pass of the documents that the decoder made, and its images drawn again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmgen.backbone import attention_mask
from mmgen.config import SampleConfig
from mmgen.image.patch import Floats, Grid, raster
from mmgen.model import MMGenModel
from mmgen.objective import Embedded, ImageSite
from mmgen.objective.mar import guidance_at
from mmgen.parity.record import Drawn, Fed, Identity, names_of
from mmgen.sequence.attention import dense_visible
from mmgen.sequence.batch import Batch, Places, RowFormat, collate, prepare
from mmgen.sequence.document import ImageSegment, TextSegment, Writer
from mmgen.sequence.tokenizer import Tokenizer

TOLERANCE = 1e-9
"""Of inputs, hidden states and patches in float64, relative to their largest magnitude."""


@dataclass(frozen=True)
class Picture:
    """An image of a document, as patch rows in raster order."""

    x_NP: Floats
    grid: Grid
    order_N: NDArray[np.int64]


@dataclass(frozen=True)
class _Reading:
    """One document through the training code: every position by its identity, and what the objective embedded."""

    fed: dict[Identity, Fed]
    batch: Batch
    embedded: Embedded
    learned: Tensor
    """Hidden states that predict the learned patches of the image being drawn, [J, D]."""
    of_drawing: Tensor
    """Indices into I of these patches."""


_Document = tuple[Sequence[TextSegment | Picture], int]
"""Segments, and which of their images is drawn."""
Setter = Callable[[Batch, Tensor], None]
"""Puts a sampler's state in place of what training drew: (batch, indices into I of the patches)."""


class Report:
    """How many positions of a variant were compared, the largest differences, and the first that is too large."""

    def __init__(self) -> None:
        self.compared = 0
        self.worst = {"inputs": 0.0, "hidden": 0.0, "patches": 0.0}
        self.first: str | None = None

    def note(self, where: str, what: str, difference: float) -> None:
        self.worst[what] = max(self.worst[what], difference)
        if not difference <= TOLERANCE and self.first is None:
            self.first = f"{where}: {what} differ by {difference:.2g}"

    def same(self, where: str, sampled: Sequence[Fed], reading: _Reading) -> None:
        """Positions, visibility, inputs and hidden states of what was fed equal those of training."""
        for fed in sampled:
            trained = reading.fed[fed.identity]
            place = f"{where}, {' '.join(map(str, fed.identity))}"
            self.compared += 1
            if fed.position != trained.position and self.first is None:
                self.first = f"{place}: position {fed.position}, in training {trained.position}"
            if fed.sees != trained.sees and self.first is None:
                odd = sorted(map(str, fed.sees ^ trained.sees))
                self.first = f"{place}: sees other positions than in training ({len(odd)}, such as {odd[0]})"
            self.note(place, "inputs", _apart(fed.inputs_D, trained.inputs_D))
            self.note(place, "hidden", _apart(fed.hidden_D, trained.hidden_D))

    def as_dict(self, name: str) -> dict[str, Any]:
        largest = {f"largest_difference_{what}": value for what, value in self.worst.items()}
        return {
            "variant": name,
            "holds": self.first is None,
            "positions": self.compared,
            **largest,
            "first": self.first,
        }


def _apart(one: Tensor, other: Tensor) -> float:
    """Largest difference, relative to the largest magnitude."""
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-12))


class Reference:
    """The training forward pass, in float64, of documents that hold given images."""

    def __init__(self, model: MMGenModel, tokenizer: Tokenizer, sample: SampleConfig) -> None:
        self.model, self.tokenizer, self.sample = model, tokenizer, sample
        self.objective: Any = model.objective
        self.settings = model.objective.settings

    def read(
        self, segments: Sequence[TextSegment | Picture], drawing: int | None, put: Setter | None = None
    ) -> _Reading:
        """Lay out, embed and run a document; image number `drawing` is being learned, all others are context."""
        rng = np.random.default_rng(0)
        document: list[TextSegment | ImageSegment] = []
        roles: list[str] = []
        images = 0
        for segment in segments:
            if isinstance(segment, TextSegment):
                document.append(segment)
                continue
            learning = images == drawing
            layout = self.objective.layout
            site = ImageSite(segment.grid, text_before=True, text_after=True, quantile=0.4)
            blocks = layout.blocks(site, rng)
            if layout.copies == 1 and not learning:
                # Sampling knows a finished image clean; in training its only copy may be noisy.
                blocks = [replace(block, draws=layout.context(segment.grid).draws) for block in blocks]
            blocks = [replace(block, order_N=segment.order_N) for block in blocks]
            last = len(blocks) - 1
            roles += ["patch" if (b == 0 if learning else b == last) else f"copy {b}" for b in range(len(blocks))]
            document.append(ImageSegment(segment.x_NP, segment.grid, blocks))
            images += 1
        strip = Writer(self.tokenizer).document(document)
        patcher = self.model.build_patcher()
        form = RowFormat(len(strip), self.tokenizer, self.objective.layout.context((0, 0)), patcher.ready)
        batch = prepare(collate([[strip]], form), patcher, "cpu", torch.float64)
        names = names_of(strip, 0, 0, roles.__getitem__)
        at = torch.tensor([i for i, name in enumerate(names) if name[:2] == ("patch", drawing)], dtype=torch.long)
        if put is not None:
            put(batch, torch.nonzero(torch.isin(batch.at_I, at)).flatten())
        inputs, embedded = self.model.embed(batch)
        hidden = self.model.hidden(inputs, batch.position_BS, attention_mask(batch.sites), batch.modality)[0]
        seen = dense_visible(batch.sites)[0]
        fed = {
            name: Fed(
                name,
                int(batch.position_BS[0, i]),
                frozenset(names[k] for k in torch.nonzero(seen[i]).flatten().tolist()),
                inputs[0, i],
                hidden[i],
            )
            for i, name in enumerate(names)
        }
        mine = torch.isin(batch.at_I[batch.loss_at_J], at)
        return _Reading(fed, batch, embedded, hidden[embedded.read_at_J[mine]], batch.loss_at_J[mine])

    def check(self, report: Report, where: str, image: Drawn, segments: Sequence[TextSegment | Picture]) -> None:
        """Compare every call of an image with training, and draw the image again."""
        at = [i for i, segment in enumerate(segments) if isinstance(segment, Picture)][image.number]
        shown = segments[at]
        documents: list[_Document] = [(segments[: at + 1], image.number), ([shown], 0)]
        if self.settings.kind == "transfusion":
            self._denoise(report, where, image, documents)
        elif self.settings.mar.causal:
            self._follow(report, where, image, documents)
        else:
            self._unmask(report, where, image, documents)

    def _denoise(self, report: Report, where: str, image: Drawn, documents: list[_Document]) -> None:
        calls = iter(image.calls)

        def velocity(z: Tensor, t: Tensor) -> list[Tensor]:
            def put(batch: Batch, at: Tensor) -> None:
                batch.x_IP[at], batch.draws["t"][at] = 0.0, t
                batch.draws["eps"][at] = z / self.objective.flow.path.sigma(t)

            outputs = []
            for (segments, number), sampled in zip(documents, next(calls), strict=True):
                reading = self.read(segments, number, put)
                report.same(f"{where}, t = {float(t):.2f}", sampled, reading)
                memory, j = reading.embedded.state.memory, reading.of_drawing
                places = Places(reading.batch.image_I[j], reading.batch.place_I2[j])
                memory = None if memory is None else memory[j]
                outputs.append(self.objective.projection.leave.leave(reading.learned, memory, t.expand(len(j)), places))
            return self._velocities(outputs, z, t)

        drawn = self._euler(image.noise_NP, velocity, torch.tensor(self.sample.guidance_scale, dtype=torch.float64))
        report.note(where, "patches", _apart(image.x_NP, drawn))

    def _unmask(self, report: Report, where: str, image: Drawn, documents: list[_Document]) -> None:
        n = len(image.noise_NP)
        place = self.objective.place(torch.from_numpy(raster(image.grid)))
        inputs = [torch.stack([fed.inputs_D for fed in call[0]]) for call in image.calls]
        shown = [(i - place - self.objective.mask_vector).abs().amax(1) > TOLERANCE for i in inputs]
        shown.append(torch.ones(n, dtype=torch.bool))
        for i, call in enumerate(image.calls):
            now = shown[i + 1] & ~shown[i]

            def put(batch: Batch, at: Tensor, seen: Tensor = shown[i]) -> None:
                batch.x_IP[at] = image.x_NP * seen.unsqueeze(1)
                batch.draws["masked"][at] = (~seen).to(torch.float64)
                batch.loss_at_J = at[~seen]

            states = []
            for (segments, number), sampled in zip(documents, call, strict=True):
                reading = self.read(segments, number, put)
                report.same(f"{where}, step {i}", sampled, reading)
                states.append(self.objective.head.state(reading.learned[now[~shown[i]]]))
            scale = guidance_at(float(shown[i + 1].double().mean()), self.sample)
            drawn = self._patches(image.noise_NP[now], states, torch.tensor(scale, dtype=torch.float64))
            report.note(f"{where}, step {i}", "patches", _apart(image.x_NP[now], drawn))

    def _follow(self, report: Report, where: str, image: Drawn, documents: list[_Document]) -> None:
        order, n = torch.from_numpy(image.order_N), len(image.noise_NP)

        def put(batch: Batch, at: Tensor) -> None:
            batch.x_IP[at] = image.x_NP[order]

        states = []
        for lane, (segments, number) in enumerate(documents):
            reading = self.read(segments, number, put)
            report.same(where, [fed for call in image.calls for fed in call[lane]], reading)
            states.append(self.objective.head.state(reading.learned))
        scale = torch.tensor([guidance_at((k + 1) / n, self.sample) for k in range(n)], dtype=torch.float64).unsqueeze(
            1
        )
        drawn = self._patches(image.noise_NP[order], states, scale)
        report.note(where, "patches", _apart(image.x_NP[order], drawn))

    def _patches(self, noise: Tensor, states: list[Tensor], scale: Tensor) -> Tensor:
        """Patches that MAR's head draws given its view of the hidden states, one per guidance lane."""

        def velocity(z: Tensor, t: Tensor) -> list[Tensor]:
            return self._velocities([self.objective.head(z, t.expand(len(z)), state) for state in states], z, t)

        return self._euler(noise, velocity, scale)

    def _velocities(self, outputs: list[Tensor], z: Tensor, t: Tensor) -> list[Tensor]:
        path, clip = self.objective.flow.path, 1e-6
        return [path.convert(self.settings.prediction, "v", output, z, t, clip) for output in outputs]

    def _euler(self, noise: Tensor, velocity: Callable[[Tensor, Tensor], list[Tensor]], scale: Tensor) -> Tensor:
        """Clean patches from noise in `self.sample.steps` steps of the guided flow."""
        times = torch.arange(self.sample.steps + 1, dtype=torch.float64) / self.sample.steps
        z: Tensor = noise * self.objective.flow.path.sigma(times[0])
        for t, following in pairwise(times):
            conditional, unconditional = velocity(z, t)
            z = z + (following - t) * (unconditional + scale * (conditional - unconditional))
        return z
