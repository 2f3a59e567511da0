"""The report of a run: scores of images and captions, held-out losses, and the scores of baselines."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mmgen.config import Config, SampleConfig, choose
from mmgen.data.loader import Corpus
from mmgen.data.progress import Progress
from mmgen.data.shards.samples import BadRecord, Sample, read
from mmgen.data.shards.store import Patterns
from mmgen.data.views import validation_corpus
from mmgen.evaluate.baselines import BASELINES, draw_baseline, training_digit
from mmgen.evaluate.features import Pictures, Real
from mmgen.evaluate.judge import Judge, pixels, truth
from mmgen.evaluate.metrics import Drawn, Scores, agreement, score
from mmgen.evaluate.tasks import TASKS, Pixels, Task, Truth
from mmgen.generate.decoder import Decoder, Request
from mmgen.image import sheet
from mmgen.image.patch import Grid
from mmgen.model import MMGenModel
from mmgen.sequence.tokenizer import Tokenizer
from mmgen.train.ranks import Ranks
from mmgen.train.state import TrainerState
from mmgen.train.validate import FixedLosses, fixed_losses, held_out


@dataclass(frozen=True)
class CaptionScores:
    """Scores of captions that the model writes for real held-out pictures."""

    i2t_n: int
    """Number of captioned pictures."""
    i2t_accuracy: float
    """Share of captions that name exactly the objects of their picture."""


@dataclass(frozen=True)
class HeldOutLosses:
    """Losses over one epoch of held-out data.

    The first three are those of training: forms, context and t are drawn as in training, with a fixed seed.
    """

    val_loss_text: float
    """Cross-entropy in nats per text target."""
    val_loss_image: float
    """Image loss per entry of a patch."""
    val_loss_image_by_place: list[float]
    """Image loss of each cell of the first declared patch grid, in raster order."""
    fixed: FixedLosses | None = None
    """Losses that do not depend on the settings of training."""

    by_size: dict[str, float] = field(default_factory=dict)
    """Image loss of each declared size; empty if only one is declared."""

    def flat(self) -> dict[str, Any]:
        """The losses under their keys in `report.json`."""
        plain = {name: value for name, value in vars(self).items() if name not in ("fixed", "by_size")}
        sizes = {f"val_loss_image_{size}": loss for size, loss in self.by_size.items()}
        return plain | sizes | (self.fixed.flat("val_loss_") if self.fixed else {})


@dataclass(frozen=True)
class SizeScores:
    """The scores of pictures of one declared size, drawn and real."""

    t2i_n: int
    seconds_per_image: float
    scores: Scores
    t2i_accuracy_w1: float
    t2i_accuracy_shuffled: float
    t2i_ceiling: float
    fd_pixel_floor: float
    two_sample_accuracy_real: float
    t2i_accuracy_heldout_combination: float | None
    captions: CaptionScores
    reference_generators: dict[str, Scores]

    def flat(self, suffix: str) -> dict[str, Any]:
        """Return the scores with `suffix` at the end of each key, without those that the settings do not ask for."""
        nested = {**asdict(self), "scores": None, "captions": None}
        flat = {name: value for name, value in nested.items() if value is not None}
        return {f"{name}{suffix}": value for name, value in (flat | self.scores | asdict(self.captions)).items()}


@dataclass(frozen=True)
class Report:
    """The contents of `report.json`; `flat` returns them under their keys."""

    step: int
    """Training step of the checkpoint."""
    t2i_n: int
    """Number of captions that are drawn."""
    t2i_guidance: float
    """Guidance scale of the drawn pictures."""
    t2i_solver_steps: int
    seconds_per_image: float
    scores: Scores
    """Every metric of the drawn pictures."""
    t2i_accuracy_w1: float
    """`t2i_accuracy` without guidance."""
    t2i_accuracy_shuffled: float
    """`t2i_accuracy` against the caption of the next picture: the accuracy of chance."""
    t2i_ceiling: float
    """Accuracy of the judge on real held-out pictures."""
    fd_pixel_floor: float
    """`fd_pixel` of real training digits, composed for the same captions."""
    two_sample_accuracy_real: float
    """`two_sample_accuracy` of the same pictures."""
    t2i_accuracy_heldout_combination: float | None
    """`t2i_accuracy` of captions whose combinations of attributes are not in the training data."""
    captions: CaptionScores
    losses: HeldOutLosses | None
    bad_samples: int
    """Number of samples that could not be read."""
    train_seconds: float
    parameters: int
    reference_generators: dict[str, Scores]
    """Every metric of each baseline."""
    eval_seconds: float
    sizes: dict[str, SizeScores] = field(default_factory=dict)
    """Scores at the further declared sizes, by size; all other scores of pictures are those of the first size."""

    def flat(self) -> dict[str, Any]:
        """Return one flat object for JSON, without the scores that the settings do not ask for.

        Keys of a further size end with it, as in `t2i_accuracy_16x16`.
        """
        flat: dict[str, Any] = {}
        for name, value in asdict(self).items():
            if name == "losses":
                flat |= self.losses.flat() if self.losses else {}
            elif name in ("scores", "captions"):
                flat |= value or {}
            elif value is not None and name != "sizes":
                flat[name] = value
        for size, scores in self.sizes.items():
            flat |= scores.flat(f"_{size}")
        return flat


@dataclass(frozen=True)
class Generator:
    """A model that draws captions and captions pictures, `batch` requests at a time."""

    model: MMGenModel
    tokenizer: Tokenizer
    sample: SampleConfig
    batch: int
    report: Callable[[str], None]
    """Called with lines of progress."""

    def draw(self, samples: Sequence[Sample], guidance_scale: float, grid: Grid | None = None) -> list[Image.Image]:
        """Draw a picture for the caption of each sample, with the first declared patch grid if none is given."""
        requests = [Request([sample.caption], "image", seed, grid) for seed, sample in enumerate(samples)]
        decoder = self._decoder(guidance_scale=guidance_scale)
        label = f"drawing at guidance {guidance_scale:g}"
        return [result.images[0] for part in self._batches(requests, label) for result in decoder.generate(part)]

    def describe(self, images: Sequence[Image.Image]) -> list[str]:
        """Write the caption of each picture, by greedy choice."""
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
    """Score a model at every declared size, and write `report.json` and sheets of samples into the run folder.

    The sheets are `samples/evaluation.png`, and `samples/evaluation_HxW.png` for each further size. A further size
    without real pictures is left out. `report` is called with lines of progress.

    Raises:
        ValueError: `eval.task` is unknown, the JSON of a sample lists no objects, or there are no real pictures of the
            first size.
        FileNotFoundError: shards of `data.train` or of the section `eval` are missing.
    """
    began = time.monotonic()
    config = config.with_positions(model.positions)
    settings, scale = config.eval, config.sample.guidance_scale
    task: Task = choose(TASKS, settings.task, "eval.task")()
    report("training the judge on labelled digits")
    judge = Judge(task, settings.judge)
    generator = Generator(model, tokenizer, config.sample, settings.batch, report)
    bad: list[BadRecord] = []
    patcher = model.build_patcher()
    sources: list[Patterns] = [config.data.train, settings.test]
    reading = Progress("reading real pictures", "data sets", len(sources), report)
    train, test = (Pictures(shards, patcher, bad, config.data) for shards in reading.over(sources))
    heldout = list(read(settings.heldout)) if settings.heldout else []
    scored: dict[str, SizeScores] = {}
    patches = config.model.patcher
    for number, (size, grid) in enumerate(zip(patches.image_sizes, patches.grids, strict=True)):
        name = "x".join(map(str, size))
        sides = train.of_size(size), test.of_size(size)
        if not all(side.samples for side in sides):
            if not number:
                raise ValueError(
                    f"there are no real pictures of {name}, the first of model.patcher.image_sizes, in data.train or "
                    "eval.test: declare first a size that both have"
                )
            report(f"{name}: not scored, because data.train or eval.test has no pictures of this size")
            continue
        report(
            f"{settings.task}: drawing {settings.samples} captions at {name}, to compare with "
            f"{len(sides[1].samples)} real pictures"
        )
        sheet_name = f"evaluation_{name}.png" if number else "evaluation.png"
        sized = Sized(Real(task, *sides, settings.samples), sides[1], grid, config.run.dir / "samples" / sheet_name)
        scored[name] = score_size(generator, judge, sized, heldout, config, report)
    losses = (
        held_out_losses(model, validation_corpus(config, tokenizer, model.autoencoder), report)
        if config.data.val
        else None
    )
    first, *further = scored
    result = Report(
        step=trainer.step,
        **{item.name: getattr(scored[first], item.name) for item in fields(SizeScores)},
        t2i_guidance=scale,
        t2i_solver_steps=config.sample.steps,
        losses=losses,
        bad_samples=len(bad),
        train_seconds=round(trainer.train_seconds, 1),
        parameters=sum(p.numel() for p in model.parameters()),
        eval_seconds=round(time.monotonic() - began, 1),
        sizes={name: scored[name] for name in further},
    )
    write_report(config.run.dir, result.flat())
    return result


@dataclass(frozen=True)
class Sized:
    """A declared size: its real pictures, the held-out ones of them, its patch grid, and the file of its sheet."""

    real: Real
    test: Pictures
    grid: Grid
    sheet: Path


def score_size(
    generator: Generator,
    judge: Judge,
    sized: Sized,
    heldout: Sequence[Sample],
    config: Config,
    report: Callable[[str], None],
) -> SizeScores:
    """Score a model at one declared size, and write a sheet of the first pictures that it draws."""
    settings, scale, real, test = config.eval, config.sample.guidance_scale, sized.real, sized.test
    prompts = repeated(test.samples, settings.samples)
    wanted = [truth(sample) for sample in prompts]
    drawing = time.monotonic()
    images = generator.draw(prompts, scale, sized.grid)
    drawing = time.monotonic() - drawing
    drawn = Drawn(arrays(images), wanted, real, judge)
    scores = score(drawn)
    report(f"captions to images: accuracy {scores['t2i_accuracy']:.3f} at guidance {scale}")
    unguided = generator.draw(prompts, 1.0, sized.grid)
    genuine = draw_baseline(training_digit, wanted, real)
    combination = None
    if heldout:
        unseen = repeated(heldout, settings.samples)
        shown = judge.read(arrays(generator.draw(unseen, scale, sized.grid)))
        combination = agreement(shown, [truth(sample) for sample in unseen])
    captions = caption_scores(generator.describe(test.images), real.task, test.truth)
    report(f"images to captions: accuracy {captions.i2t_accuracy:.3f}")
    first = images[:24]
    sheet.save(sheet.grid(first, [sample.caption for sample in prompts[: len(first)]]), sized.sheet)
    return SizeScores(
        t2i_n=settings.samples,
        seconds_per_image=drawing / len(images),
        scores=scores,
        t2i_accuracy_w1=agreement(judge.read(arrays(unguided)), wanted),
        t2i_accuracy_shuffled=agreement(drawn.shown, wanted[1:] + wanted[:1]),
        t2i_ceiling=agreement(judge.read(real.test), real.test_truth),
        fd_pixel_floor=real.frechet(genuine),
        two_sample_accuracy_real=real.separable(genuine),
        t2i_accuracy_heldout_combination=combination,
        captions=captions,
        reference_generators={
            name: score(Drawn(draw_baseline(baseline, wanted, real), wanted, real, judge))
            for name, baseline in Progress("scoring baselines", "baselines", len(BASELINES), report).over(
                BASELINES.items()
            )
        },
    )


def repeated(samples: Sequence[Sample], count: int) -> list[Sample]:
    """Return `count` samples; the list starts again at its first sample when it ends."""
    return [samples[i % len(samples)] for i in range(count)]


def arrays(images: Sequence[Image.Image]) -> list[Pixels]:
    """Convert images to arrays of pixel values."""
    return [pixels(image) for image in images]


def caption_scores(captions: Sequence[str], task: Task, wanted: Sequence[Truth]) -> CaptionScores:
    """Parse captions and compare them with the objects of their pictures."""
    return CaptionScores(len(captions), agreement([task.parse(caption) for caption in captions], wanted))


def held_out_losses(
    model: MMGenModel, corpus: Corpus, report: Callable[[str], None] = lambda line: None
) -> HeldOutLosses:
    """Losses over one epoch of a corpus."""
    grids = model.patcher.grids
    rows, columns = grids[0]
    text, image, texts, images = 0.0, 0.0, 0, 0
    sums, counts = torch.zeros(2, rows * columns, dtype=torch.float64)
    size_sums, size_counts = torch.zeros(2, len(grids), dtype=torch.float64)
    progress = Progress("computing held-out losses", "batches", log=report)
    for batch, losses in progress.over(held_out(model, corpus, Ranks())):
        text, texts = text + float(losses.text), texts + losses.text_count
        image, images = image + float(losses.image), images + losses.image_count
        grid_J2 = batch.grid_C2[batch.image_I[batch.loss_at_J]].cpu()
        loss_J, weight_J = losses.image_J.double().cpu(), losses.weight_J.double().cpu()
        for i, grid in enumerate(grids):
            of_grid = (grid_J2 == torch.tensor(grid)).all(1)
            size_sums[i] += (loss_J * weight_J)[of_grid].sum()
            size_counts[i] += weight_J[of_grid].sum()
        inside = (grid_J2 == torch.tensor(grids[0])).all(1)
        row, column = batch.cell_I2[batch.loss_at_J].cpu().T
        cell = (row * columns + column)[inside]
        sums += torch.bincount(cell, loss_J[inside], minlength=rows * columns)
        counts += torch.bincount(cell, minlength=rows * columns)
    by_cell = (sums / counts.clamp(min=1)).tolist()
    with Progress("scoring held-out documents", "samples", len(corpus.samples), report) as progress:
        fixed = fixed_losses(model, corpus, Ranks(), partial(setattr, progress, "done"))
    by_size = {
        "x".join(map(str, size)): float(size_sums[i] / size_counts[i])
        for i, size in enumerate(model.patcher.image_sizes)
        if len(grids) > 1 and size_counts[i]
    }
    return HeldOutLosses(text / max(texts, 1), image / max(images, 1), by_cell, fixed, by_size)


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write report.json into a folder; a crash leaves the old file or the new one, never a part."""
    temporary = folder / "report.json.tmp"
    temporary.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    os.replace(temporary, folder / "report.json")
