"""The evaluation of a run: captions to images, images to captions, and what cheap imitations would score."""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mmgen.config import Config, EvalConfig, choose
from mmgen.data.loader import Corpus
from mmgen.data.shards.pictures import open_image, open_stored
from mmgen.data.shards.samples import BadRecord, Picture, Sample, read
from mmgen.data.shards.store import Patterns
from mmgen.evaluate.judge import Judge, Truth, pixels, truth
from mmgen.evaluate.metrics import (
    Features,
    compress,
    frechet,
    frechet_unbiased,
    nearest_distance,
    two_sample_accuracy,
    within_class_variance,
)
from mmgen.evaluate.tasks import TASKS, Object, Pixels, Task
from mmgen.generate.decoder import Decoder, Request
from mmgen.image import sheet
from mmgen.image.patch import Floats, Grid, Patcher
from mmgen.model import MMGenModel
from mmgen.sequence.tokenizer import Tokenizer
from mmgen.train.ranks import Ranks
from mmgen.train.state import TrainerState
from mmgen.train.validate import held_out


class Pictures:
    """The readable pictures of shards, at the size and in the colours that the model draws; latents are decoded."""

    def __init__(self, patterns: Patterns, patcher: Patcher, bad: list[BadRecord]) -> None:
        self.samples: list[Sample] = []
        found: list[Image.Image | tuple[Floats, Grid]] = []
        for sample in read(patterns, bad):
            picture = next((segment for segment in sample.segments if isinstance(segment, Picture)), None)
            if picture is None or (picture.stored and patcher.stored is None):
                continue
            try:
                if picture.stored:
                    found.append(patcher.rows(open_stored(picture.data).array))
                else:
                    found.append(patcher.fit(open_image(picture.data)))
                self.samples.append(sample)
            except ValueError as error:
                bad.append(BadRecord(sample.shard, sample.key, str(error)))
        self.images = developed(found, patcher)
        self.pixels = [pixels(image) for image in self.images]
        self.truth = [truth(sample) for sample in self.samples]


def developed(found: Sequence[Image.Image | tuple[Floats, Grid]], patcher: Patcher) -> list[Image.Image]:
    """Images as they are, and patch rows decoded, those of one grid together."""
    images: dict[int, Image.Image] = {}
    grids: dict[Grid, dict[int, Floats]] = defaultdict(dict)
    for i, item in enumerate(found):
        if isinstance(item, Image.Image):
            images[i] = item
        else:
            grids[item[1]][i] = item[0]
    for grid, rows in grids.items():
        images |= zip(rows, patcher.pictures(np.stack([*rows.values()]), grid), strict=True)
    return [images[i] for i in range(len(found))]


class Real:
    """Real pictures with known content, of training and held out; every comparison takes `n` of each side."""

    def __init__(self, task: Task, train: Pictures, test: Pictures, n: int) -> None:
        self.task, self.n = task, min(n, len(test.pixels), len(train.pixels))
        self.test, self.test_truth = test.pixels, test.truth
        self.train_rows, self.test_rows = rows(train.pixels), rows(test.pixels)
        self.pca = compress(self.train_rows)
        self.digits = digits_by_class(task, train.pixels, train.truth)
        test_digits = digits_by_class(task, test.pixels, test.truth)
        self.variance = within_class_variance({k: rows(v) for k, v in test_digits.items()})
        self.nearest = nearest_distance(self.test_rows[: self.n], self.train_rows)

    def _pair(self, pictures: Sequence[Pixels]) -> tuple[Features, Features]:
        a, b = rows(pictures[: self.n]), self.test_rows[: self.n]
        return (self.pca.transform(a), self.pca.transform(b)) if self.pca else (a, b)

    def frechet(self, pictures: Sequence[Pixels]) -> float:
        """Fréchet distance to the held-out pictures, in (at most 64) pixel components."""
        return frechet(*self._pair(pictures))

    def frechet_unbiased(self, pictures: Sequence[Pixels]) -> float | None:
        """The same without what so few pictures add to it; None where they are too few to tell."""
        return frechet_unbiased(*self._pair(pictures))

    def separable(self, pictures: Sequence[Pixels]) -> float:
        """How well a classifier tells pictures from held-out real ones.

        Both are rounded to the 17 grey levels of the data: background that is off by 1 in 255, which nobody sees, would
        give away every picture that was not rounded by the scanner.
        """
        return two_sample_accuracy(*self._pair([seventeen_levels(shown) for shown in pictures]))


def seventeen_levels(shown: Pixels) -> Pixels:
    """Levels in 0..255 rounded to multiples of 255 / 16; real digits stay as they are."""
    rounded: Pixels = np.rint(np.rint(shown * (16 / 255)) * (255 / 16)).astype(np.uint8)
    return rounded


def rows(pictures: Sequence[Pixels]) -> Features:
    """Pictures as rows of numbers in [0, 1]."""
    return np.stack(pictures).reshape(len(pictures), -1) / 255


def digits_by_class(task: Task, pictures: Sequence[Pixels], truths: Sequence[Truth]) -> dict[int, list[Pixels]]:
    """The grey digits found where they should be, by the class they should have."""
    classes: dict[int, list[Pixels]] = defaultdict(list)
    for shown, wanted in zip(pictures, truths, strict=True):
        places = {thing.place: thing.digit for thing in wanted}
        for mark in task.marks(shown) or []:
            if mark.place in places:
                classes[places[mark.place]].append(mark.grey)
    return dict(sorted(classes.items()))


def agreement(read_back: Sequence[Truth | None], wanted: Sequence[Truth]) -> float:
    """Share of pictures (or captions) with every attribute right and nothing else."""
    return float(np.mean([a == b for a, b in zip(read_back, wanted, strict=True)]))


def score_pictures(
    pictures: Sequence[Pixels], wanted: Sequence[Truth], real: Real, judge: Judge
) -> dict[str, float | None]:
    """The scores that a generator and its imitations share."""
    digits = digits_by_class(real.task, pictures, wanted)
    variance = within_class_variance({k: rows(v) for k, v in digits.items()}) if digits else 0.0
    return {
        "t2i_accuracy": agreement(judge.read(pictures), wanted),
        "fd_pixel": real.frechet(pictures),
        "fd_pixel_unbiased": real.frechet_unbiased(pictures),
        "within_class_variance_ratio": variance / real.variance,
        "two_sample_accuracy": real.separable(pictures),
        "nn_distance_ratio": nearest_distance(rows(pictures[: real.n]), real.train_rows) / real.nearest,
    }


Grey = NDArray[np.generic]
Imitation = Callable[[list[Pixels], np.random.Generator], Grey]


def training_digit(digits: list[Pixels], rng: np.random.Generator) -> Grey:
    """A training digit as it is: what the scores of real pictures are, at the same captions."""
    return digits[int(rng.integers(len(digits)))]


def class_mean(digits: list[Pixels], rng: np.random.Generator) -> Grey:
    """The class mean plus noise."""
    return np.asarray(np.mean(digits, 0)) + rng.normal(0, 16, digits[0].shape)


def noised_copy(digits: list[Pixels], rng: np.random.Generator) -> Grey:
    """A training digit plus noise."""
    return digits[int(rng.integers(len(digits)))] + rng.normal(0, 16, digits[0].shape)


def mean_of_two(digits: list[Pixels], rng: np.random.Generator) -> Grey:
    """The mean of two training digits of the class."""
    one, two = rng.integers(len(digits), size=2)
    return (digits[int(one)].astype(float) + digits[int(two)]) / 2


def class_gaussian(digits: list[Pixels], rng: np.random.Generator) -> Grey:
    """A draw from the Gaussian fitted to the class."""
    flat = rows(digits) * 255
    draw = rng.multivariate_normal(flat.mean(0), np.cov(flat, rowvar=False), method="eigh")
    return np.asarray(draw.reshape(digits[0].shape))


IMITATIONS: dict[str, Imitation] = {
    "class_mean_plus_noise": class_mean,
    "noised_training_image": noised_copy,
    "mean_of_two_training_images": mean_of_two,
    "class_gaussian": class_gaussian,
}


def imitate(imitation: Imitation, wanted: Sequence[Truth], real: Real) -> list[Pixels]:
    """Pictures that a cheap imitation would draw for the same captions."""
    rng = np.random.default_rng(0)

    def grey(thing: Object) -> Pixels:
        return np.clip(np.rint(imitation(real.digits[thing.digit], rng)), 0, 255).astype(np.uint8)

    ordered = [sorted(things, key=lambda thing: (thing.place or "", thing.digit)) for things in wanted]
    return [real.task.compose([(grey(thing), thing) for thing in things]) for things in ordered]


def evaluate(
    model: MMGenModel, tokenizer: Tokenizer, config: Config, trainer: TrainerState, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Score a model and write `report.json` and `samples/evaluation.png` into the run folder.

    Raises:
        ValueError, FileNotFoundError: the eval section names an unknown task, or shards that are missing or unlabelled.
    """
    began = time.monotonic()
    settings = config.eval
    task: Task = choose(TASKS, settings.task, "eval.task")()
    judge = Judge(task, settings.judge)
    bad: list[BadRecord] = []
    patcher = model.build_patcher()
    train, test = (Pictures(shards, patcher, bad) for shards in (config.data.train, settings.test))
    real = Real(task, train, test, settings.samples)
    tell(f"{settings.task}: judging {settings.samples} images against {len(test.samples)} real ones")

    def draw(samples: list[Sample], count: int, scale: float) -> tuple[list[Image.Image], list[Truth]]:
        chosen = [samples[i % len(samples)] for i in range(count)]
        decoder = Decoder(model, tokenizer, config.sample.model_copy(update={"guidance_scale": scale}))
        requests = [Request([sample.caption], "image", seed) for seed, sample in enumerate(chosen)]
        images = [result.images[0] for part in batches(requests, settings.batch) for result in decoder.generate(part)]
        return images, [truth(sample) for sample in chosen]

    scale = config.sample.guidance_scale
    drawing = time.monotonic()
    images, wanted = draw(test.samples, settings.samples, scale)
    drawing = time.monotonic() - drawing
    scores = score_pictures([pixels(image) for image in images], wanted, real, judge)
    read_back = judge.read([pixels(image) for image in images])
    tell(f"captions to images: {scores['t2i_accuracy']:.3f} right at guidance {scale}")
    plain, _ = draw(test.samples, settings.samples, 1.0)
    genuine = imitate(training_digit, wanted, real)
    report: dict[str, Any] = {
        "step": trainer.step,
        "t2i_n": settings.samples,
        "t2i_guidance": scale,
        "t2i_solver_steps": config.sample.steps,
        "seconds_per_image": drawing / len(images),
        **scores,
        "t2i_accuracy_w1": agreement(judge.read([pixels(image) for image in plain]), wanted),
        "t2i_accuracy_shuffled": agreement(read_back, wanted[1:] + wanted[:1]),
        "t2i_ceiling": agreement(judge.read(real.test), real.test_truth),
        "fd_pixel_floor": real.frechet(genuine),
        "two_sample_accuracy_real": real.separable(genuine),
    }
    if settings.heldout:
        unseen, unseen_wanted = draw(list(read(settings.heldout)), settings.samples, scale)
        found = judge.read([pixels(image) for image in unseen])
        report["t2i_accuracy_heldout_combination"] = agreement(found, unseen_wanted)
    report |= caption_scores(
        Decoder(model, tokenizer, config.sample.model_copy(update={"temperature": 0.0})), task, test, settings
    )
    tell(f"images to captions: {report['i2t_accuracy']:.3f} right")
    if config.data.val:
        report |= held_out_losses(model, Corpus(config.data.val, tokenizer, config, model.autoencoder))
    report |= {
        "bad_samples": len(bad),
        "train_seconds": round(trainer.train_seconds, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "reference_generators": {
            name: score_pictures(imitate(cheat, wanted, real), wanted, real, judge)
            for name, cheat in IMITATIONS.items()
        },
        "eval_seconds": round(time.monotonic() - began, 1),
    }
    captions = [test.samples[i % len(test.samples)].caption for i in range(len(images[:24]))]
    sheet.save(sheet.grid(images[:24], captions), config.run.dir / "samples" / "evaluation.png")
    write_report(config.run.dir, report)
    return report


def held_out_losses(model: MMGenModel, corpus: Corpus) -> dict[str, Any]:
    """Losses over one epoch of a corpus with fixed noise.

    `val_loss_text` in nats per text target, `val_loss_image` per entry, and that at each place of the first declared
    patch grid, in raster order.
    """
    rows, columns = model.patcher.grids[0]
    text, image, texts, images = 0.0, 0.0, 0, 0
    sums, counts = torch.zeros(2, rows * columns, dtype=torch.float64)
    for batch, losses in held_out(model, corpus, Ranks()):
        text, texts = text + float(losses.text), texts + losses.text_count
        image, images = image + float(losses.image), images + losses.image_count
        row, column = batch.place_I2[batch.loss_at_J].cpu().T
        inside = (row < rows) & (column < columns)
        place = (row * columns + column)[inside]
        sums += torch.bincount(place, losses.image_J.double().cpu()[inside], minlength=rows * columns)
        counts += torch.bincount(place, minlength=rows * columns)
    return {
        "val_loss_text": text / max(texts, 1),
        "val_loss_image": image / max(images, 1),
        "val_loss_image_by_place": (sums / counts.clamp(min=1)).tolist(),
    }


def caption_scores(decoder: Decoder, task: Task, test: Pictures, settings: EvalConfig) -> dict[str, float]:
    """Captions of all real held-out images, parsed and compared with what the images show."""
    requests = [Request([image], "text") for image in test.images]
    results = [result for part in batches(requests, settings.batch) for result in decoder.generate(part)]
    said = [task.parse(result.text) for result in results]
    return {"i2t_n": len(said), "i2t_accuracy": agreement(said, test.truth)}


def batches(items: Sequence[Request], size: int) -> list[Sequence[Request]]:
    """Consecutive parts of at most `size`."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def write_report(run: Path, report: dict[str, Any]) -> None:
    """Write report.json into a folder, all or nothing."""
    temporary = run / "report.json.tmp"
    temporary.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    os.replace(temporary, run / "report.json")
