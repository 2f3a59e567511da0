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
from numpy.typing import NDArray
from PIL import Image

from mmgen import picture
from mmgen.config import Config, SampleConfig, choose
from mmgen.data.loader import Corpus
from mmgen.data.shards import Sample, read
from mmgen.evaluate.judge import Judge, Truth, pixels, truth
from mmgen.evaluate.metrics import (
    Features,
    compress,
    frechet,
    nearest_distance,
    two_sample_accuracy,
    within_class_variance,
)
from mmgen.evaluate.tasks import TASKS, Object, Pixels, Task
from mmgen.generate import Decoder, Request
from mmgen.model import MMGenModel
from mmgen.tokenizer import Tokenizer

NEAREST_AMONG = 6000
"""Training pictures searched for the nearest one."""


class Real:
    """Real pictures with known content: of training, and held out."""

    def __init__(self, task: Task, train: list[Sample], test: list[Sample]) -> None:
        self.task = task
        self.train = [pixels(sample.image) for sample in train if sample.image]
        self.test = [pixels(sample.image) for sample in test if sample.image]
        self.test_truth = [truth(sample) for sample in test if sample.image]
        self.train_rows, self.test_rows = rows(self.train), rows(self.test)
        self.pca = compress(self.train_rows)
        self.digits = digits_by_class(task, self.train, [truth(sample) for sample in train if sample.image])
        test_digits = digits_by_class(task, self.test, self.test_truth)
        self.variance = within_class_variance({k: rows(v) for k, v in test_digits.items()})
        self.nearest = nearest_distance(self.test_rows, self.train_rows[:NEAREST_AMONG])
        self.floor = self.frechet(self.train[: len(self.test)])

    def frechet(self, pictures: Sequence[Pixels]) -> float:
        """Fréchet distance to the held-out pictures, in (at most 64) pixel components."""
        a, b = rows(pictures), self.test_rows
        return frechet(self.pca.transform(a), self.pca.transform(b)) if self.pca else frechet(a, b)

    def separable(self, pictures: Sequence[Pixels]) -> float:
        """How well a classifier tells pictures from held-out real ones."""
        a, b = rows(pictures), self.test_rows
        return two_sample_accuracy(*((self.pca.transform(a), self.pca.transform(b)) if self.pca else (a, b)))


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


def score_pictures(pictures: Sequence[Pixels], wanted: Sequence[Truth], real: Real, judge: Judge) -> dict[str, float]:
    """The scores that a generator and its imitations share."""
    digits = digits_by_class(real.task, pictures, wanted)
    variance = within_class_variance({k: rows(v) for k, v in digits.items()}) if digits else 0.0
    return {
        "t2i_accuracy": agreement(judge.read(pictures), wanted),
        "fd_pixel": real.frechet(pictures),
        "within_class_variance_ratio": variance / real.variance,
        "two_sample_accuracy": real.separable(pictures),
        "nn_distance_ratio": nearest_distance(rows(pictures), real.train_rows[:NEAREST_AMONG]) / real.nearest,
    }


Grey = NDArray[np.float64]
Imitation = Callable[[list[Pixels], np.random.Generator], Grey]


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


def imitate(name: str, wanted: Sequence[Truth], real: Real) -> list[Pixels]:
    """Pictures that a cheap imitation would draw for the same captions."""
    rng = np.random.default_rng(0)

    def grey(thing: Object) -> Pixels:
        return np.clip(np.rint(IMITATIONS[name](real.digits[thing.digit], rng)), 0, 255).astype(np.uint8)

    ordered = [sorted(things, key=lambda thing: (thing.place or "", thing.digit)) for things in wanted]
    return [real.task.compose([(grey(thing), thing) for thing in things]) for things in ordered]


def evaluate(
    model: MMGenModel, tokenizer: Tokenizer, config: Config, trainer: dict[str, Any], tell: Callable[[str], None]
) -> dict[str, Any]:
    """Score a model and write `report.json` and `samples/evaluation.png` into the run folder.

    Raises:
        ValueError, FileNotFoundError: the eval section names an unknown task, or shards that are missing or unlabelled.
    """
    began = time.monotonic()
    settings = config.eval
    task: Task = choose(TASKS, settings.task, "eval.task")()
    judge = Judge(task, settings.judge)
    train, test = list(read(config.data.train, bad=[])), list(read(settings.test))
    real = Real(task, train, test)
    tell(f"{settings.task}: judging {settings.samples} images against {len(test)} real ones")

    def draw(samples: list[Sample], count: int, scale: float) -> tuple[list[Image.Image], list[Truth]]:
        chosen = [samples[i % len(samples)] for i in range(count)]
        decoder = Decoder(model, tokenizer, config.sample.model_copy(update={"guidance_scale": scale}))
        requests = [Request([sample.caption], "image", seed) for seed, sample in enumerate(chosen)]
        images = [result.images[0] for part in batches(requests, settings.batch) for result in decoder.generate(part)]
        return images, [truth(sample) for sample in chosen]

    scale = config.sample.guidance_scale
    images, wanted = draw(test, settings.samples, scale)
    scores = score_pictures([pixels(image) for image in images], wanted, real, judge)
    read_back = judge.read([pixels(image) for image in images])
    tell(f"captions to images: {scores['t2i_accuracy']:.3f} right at guidance {scale}")
    plain, _ = draw(test, settings.samples, 1.0)
    report: dict[str, Any] = {
        "step": trainer["step"],
        "t2i_n": settings.samples,
        "t2i_guidance": scale,
        "t2i_solver_steps": config.sample.steps,
        **scores,
        "t2i_accuracy_w1": agreement(judge.read([pixels(image) for image in plain]), wanted),
        "t2i_accuracy_shuffled": agreement(read_back, wanted[1:] + wanted[:1]),
        "t2i_ceiling": agreement(judge.read(real.test), real.test_truth),
        "fd_pixel_floor": real.floor,
        "two_sample_accuracy_real": real.separable(real.train[: len(real.test)]),
    }
    if settings.heldout:
        unseen, unseen_wanted = draw(list(read(settings.heldout)), settings.samples, scale)
        found = judge.read([pixels(image) for image in unseen])
        report["t2i_accuracy_heldout_combination"] = agreement(found, unseen_wanted)
    report |= caption_scores(model, tokenizer, config.sample, task, test, settings)
    tell(f"images to captions: {report['i2t_accuracy']:.3f} right")
    report["val_loss_text"], report["val_loss_image"] = validation(model, tokenizer, config)
    report |= {
        "train_seconds": round(trainer["train_seconds"], 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "reference_generators": {
            name: score_pictures(imitate(name, wanted, real), wanted, real, judge) for name in IMITATIONS
        },
        "eval_seconds": round(time.monotonic() - began, 1),
    }
    captions = [test[i % len(test)].caption for i in range(24)]
    picture.save(picture.grid(images[:24], captions), config.run.dir / "samples" / "evaluation.png")
    write_report(config.run.dir, report)
    return report


def caption_scores(
    model: MMGenModel, tokenizer: Tokenizer, sample: SampleConfig, task: Task, test: list[Sample], settings: Any
) -> dict[str, float]:
    """Greedy captions of real held-out images, parsed and compared with what the images show."""
    decoder = Decoder(model, tokenizer, sample.model_copy(update={"temperature": 0.0}))
    chosen = test[: settings.samples]
    requests = [Request([decoder.patcher.fit(open_picture(item))], "text") for item in chosen]
    results = [result for part in batches(requests, settings.batch) for result in decoder.generate(part)]
    said = [task.parse(result.text) for result in results]
    return {"i2t_n": len(chosen), "i2t_accuracy": agreement(said, [truth(item) for item in chosen])}


def open_picture(sample: Sample) -> Image.Image:
    """A sample's image."""
    return Image.fromarray(pixels(sample.image or b""))


def validation(model: MMGenModel, tokenizer: Tokenizer, config: Config) -> tuple[float, float]:
    """Held-out (text, image) losses; (nan, nan) without validation shards."""
    from mmgen.train.loop import validate

    return validate(model, Corpus(config.data.val, tokenizer, config)) if config.data.val else (np.nan, np.nan)


def batches(items: Sequence[Request], size: int) -> list[Sequence[Request]]:
    """Consecutive parts of at most `size`."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def write_report(run: Path, report: dict[str, Any]) -> None:
    """Write report.json, all or nothing."""
    temporary = run / "report.json.tmp"
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(temporary, run / "report.json")
