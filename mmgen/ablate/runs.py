"""`mmgen ablate FILE`: trains and scores the arms of an ablation, and compares them over seeds.

Each run is a separate process with the folder `out/ARM/seed-N`. The same command resumes a stopped ablation.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from mmgen.ablate.arms import AblationFile, Arm, Shape, read
from mmgen.ablate.statistics import Differences, Interval, Intervals, Report, differences, summary
from mmgen.config import Config
from mmgen.config_io import override
from mmgen.evaluate.report import write_report
from mmgen.train.checkpoint.read import latest, read_trainer
from mmgen.train.command import keep_settings, run_command

SCORES = (
    "t2i_accuracy", "t2i_accuracy_w1", "i2t_accuracy", "within_class_variance_ratio", "two_sample_accuracy", "fd_pixel",
    "val_loss_text", "val_loss_image", "seconds_per_step", "seconds_per_image", "parameters", "steps",
)  # fmt: skip
"""Scores in the printed table; `report.json` has every number that all runs of an arm report."""
VAL_BY_CELL = "val_loss_image_by_place"
"""Key of the list of image losses, one for each cell of the patch grid, in the report of a run."""


@dataclass(frozen=True)
class Comparison:
    """The contents of the `report.json` of an ablation."""

    equal: str
    seeds: list[int]
    arms: dict[str, dict[str, Interval | Intervals]]
    """By arm, the interval of every number that all its runs report."""
    shapes: dict[str, Shape]
    """By arm, its sizes and costs."""
    differences: dict[str, Differences]
    """By arm, its differences from its baseline, paired by seed. The baseline arm itself is left out."""


def ablate(path: Path, report: Callable[[str], None]) -> Comparison:
    """Train and score the runs that are not finished, one process per command, and write `report.json` into `out`.

    `report` is called with lines of progress.

    Raises:
        ValueError: the file is invalid, or a run in `out` has other settings.
        ChildProcessError: a run failed; the message names it and its log.
    """
    file, arms = read(path)
    for arm in arms:
        report(arm.line)
    reports: dict[str, list[Report]] = {arm.name: [] for arm in arms}
    for seed in file.seeds:  # seeds are the outer loop, so that a table of all arms exists after the first seed
        for arm in arms:
            reports[arm.name].append(_run(_Run(file, arm, seed), report))
        comparison = compared(file, arms, reports)
        write_report(file.out, asdict(comparison))
    return comparison


def compared(file: AblationFile, arms: list[Arm], reports: Mapping[str, list[Report]]) -> Comparison:
    """Compare arms by the reports of their runs, one for each of the first seeds of the file."""
    return Comparison(
        equal=file.equal,
        seeds=file.seeds[: len(reports[arms[0].name])],
        arms={name: summary(runs) for name, runs in reports.items()},
        shapes={arm.name: arm.shape for arm in arms},
        differences={
            arm.name: Differences(arm.baseline, differences(reports[arm.name], reports[arm.baseline]))
            for arm in arms
            if arm.baseline is not None
        },
    )


@dataclass(frozen=True)
class _Run:
    """One arm with one seed."""

    file: AblationFile
    arm: Arm
    seed: int

    @property
    def config(self) -> Config:
        """Its settings."""
        return override(self.arm.config, {"run": {"dir": self._folder(self.arm.name), "seed": self.seed}})

    @property
    def trained_in(self) -> Path:
        """The folder of the run whose training it uses."""
        own = self._folder(self.arm.name)
        checkpoints = own / "checkpoints"
        trains = self.arm.trained_by == self.arm.name or (checkpoints.is_dir() and not checkpoints.is_symlink())
        return own if trains else self._folder(self.arm.trained_by)

    def _folder(self, arm: str) -> Path:
        return self.file.out / arm / f"seed-{self.seed}"


def _run(run: _Run, report: Callable[[str], None]) -> Report:
    """Return the report of one run, after training and scoring it if that is not done yet."""
    arm, config = run.arm, run.config
    settings = keep_settings(config, "ablation.yaml", "choose another `out` in the ablation file")
    scores_file = config.run.dir / "report.json"
    if not scores_file.exists():
        if run.trained_in == config.run.dir:
            report(f"{config.run.dir}: train")
            run_command("train", settings)
        else:
            report(f"{config.run.dir}: training of {run.trained_in}")
            _share_checkpoints(run.trained_in, config.run.dir)
        if arm.judged:
            report(f"{config.run.dir}: eval")
            run_command("eval", settings)
        else:
            write_report(config.run.dir, losses(run.trained_in, arm.parameters))
    scores = json.loads(scores_file.read_text())
    seconds = scores["train_seconds"] / config.train.steps
    return {
        **scores,
        "seconds_per_step": seconds,
        "steps": config.train.steps,
        "gflop_per_step": arm.flops / 1e9,
    }


def _share_checkpoints(owner: Path, folder: Path) -> None:
    """Make the checkpoints of one run those of another, by a relative link."""
    link = folder / "checkpoints"
    if not link.is_symlink():
        link.symlink_to(os.path.relpath(owner / "checkpoints", folder), target_is_directory=True)


def losses(folder: Path, parameters: int) -> dict[str, object]:
    """The report of a run that cannot be scored: the last validation losses of its training, `val_loss_NAME`.

    Raises:
        ValueError: the run has no validation losses, or no checkpoint.
    """
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    validations = [line for line in lines if any(key.startswith("val_loss/") for key in line)]
    checkpoint = latest(folder)
    if not validations or checkpoint is None:
        raise ValueError(f"{folder} has no validation losses or no checkpoint: remove the folder, to train it again")
    trainer, last = read_trainer(checkpoint), validations[-1]
    found = {key.replace("/", "_", 1): value for key, value in last.items() if key.startswith("val_loss/")}
    return {"step": last["step"], **found, "train_seconds": trainer.train_seconds, "parameters": parameters}
