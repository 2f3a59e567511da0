"""`mmgen bench speedrun`: seconds of training until a run draws and captions validation pictures well enough.

Each seed is one run of the configuration, trained by `mmgen train` in a process of its own, which keeps a checkpoint at
regular steps. The checkpoints are then scored from the first one on. The result is the training time of the first
checkpoint that reaches the target in both scores, so the time of scoring is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmgen.config import Config
from mmgen.config_io import override
from mmgen.data.shards.samples import read
from mmgen.evaluate.features import Pictures
from mmgen.evaluate.judge import Judge, truth
from mmgen.evaluate.metrics import agreement
from mmgen.evaluate.report import Generator, arrays, caption_scores, repeated
from mmgen.evaluate.tasks import TASKS, Task
from mmgen.train.checkpoint.read import candidates, load_model, read_trainer
from mmgen.train.command import keep_settings, run_command

CHECKPOINTS = 20
"""Number of checkpoints of a run that are kept and scored."""


@dataclass(frozen=True)
class Options:
    """What is measured, and how."""

    seeds: Sequence[int]
    target: float
    """The accuracy that both scores must reach."""
    threads: int
    """Threads of the training process."""
    out: Path
    """The folder of the runs; a run that is complete is not trained again."""


@dataclass(frozen=True)
class Scored:
    """The scores of one checkpoint on the validation shards."""

    step: int
    seconds: float
    """Seconds of training up to this checkpoint, with compilation and without scoring."""
    t2i_accuracy: float
    i2t_accuracy: float

    def reaches(self, target: float) -> bool:
        """Whether both scores are at least `target`."""
        return min(self.t2i_accuracy, self.i2t_accuracy) >= target


@dataclass(frozen=True)
class Attempt:
    """One run: its scored checkpoints, up to the first that reached the target."""

    seed: int
    history: Sequence[Scored]
    reached: bool


def bench_speedrun(config: Config, options: Options, report: Callable[[str], None]) -> list[Attempt]:
    """Train and score one run per seed. `report` is called with lines of progress.

    Raises:
        ValueError: `data.val` or `eval.judge` is empty, or a run in `options.out` has other settings.
        ChildProcessError: a run failed; the message names its log.
    """
    if not config.data.val or not config.eval.judge:
        raise ValueError("a speed run scores pictures of data.val with the judge of eval.judge: set both")
    if config.eval.task not in TASKS:
        raise ValueError(f"a speedrun is judged by labels: set eval.task to one of {', '.join(TASKS)}")
    return [_attempt(config, seed, options, report) for seed in options.seeds]


def as_json(attempts: Sequence[Attempt], options: Options) -> dict[str, object]:
    """The result as `mmgen bench speedrun --json` prints it; every list has one entry per seed.

    `seconds` is None for a seed that did not reach the target; its other entries are those of its last checkpoint.
    """
    last = [attempt.history[-1] for attempt in attempts]
    return {
        "seeds": [attempt.seed for attempt in attempts],
        "seconds": [s.seconds if a.reached else None for a, s in zip(attempts, last, strict=True)],
        "steps": [s.step for s in last],
        "t2i_accuracy": [s.t2i_accuracy for s in last],
        "i2t_accuracy": [s.i2t_accuracy for s in last],
        "target": options.target,
        "threads": options.threads,
    }


def _attempt(config: Config, seed: int, options: Options, report: Callable[[str], None]) -> Attempt:
    folder = options.out / f"seed-{seed}"
    every = max(1, config.train.steps // CHECKPOINTS)
    changes = {
        "run": {"dir": folder, "seed": seed},
        "data": {"val": []},
        "train": {"save_every": every, "keep_every": every, "sample_every": 0, "first_sample": 0, "val_every": 0},
    }
    run = override(config, changes)
    settings = keep_settings(run, "speedrun.yaml", "choose another --out")
    report(f"{folder}: training {run.train.steps} steps with {options.threads} threads")
    run_command("train", settings, options.threads)
    task: Task = TASKS[config.eval.task]()
    judge = Judge(task, config.eval.judge)
    samples = list(read(config.data.val))
    history: list[Scored] = []
    for checkpoint in sorted(candidates(folder), key=lambda path: int(path.name.removeprefix("step-"))):
        model, tokenizer = load_model(checkpoint, config.sample.weights)
        trained = read_trainer(checkpoint)
        generator = Generator(model, tokenizer, config.sample, config.eval.batch, lambda line: None)
        pictures = Pictures(config.data.val, model.build_patcher(), [], config.data)
        captions = caption_scores(generator.describe(pictures.images), task, pictures.truth)
        prompts = repeated(samples, config.eval.samples)
        drawn = judge.read(arrays(generator.draw(prompts, config.sample.guidance_scale)))
        t2i = agreement(drawn, [truth(sample) for sample in prompts])
        history.append(Scored(trained.step, round(trained.train_seconds, 1), t2i, captions.i2t_accuracy))
        report(
            f"seed {seed}, step {trained.step}, {trained.train_seconds:.0f} s: captions to images {t2i:.3f}, images to "
            f"captions {captions.i2t_accuracy:.3f}"
        )
        if history[-1].reaches(options.target):
            break
    return Attempt(seed, history, history[-1].reaches(options.target))
