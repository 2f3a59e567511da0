"""The report of a run: captions to images, images to captions, held-out losses, and what baselines score."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mmgen.config import Config, SampleConfig, choose
from mmgen.data.loader import Corpus
from mmgen.data.progress import Progress
from mmgen.data.shards.samples import BadRecord, Sample, read
from mmgen.data.shards.store import Patterns
from mmgen.evaluate.baselines import BASELINES, imitate, training_digit
from mmgen.evaluate.features import Pictures, Real
from mmgen.evaluate.judge import Judge, pixels, truth
from mmgen.evaluate.metrics import Drawn, Scores, agreement, score
from mmgen.evaluate.tasks import TASKS, Pixels, Task, Truth
from mmgen.generate.decoder import Decoder, Request
from mmgen.image import sheet
from mmgen.model import MMGenModel
from mmgen.sequence.tokenizer import Tokenizer
from mmgen.train.ranks import Ranks
from mmgen.train.state import TrainerState
from mmgen.train.validate import held_out


@dataclass(frozen=True)
class CaptionScores:
    """Captions of held-out pictures, compared with what the pictures show."""

    i2t_n: int
    i2t_accuracy: float


@dataclass(frozen=True)
class HeldOutLosses:
    """Losses over one epoch of held-out data with fixed noise."""

    val_loss_text: float
    """Nats per text target."""
    val_loss_image: float
    """Per entry of a patch."""
    val_loss_image_by_place: list[float]
    """The same at each cell of the first declared patch grid, in raster order."""


@dataclass(frozen=True)
class Report:
    """What `report.json` holds; `flat` gives its keys."""

    step: int
    t2i_n: int
    t2i_guidance: float
    t2i_solver_steps: int
    seconds_per_image: float
    scores: Scores
    """Every metric of the model's pictures."""
    t2i_accuracy_w1: float
    """Without guidance."""
    t2i_accuracy_shuffled: float
    """Against the captions of other pictures: what chance gives."""
    t2i_ceiling: float
    """Of real pictures, which the judge does not always read right."""
    fd_pixel_floor: float
    two_sample_accuracy_real: float
    t2i_accuracy_heldout_combination: float | None
    captions: CaptionScores
    losses: HeldOutLosses | None
    bad_samples: int
    train_seconds: float
    parameters: int
    reference_generators: dict[str, Scores]
    """Every metric of the pictures of each baseline."""
    eval_seconds: float

    def flat(self) -> dict[str, Any]:
        """One flat object for JSON; scores that were not asked for are left out."""
        found: dict[str, Any] = {}
        for name, value in asdict(self).items():
            if name in ("scores", "captions", "losses"):
                found |= value or {}
            elif value is not None:
                found[name] = value
        return found


@dataclass(frozen=True)
class Generator:
    """A model that draws captions and describes pictures, `batch` requests at a time."""

    model: MMGenModel
    tokenizer: Tokenizer
    sample: SampleConfig
    batch: int
    report: Callable[[str], None]
    """Called with lines of progress."""

    def draw(self, samples: Sequence[Sample], guidance_scale: float) -> list[Image.Image]:
        """A picture for the caption of each sample."""
        requests = [Request([sample.caption], "image", seed) for seed, sample in enumerate(samples)]
        decoder = self._decoder(guidance_scale=guidance_scale)
        label = f"drawing at guidance {guidance_scale:g}"
        return [result.images[0] for part in self._batches(requests, label) for result in decoder.generate(part)]

    def describe(self, images: Sequence[Image.Image]) -> list[str]:
        """The most likely caption of each picture."""
        requests = [Request([image], "text") for image in images]
        decoder = self._decoder(temperature=0.0)
        return [result.text for part in self._batches(requests, "captioning") for result in decoder.generate(part)]

    def _decoder(self, **settings: float) -> Decoder:
        return Decoder(self.model, self.tokenizer, self.sample.model_copy(update=settings))

    def _batches(self, requests: Sequence[Request], label: str) -> Iterator[Sequence[Request]]:
        """Yield batches of requests, and report how many requests are done and the minutes to go."""
        with Progress(label, "pictures", len(requests), self.report) as progress:
            for i in range(0, len(requests), self.batch):
                yield requests[i : i + self.batch]
                progress.done = min(i + self.batch, len(requests))


def evaluate(
    model: MMGenModel, tokenizer: Tokenizer, config: Config, trainer: TrainerState, report: Callable[[str], None]
) -> Report:
    """Score a model and write `report.json` and `samples/evaluation.png` into the run folder.

    Raises:
        ValueError, FileNotFoundError: the eval section names an unknown task, or shards that are missing or unlabelled.
    """
    began = time.monotonic()
    settings, scale = config.eval, config.sample.guidance_scale
    task: Task = choose(TASKS, settings.task, "eval.task")()
    report("training the judge on labelled digits")
    judge = Judge(task, settings.judge)
    generator = Generator(model, tokenizer, config.sample, settings.batch, report)
    bad: list[BadRecord] = []
    patcher = model.build_patcher()
    sources: list[Patterns] = [config.data.train, settings.test]
    reading = Progress("reading real pictures", "data sets", len(sources), report)
    train, test = (Pictures(shards, patcher, bad) for shards in reading.over(sources))
    real = Real(task, train, test, settings.samples)
    report(f"{settings.task}: judging {settings.samples} images against {len(test.samples)} real ones")

    asked = repeated(test.samples, settings.samples)
    wanted = [truth(sample) for sample in asked]
    drawing = time.monotonic()
    images = generator.draw(asked, scale)
    drawing = time.monotonic() - drawing
    drawn = Drawn(shown(images), wanted, real, judge)
    scores = score(drawn)
    report(f"captions to images: {scores['t2i_accuracy']:.3f} right at guidance {scale}")
    plain = generator.draw(asked, 1.0)
    genuine = imitate(training_digit, wanted, real)
    combination = None
    if settings.heldout:
        unseen = repeated(list(read(settings.heldout)), settings.samples)
        found = judge.read(shown(generator.draw(unseen, scale)))
        combination = agreement(found, [truth(sample) for sample in unseen])
    captions = caption_scores(generator.describe(test.images), task, test.truth)
    report(f"images to captions: {captions.i2t_accuracy:.3f} right")
    losses = (
        held_out_losses(model, Corpus(config.data.val, tokenizer, config, model.autoencoder), report)
        if config.data.val
        else None
    )
    result = Report(
        step=trainer.step,
        t2i_n=settings.samples,
        t2i_guidance=scale,
        t2i_solver_steps=config.sample.steps,
        seconds_per_image=drawing / len(images),
        scores=scores,
        t2i_accuracy_w1=agreement(judge.read(shown(plain)), wanted),
        t2i_accuracy_shuffled=agreement(drawn.shown, wanted[1:] + wanted[:1]),
        t2i_ceiling=agreement(judge.read(real.test), real.test_truth),
        fd_pixel_floor=real.frechet(genuine),
        two_sample_accuracy_real=real.separable(genuine),
        t2i_accuracy_heldout_combination=combination,
        captions=captions,
        losses=losses,
        bad_samples=len(bad),
        train_seconds=round(trainer.train_seconds, 1),
        parameters=sum(p.numel() for p in model.parameters()),
        reference_generators={
            name: score(Drawn(imitate(baseline, wanted, real), wanted, real, judge))
            for name, baseline in Progress("scoring baselines", "baselines", len(BASELINES), report).over(
                BASELINES.items()
            )
        },
        eval_seconds=round(time.monotonic() - began, 1),
    )
    cells = images[:24]
    evaluation = config.run.dir / "samples" / "evaluation.png"
    sheet.save(sheet.grid(cells, [sample.caption for sample in asked[: len(cells)]]), evaluation)
    write_report(config.run.dir, result.flat())
    return result


def repeated(samples: Sequence[Sample], count: int) -> list[Sample]:
    """`count` samples, from the first on and over again."""
    return [samples[i % len(samples)] for i in range(count)]


def shown(images: Sequence[Image.Image]) -> list[Pixels]:
    """Images as arrays."""
    return [pixels(image) for image in images]


def caption_scores(captions: Sequence[str], task: Task, wanted: Sequence[Truth]) -> CaptionScores:
    """Captions parsed and compared with what the pictures show."""
    return CaptionScores(len(captions), agreement([task.parse(caption) for caption in captions], wanted))


def held_out_losses(
    model: MMGenModel, corpus: Corpus, report: Callable[[str], None] = lambda line: None
) -> HeldOutLosses:
    """Losses over one epoch of a corpus with fixed noise."""
    rows, columns = model.patcher.grids[0]
    text, image, texts, images = 0.0, 0.0, 0, 0
    sums, counts = torch.zeros(2, rows * columns, dtype=torch.float64)
    progress = Progress("computing held-out losses", "batches", log=report)
    for batch, losses in progress.over(held_out(model, corpus, Ranks())):
        text, texts = text + float(losses.text), texts + losses.text_count
        image, images = image + float(losses.image), images + losses.image_count
        row, column = batch.place_I2[batch.loss_at_J].cpu().T
        inside = (row < rows) & (column < columns)
        place = (row * columns + column)[inside]
        sums += torch.bincount(place, losses.image_J.double().cpu()[inside], minlength=rows * columns)
        counts += torch.bincount(place, minlength=rows * columns)
    by_place = (sums / counts.clamp(min=1)).tolist()
    return HeldOutLosses(text / max(texts, 1), image / max(images, 1), by_place)


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write report.json into a folder, all or nothing."""
    temporary = folder / "report.json.tmp"
    temporary.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    os.replace(temporary, folder / "report.json")
