"""The report of a run on any captioned images: no labels are needed.

Captions are scored by their words, pictures by the distributions of their features, and both by which of several
captions the model finds likeliest. Each score comes with what real pictures, chance and cheap baselines reach.
"""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
from PIL import Image

from mmgen.config import Config
from mmgen.data.loader import Corpus
from mmgen.data.progress import Progress
from mmgen.data.shards.samples import BadRecord, Sample
from mmgen.data.shards.store import Patterns
from mmgen.data.views import validation_corpus
from mmgen.evaluate.classes import Classes, ClassJudge, ClassScores, accuracy
from mmgen.evaluate.extractors import Extractor, build_extractor
from mmgen.evaluate.features import Pictures
from mmgen.evaluate.matching import Matches, Pair, match, pairs, with_pictures
from mmgen.evaluate.metrics import Scores
from mmgen.evaluate.references import BASELINES, FLOOR, References, draw_baseline
from mmgen.evaluate.report import Generator, HeldOutLosses, held_out_losses, repeated, write_report
from mmgen.evaluate.words import exact, mean_f1
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
class MatchReport:
    """Which caption the model finds likeliest."""

    real: Matches
    """For real pictures."""
    shuffled: Estimate
    """By text, with the next picture instead of each: what a model reaches that ignores the picture."""
    drawn: Estimate
    """By text, for the pictures that the model drew."""

    def flat(self) -> dict[str, float]:
        """The values under their keys in `report.json`."""
        flat = self.real.flat("match") | self.drawn.flat("match_drawn_by_text")
        return flat | {"match_by_text_shuffled": self.shuffled.mean}


@dataclass(frozen=True)
class CurvePoint:
    """Scores of pictures at one guidance scale."""

    guidance: float
    scores: Scores
    accuracy: Estimate | None
    """Of the classes; None without `eval.classes`."""

    def flat(self) -> dict[str, float | None]:
        """The values under their keys in the list `guidance_curve`."""
        accuracy = self.accuracy.flat("t2i_accuracy") if self.accuracy else {}
        return {"guidance": self.guidance} | self.scores | accuracy


@dataclass(frozen=True)
class SizeReport:
    """All scores at one declared size."""

    t2i_n: int
    """Number of drawn pictures."""
    seconds_per_image: float
    scores: Scores
    captions: CaptionReport
    matches: MatchReport | None
    """None if the test shards have fewer than two different captions."""
    classes: ClassScores | None
    """None without `eval.classes`."""
    reference_generators: dict[str, Scores]
    guidance_curve: Sequence[CurvePoint]

    def flat(self) -> dict[str, Any]:
        """The values under their keys in `report.json`."""
        flat: dict[str, Any] = {"t2i_n": self.t2i_n, "seconds_per_image": self.seconds_per_image, **self.scores}
        flat |= {f"{name}_floor": value for name, value in self.reference_generators[FLOOR].items()}
        for part in (self.captions, self.matches, self.classes):
            flat |= part.flat() if part else {}
        flat["reference_generators"] = self.reference_generators
        if self.guidance_curve:
            flat["guidance_curve"] = [point.flat() for point in self.guidance_curve]
        return flat


@dataclass(frozen=True)
class Provenance:
    """What another person needs to repeat the scores; a part of `report.json` of its own."""

    step: int
    weights: str
    solver: str
    solver_steps: int
    guidance_scale: float
    guidance_interval: tuple[float, float]
    negative_prompt: str | None
    seeds: tuple[int, int]
    """The first and the last seed of the drawn pictures."""
    features: str
    features_fingerprint: str
    judge: list[str] | None
    """Shards of the judge of `eval.classes`; None without classes."""
    test: list[str]
    data_fingerprint: str
    tokenizer_fingerprint: str
    device: str
    versions: dict[str, str]

    @classmethod
    def of(cls, scorer: Scorer, trainer: TrainerState) -> Provenance:
        """The provenance of the scores of a model."""
        config, sample, settings = scorer.config, scorer.config.sample, scorer.config.eval
        packages = ("mmgen", "torch", "transformers", "numpy", "scikit-learn")
        return cls(
            step=trainer.step,
            weights=sample.weights,
            solver=sample.solver,
            solver_steps=sample.steps,
            guidance_scale=sample.guidance_scale,
            guidance_interval=sample.guidance_interval,
            negative_prompt=sample.negative_prompt,
            seeds=(0, settings.samples - 1),
            features=settings.features,
            features_fingerprint=scorer.extractor.fingerprint,
            judge=(settings.judge or [*map(str, config.data.train)]) if settings.classes else None,
            test=settings.test,
            data_fingerprint=trainer.data,
            tokenizer_fingerprint=scorer.tokenizer.fingerprint,
            device=str(scorer.model.device),
            versions={"python": platform.python_version()} | {name: version(name) for name in packages},
        )


@dataclass(frozen=True)
class CaptionedReport:
    """The contents of `report.json`."""

    step: int
    t2i_guidance: float
    t2i_solver_steps: int
    bad_samples: int
    """Number of samples that could not be read."""
    train_seconds: float
    parameters: int
    eval_seconds: float
    provenance: Provenance
    sizes: dict[str, SizeReport]
    """The scores at each declared size, the first one first."""
    losses: HeldOutLosses | None

    def flat(self) -> dict[str, Any]:
        """One object for JSON; keys of a further size end with it, as in `fd_16x16`."""
        flat = {name: value for name, value in vars(self).items() if name not in ("sizes", "losses")}
        flat["provenance"] = asdict(self.provenance)
        for number, (size, scores) in enumerate(self.sizes.items()):
            suffix = f"_{size}" if number else ""
            flat |= {f"{name}{suffix}": value for name, value in scores.flat().items()}
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
    found: dict[str, SizeReport] = {}
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
    result = CaptionedReport(
        step=trainer.step,
        t2i_guidance=config.sample.guidance_scale,
        t2i_solver_steps=config.sample.steps,
        bad_samples=len(bad),
        train_seconds=round(trainer.train_seconds, 1),
        parameters=sum(p.numel() for p in model.parameters()),
        eval_seconds=round(time.monotonic() - began, 1),
        provenance=Provenance.of(scorer, trainer),
        sizes=found,
        losses=losses,
    )
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

    def score(self, test: Pictures, size: tuple[int, int], grid: tuple[int, int], label: str) -> SizeReport:
        """All scores at one size; the first pictures are saved as a sheet named `label`."""
        settings, scale, train = self.config.eval, self.config.sample.guidance_scale, self.train.of_size(size)
        real = References(self.extractor, train, test, settings.samples)
        # What may be refused comes before the minutes of drawing.
        asked = pairs(self.corpus, min(MATCHED, settings.samples), settings.choices, grid)
        judge = self.judge(size, test) if settings.classes else None
        prompts = repeated(test.samples, settings.samples)
        captions = [sample.caption for sample in prompts]
        drawing = time.monotonic()
        images = self.generator.draw(prompts, scale, grid)
        drawing = time.monotonic() - drawing
        first = images[:SHEET]
        sheet.save(sheet.grid(first, captions[: len(first)]), self.config.run.dir / "samples" / label)
        written = self.generator.describe(test.images[: settings.samples])
        wanted = [sample.caption for sample in test.samples[: settings.samples]]
        baselines = Progress("scoring baselines", "baselines", len(BASELINES), self.report)
        return SizeReport(
            t2i_n=len(images),
            seconds_per_image=drawing / len(images),
            scores=real.scores(images, captions),
            captions=CaptionReport.of(written, wanted, [sample.caption for sample in train.samples]),
            matches=self.matches(asked, images, prompts) if asked else None,
            classes=judge.scores(images, captions, test, written) if judge else None,
            reference_generators={
                name: real.scores(draw_baseline(baseline, train, captions), captions)
                for name, baseline in baselines.over(BASELINES.items())
            },
            guidance_curve=[self.at(other, prompts, grid, real, judge) for other in settings.guidance_curve],
        )

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

    def at(
        self,
        scale: float,
        prompts: Sequence[Sample],
        grid: tuple[int, int],
        real: References,
        judge: SizedJudge | None,
    ) -> CurvePoint:
        """Scores of pictures at another guidance scale."""
        images, captions = self.generator.draw(prompts, scale, grid), [sample.caption for sample in prompts]
        right = accuracy(judge.judge.read(images), judge.classes.of_all(captions)) if judge else None
        return CurvePoint(scale, real.scores(images, captions), right)

    def matches(
        self, asked: Sequence[Pair], images: Sequence[Image.Image], prompts: Sequence[Sample]
    ) -> MatchReport | None:
        """Which caption the model finds likeliest, for real and for drawn pictures."""
        at = {(sample.shard, sample.key): image for sample, image in zip(prompts, images, strict=True)}
        names = [(pair.decoded.shard, pair.decoded.key) for pair in asked]
        drawn = [(pair, at[name]) for pair, name in zip(asked, names, strict=True) if name in at]
        if not drawn:
            return None
        after = [*asked[1:], asked[0]]
        turned = [replace(pair, picture=other.picture) for pair, other in zip(asked, after, strict=True)]
        shown = with_pictures([pair for pair, _ in drawn], [image for _, image in drawn], self.corpus)
        return MatchReport(
            real=match(self.model, self.corpus, asked, True, self.report),
            shuffled=match(self.model, self.corpus, turned, False, self.report).by_text,
            drawn=match(self.model, self.corpus, shown, False, self.report).by_text,
        )


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
