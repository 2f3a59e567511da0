"""The report of a run on any captioned images: no labels are needed.

Captions are scored by their words, pictures by the distributions of their features, and both by which of several
captions the model finds likeliest. Each score comes with what real pictures, chance and cheap baselines reach.
"""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmgen.config import Config
from mmgen.data.loader import Corpus
from mmgen.data.progress import Progress
from mmgen.data.shards.samples import BadRecord, Sample
from mmgen.data.shards.store import Patterns
from mmgen.data.views import validation_corpus
from mmgen.evaluate.classes import Classes, ClassJudge, ClassScores, accuracy
from mmgen.evaluate.distances import (
    Features,
    frechet,
    frechet_unbiased,
    kernel_distance,
    nearest_distance,
    projection,
    spread_ratio,
    two_sample_accuracy,
)
from mmgen.evaluate.extractors import Extractor, build_extractor
from mmgen.evaluate.features import Pictures
from mmgen.evaluate.matching import Pair, match, pairs, with_pictures
from mmgen.evaluate.report import Generator, HeldOutLosses, held_out_losses, repeated, write_report
from mmgen.evaluate.words import exact, f1, mean_f1
from mmgen.image import sheet
from mmgen.model import MMGenModel
from mmgen.sequence.tokenizer import Tokenizer
from mmgen.train.estimate import Estimate
from mmgen.train.state import TrainerState

Log = Callable[[str], None]
MATCHED = 200
"""Most pictures for which the model chooses among captions, which takes eight forward passes per caption."""
SHEET = 24
"""Pictures of a sheet."""
FEWEST = 10
"""Fewest captioned pictures with which distances can be computed."""
MOST = 10_000
"""Most training pictures that are read, to search for copies and to draw baselines from."""


class References:
    """Real pictures of one size and their features, which drawn pictures are compared with."""

    def __init__(self, extractor: Extractor, train: Pictures, test: Pictures, n: int) -> None:
        self.extractor, self.train, self.test = extractor, train, test
        self.captions = [sample.caption for sample in test.samples]
        self.n = min(n, len(test.images), len(train.images))
        self._train = extractor(train.images)
        self._pca = projection(self._train)
        self.test_features = extractor(test.images)
        self.nearest = nearest_distance(self.test_features[: self.n], self._train)

    def scores(self, images: Sequence[Image.Image], captions: Sequence[str]) -> dict[str, float | None]:
        """Every score of pictures for these captions; those of index i are compared with real ones of any index."""
        found = self.extractor(images)
        n = min(self.n, len(found))
        a, b = self._reduced(found[:n]), self._reduced(self.test_features[:n])
        own = nearest_distance(found[:n], self._train)
        once = min(len(found), len(self.test_features))  # after them, the captions repeat
        return {
            "fd": frechet(a, b),
            "fd_unbiased": frechet_unbiased(a, b),
            "kd": kernel_distance(a, b),
            "two_sample_accuracy": two_sample_accuracy(a, b),
            "nn_distance_ratio": own / self.nearest if self.nearest else None,
            "diversity_ratio": spread_ratio(found[:once], self.test_features[:once], captions[:once]),
        }

    def _reduced(self, features: Features) -> Features:
        return np.asarray(self._pca.transform(features)) if self._pca else features


Baseline = Callable[[References, str, np.random.Generator], Image.Image]
"""Draws a picture for a caption without a model."""


def random_picture(real: References, caption: str, rng: np.random.Generator) -> Image.Image:
    """A training picture of any caption."""
    return real.train.images[int(rng.integers(len(real.train.images)))]


def picture_of_nearest_caption(real: References, caption: str, rng: np.random.Generator) -> Image.Image:
    """A training picture whose caption has the highest F1 of words: what a search would show."""
    some = rng.choice(len(real.train.samples), min(1000, len(real.train.samples)), replace=False)
    scores = [f1(real.train.samples[i].caption, caption) for i in some]
    return real.train.images[int(some[int(np.argmax(scores))])]


def mean_picture(real: References, caption: str, rng: np.random.Generator) -> Image.Image:
    """The mean of 16 training pictures."""
    some = rng.choice(len(real.train.pixels), min(16, len(real.train.pixels)), replace=False)
    mean = np.mean([real.train.pixels[i] for i in some], axis=0)
    return Image.fromarray(np.rint(mean).astype(np.uint8))


BASELINES: dict[str, Baseline] = {
    "random_training_picture": random_picture,
    "picture_of_nearest_caption": picture_of_nearest_caption,
    "mean_of_training_pictures": mean_picture,
}


@dataclass(frozen=True)
class CaptionReport:
    """Scores of captions that a model writes for real held-out pictures."""

    n: int
    exact: Estimate
    exact_shuffled: float
    """Against the caption of the next picture."""
    exact_commonest: float
    """Of the commonest training caption, for every picture."""
    f1: Estimate
    f1_shuffled: float
    f1_commonest: float

    @classmethod
    def of(cls, written: Sequence[str], wanted: Sequence[str], training: Sequence[str]) -> CaptionReport:
        """Score written captions."""
        turned = [*wanted[1:], *wanted[:1]]
        commonest = [Counter(training).most_common(1)[0][0]] * len(wanted)
        return cls(
            len(wanted),
            exact(written, wanted),
            exact(written, turned).mean,
            exact(commonest, wanted).mean,
            mean_f1(written, wanted),
            mean_f1(written, turned).mean,
            mean_f1(commonest, wanted).mean,
        )

    def flat(self) -> dict[str, float]:
        """The values under their keys in `report.json`."""
        flat = {"i2t_n": self.n} | self.exact.flat("i2t_exact") | self.f1.flat("i2t_f1")
        return flat | {
            "i2t_exact_shuffled": self.exact_shuffled,
            "i2t_exact_commonest": self.exact_commonest,
            "i2t_f1_shuffled": self.f1_shuffled,
            "i2t_f1_commonest": self.f1_commonest,
        }


@dataclass(frozen=True)
class CaptionedReport:
    """The contents of `report.json`."""

    sizes: dict[str, dict[str, Any]]
    """The scores at each declared size, the first one first."""
    losses: HeldOutLosses | None
    facts: dict[str, Any] = field(default_factory=dict)
    """Facts about the run and its provenance."""

    def flat(self) -> dict[str, Any]:
        """One object for JSON; keys of a further size end with it, as in `fd_16x16`."""
        flat = dict(self.facts)
        for number, (size, scores) in enumerate(self.sizes.items()):
            suffix = f"_{size}" if number else ""
            flat |= {f"{name}{suffix}": value for name, value in scores.items()}
        return flat | (self.losses.flat() if self.losses else {})


def evaluate_captioned(
    model: MMGenModel, tokenizer: Tokenizer, config: Config, trainer: TrainerState, report: Log
) -> CaptionedReport:
    """Score a model on the captioned images of `eval.test`, and write `report.json` and sheets into the run folder.

    Raises:
        ValueError: there are no captioned images of the first declared size in `eval.test` or `data.train`, or
            `eval.features` or `eval.classes` do not fit.
        FileNotFoundError: shards are missing.
    """
    began = time.monotonic()
    config = config.with_positions(model.positions)
    settings = config.eval
    if settings.samples < FEWEST:
        raise ValueError(f"eval.samples is {settings.samples}: distances need at least {FEWEST} pictures")
    extractor = build_extractor(settings.features, settings.features_model, model.device)
    bad: list[BadRecord] = []
    patcher = model.build_patcher()
    reading = Progress("reading real pictures", "data sets", 2, report)
    sources: list[tuple[Patterns, int | None]] = [(config.data.train, MOST), (settings.test, None)]
    train, test = (
        captioned(Pictures(shards, patcher, bad, config.data, most)) for shards, most in reading.over(sources)
    )
    shown = captioned(Pictures(settings.judge, patcher, bad, config.data)) if settings.judge else train
    run = config.run.model_copy(update={"seed": 0})
    corpus = Corpus(settings.test, tokenizer, config.model_copy(update={"run": run}), model.autoencoder)
    scorer = Scorer(model, tokenizer, config, extractor, train, shown, corpus, report)
    found: dict[str, dict[str, Any]] = {}
    for number, (size, grid) in enumerate(zip(config.model.patcher.image_sizes, model.patcher.grids, strict=True)):
        name = "x".join(map(str, size))
        here = test.of_size(size)
        counts = len(train.of_size(size).samples), len(here.samples)
        if min(counts) < FEWEST:
            few = (
                f"data.train has {counts[0]} and eval.test {counts[1]} captioned images of {name}, and scores need "
                f"{FEWEST} of each"
            )
            if not number:
                raise ValueError(
                    f"{few}: give more images, or declare first a size in model.patcher.image_sizes that both have"
                )
            report(f"{name}: not scored, because {few}")
            continue
        label = f"evaluation_{name}.png" if number else "evaluation.png"
        found[name] = scorer.score(here, size, grid, label)
    losses = (
        held_out_losses(model, validation_corpus(config, tokenizer, model.autoencoder), report)
        if config.data.val
        else None
    )
    facts = {
        "step": trainer.step,
        "t2i_guidance": config.sample.guidance_scale,
        "t2i_solver_steps": config.sample.steps,
        "bad_samples": len(bad),
        "train_seconds": round(trainer.train_seconds, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "eval_seconds": round(time.monotonic() - began, 1),
        "provenance": provenance(config, extractor, trainer, tokenizer, model.device),
    }
    result = CaptionedReport(found, losses, facts)
    write_report(config.run.dir, result.flat())
    return result


def captioned(pictures: Pictures) -> Pictures:
    """Those of one picture and its caption, in a random order, because shards are often sorted by topic."""
    return pictures.where([sample.paired for sample in pictures.samples]).shuffled()


@dataclass(frozen=True)
class Scorer:
    """Scores one model at one size after another."""

    model: MMGenModel
    tokenizer: Tokenizer
    config: Config
    extractor: Extractor
    train: Pictures
    shown: Pictures
    """The pictures on which the judge of `eval.classes` is trained."""
    corpus: Corpus
    """The documents of `eval.test`."""
    report: Log

    @property
    def generator(self) -> Generator:
        """The model as a generator of pictures and captions."""
        return Generator(self.model, self.tokenizer, self.config.sample, self.config.eval.batch, self.report)

    def score(self, test: Pictures, size: tuple[int, int], grid: tuple[int, int], label: str) -> dict[str, Any]:
        """All scores at one size; the first pictures are saved as a sheet named `label`."""
        settings, scale = self.config.eval, self.config.sample.guidance_scale
        real = References(self.extractor, self.train.of_size(size), test, settings.samples)
        asked = pairs(self.corpus, min(MATCHED, settings.samples), settings.choices, grid)
        judge = self.judge(size, test) if settings.classes else None
        prompts = repeated(test.samples, settings.samples)
        captions = [sample.caption for sample in prompts]
        drawing = time.monotonic()
        images = self.generator.draw(prompts, scale, grid)
        drawing = time.monotonic() - drawing
        first = images[:SHEET]
        sheet.save(sheet.grid(first, captions[: len(first)]), self.config.run.dir / "samples" / label)
        rng = np.random.default_rng(0)
        genuine = [picture_of_nearest_caption(real, caption, rng) for caption in captions]
        scores: dict[str, Any] = {"t2i_n": len(images), "seconds_per_image": drawing / len(images)}
        scores |= real.scores(images, captions)
        scores |= {f"{name}_floor": value for name, value in real.scores(genuine, captions).items()}
        shown = test.samples[: settings.samples]
        written = self.generator.describe(test.images[: settings.samples])
        wanted = [sample.caption for sample in shown]
        training = [sample.caption for sample in self.train.samples]
        scores |= CaptionReport.of(written, wanted, training).flat()
        scores |= self._matches(asked, images, prompts)
        if judge:
            scores |= judge.scores(images, captions, test, written).flat()
        baselines = Progress("scoring baselines", "baselines", len(BASELINES), self.report)
        scores["reference_generators"] = {
            name: real.scores([draw(real, caption, rng) for caption in captions], captions)
            for name, draw in baselines.over(BASELINES.items())
        }
        if settings.guidance_curve:
            scores["guidance_curve"] = [
                {"guidance": at} | self._at(at, prompts, grid, real, judge) for at in settings.guidance_curve
            ]
        return scores

    def judge(self, size: tuple[int, int], test: Pictures) -> SizedJudge:
        """The judge of `eval.classes` at one size; raises ValueError if the captions do not name the classes."""
        classes, shown = Classes(self.config.eval.classes), self.shown.of_size(size)
        if len(shown.samples) < FEWEST:
            where = "eval.judge" if self.config.eval.judge else "data.train"
            raise ValueError(
                f"{where} has {len(shown.samples)} captioned images of {size[0]}x{size[1]}, and the judge of "
                f"eval.classes needs at least {FEWEST}: name more shards in eval.judge"
            )
        judge = ClassJudge(self.extractor, shown.images, classes.of_all([s.caption for s in shown.samples]))
        wanted = classes.of_all([sample.caption for sample in test.samples])
        return SizedJudge(classes, judge, accuracy(judge.read(test.images), wanted))

    def _at(
        self,
        scale: float,
        prompts: Sequence[Sample],
        grid: tuple[int, int],
        real: References,
        judge: SizedJudge | None,
    ) -> dict[str, Any]:
        """Scores of pictures at another guidance scale."""
        images, captions = self.generator.draw(prompts, scale, grid), [sample.caption for sample in prompts]
        scores: dict[str, Any] = dict(real.scores(images, captions))
        if judge:
            scores |= accuracy(judge.judge.read(images), judge.classes.of_all(captions)).flat("t2i_accuracy")
        return scores

    def _matches(
        self, asked: Sequence[Pair], images: Sequence[Image.Image], prompts: Sequence[Sample]
    ) -> dict[str, float]:
        """Which caption the model finds likeliest, for real and for drawn pictures."""
        if not asked:
            return {}
        corpus, report = self.corpus, self.report
        found = match(self.model, corpus, asked, True, report).flat("match")
        turned = [
            replace(pair, picture=other.picture) for pair, other in zip(asked, [*asked[1:], asked[0]], strict=True)
        ]
        found["match_by_text_shuffled"] = match(self.model, corpus, turned, False, report).by_text.mean
        at = {(sample.shard, sample.key): image for sample, image in zip(prompts, images, strict=True)}
        names = [(pair.decoded.shard, pair.decoded.key) for pair in asked]
        drawn = [(pair, at[name]) for pair, name in zip(asked, names, strict=True) if name in at]
        if not drawn:
            return found
        shown = with_pictures([pair for pair, _ in drawn], [image for _, image in drawn], corpus)
        return found | match(self.model, corpus, shown, False, report).by_text.flat("match_drawn_by_text")


@dataclass(frozen=True)
class SizedJudge:
    """The judge of classes at one size."""

    classes: Classes
    judge: ClassJudge
    real: Estimate
    """How well it reads real pictures."""

    def scores(
        self, images: Sequence[Image.Image], captions: Sequence[str], test: Pictures, written: Sequence[str]
    ) -> ClassScores:
        """Score drawn pictures, and the captions that were written for the first test pictures."""
        wanted, shown = self.classes.of_all(captions), self.judge.read(images)
        real = self.classes.of_all([sample.caption for sample in test.samples[: len(written)]])
        return ClassScores(
            accuracy(shown, wanted),
            accuracy(shown, np.roll(wanted, -1)),
            self.real,
            accuracy(self.classes.of_all(written), real),
        )


def provenance(
    config: Config, extractor: Extractor, trainer: TrainerState, tokenizer: Tokenizer, device: torch.device
) -> dict[str, Any]:
    """What another person needs to repeat the scores."""
    sample, settings = config.sample, config.eval
    return {
        "step": trainer.step,
        "weights": sample.weights,
        "solver": sample.solver,
        "solver_steps": sample.steps,
        "guidance_scale": sample.guidance_scale,
        "guidance_interval": list(sample.guidance_interval),
        "negative_prompt": sample.negative_prompt,
        "seeds": [0, settings.samples - 1],
        "features": settings.features,
        "features_fingerprint": extractor.fingerprint,
        "judge": (settings.judge or "data.train") if settings.classes else None,
        "test": settings.test,
        "data_fingerprint": trainer.data,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("mmgen", "torch", "transformers", "numpy", "scikit-learn")},
        },
        "device": str(device),
    }
