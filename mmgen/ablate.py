"""`mmgen ablate FILE`: trains and scores a grid of settings and seeds, at equal steps, parameters or FLOPs.

FILE is YAML:

    base: configs/digits.yaml        # the run that the arms change
    out: runs/ablate/objective
    equal: parameters                # steps, parameters or flops
    seeds: [0, 1, 2]
    arms:                            # name: overrides
      transfusion: {}
      mar: {objective.kind: mar}
    grid:                            # optional: every arm times every combination
      train.lr: [0.001, 0.003]

Each run is a separate process with the folder `out/ARM/seed-N`. The same command resumes a stopped ablation.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeGuard

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails
from scipy import stats
from torch.utils.flop_counter import FlopCounterMode

from mmgen.config import Config, nearest
from mmgen.config_io import explain, load, merged, override, read_yaml
from mmgen.data.latents import find_facts
from mmgen.data.streams import training_corpus
from mmgen.evaluate.report import write_report
from mmgen.model import MMGenConfig, MMGenModel, build_model
from mmgen.sequence.batch import prepare
from mmgen.sequence.tokenizer import Tokenizer
from mmgen.train.command import keep_settings, run_command

WIDTH_STEP = 8
"""Feed-forward widths of arms of equal parameters are multiples of this."""
SCORES = (
    "t2i_accuracy", "t2i_accuracy_w1", "i2t_accuracy", "within_class_variance_ratio", "two_sample_accuracy", "fd_pixel",
    "val_loss_text", "val_loss_image", "seconds_per_step", "seconds_per_image", "parameters", "steps",
)  # fmt: skip
"""Scores in the printed table; `report.json` has every number that all runs of an arm report."""
VAL_BY_CELL = "val_loss_image_by_place"
"""Key of the list of image losses, one for each cell of the patch grid, in the report of a run."""


class AblationFile(BaseModel):
    """The contents of the YAML file of an ablation."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    base: Path = Field(description="the YAML file of the run that the arms change")
    out: Path = Field(description="the folder of the runs and the report")
    equal: Literal["steps", "parameters", "flops"] = "steps"
    seeds: list[int] = Field([0], min_length=1)
    arms: dict[str, dict[str, object]] = Field(min_length=1, description="the changed settings of each arm, by name")
    grid: dict[str, list[object]] = {}


@dataclass(frozen=True)
class Arm:
    """One set of settings, already adjusted to the steps, parameters or FLOPs of the first arm."""

    name: str
    config: Config
    parameters: int
    flops: float
    """FLOPs of one training step, forward and backward."""


@dataclass(frozen=True)
class Interval:
    """Mean over seeds and half-width of its 95% interval; the half-width of a single seed is None."""

    mean: float
    half_width: float | None


@dataclass(frozen=True)
class Intervals:
    """Means and half-widths of a list of numbers, one interval per element."""

    mean: list[float]
    half_width: list[float | None]

    def at(self, index: int) -> Interval:
        """Return the interval of one element."""
        return Interval(self.mean[index], self.half_width[index])


@dataclass(frozen=True)
class Comparison:
    """The contents of the `report.json` of an ablation."""

    equal: str
    seeds: list[int]
    arms: dict[str, dict[str, Interval | Intervals]]
    """By arm, the interval of every number that all its runs report."""


Report = Mapping[str, object]
"""The contents of the `report.json` of one run."""


def read(path: Path) -> tuple[AblationFile, list[Arm]]:
    """Read the file of an ablation; returns it with its arms, which are checked and made equal.

    Raises:
        ValueError: the file, its base or an override is invalid, or arms cannot be made equal.
        FileNotFoundError: the tokenizer or shards of the base do not exist.
    """
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise ValueError(f"{path} is not a mapping: it needs the keys base, out and arms")
    if not {"base", "out", "arms"} & raw.keys() and {*Config.model_fields} & raw.keys():
        raise ValueError(f"{path} has the settings of a run: name a file such as configs/ablations/objectives.yaml")
    try:
        file = AblationFile.model_validate(raw)
    except ValidationError as error:
        raise ValueError("\n".join(f"{path}: {_explained(item)}" for item in error.errors())) from None
    base = load(file.base)
    arms: list[Arm] = []
    for name, changes in _cells(file):
        try:
            config = override(base, nested(changes))
        except ValueError as error:
            raise ValueError(f"{path}: arm '{name}': {error}") from None
        arms.append(_equal(name, config, file.equal, arms[0] if arms else None))
    return file, arms


def _explained(error: ErrorDetails) -> str:
    """An error in the keys of an ablation's file as a sentence."""
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "missing":
        return f"the key '{key}' is missing: it is {AblationFile.model_fields[key].description or 'needed'}"
    if error["type"] == "extra_forbidden":
        near = nearest(key, list(AblationFile.model_fields))
        hint = f"did you mean '{near}'?" if near else f"the keys are {', '.join(AblationFile.model_fields)}"
        return f"unknown key '{key}', {hint}"
    return explain(error, AblationFile)


def _cells(file: AblationFile) -> list[tuple[str, dict[str, object]]]:
    """Return the name and the overrides of every arm combined with every point of the grid."""
    cells = []
    for name, changes in file.arms.items():
        for values in itertools.product(*file.grid.values()):
            extra = dict(zip(file.grid, values, strict=True))
            label = "_".join([name, *(f"{key.split('.')[-1]}={value}" for key, value in extra.items())])
            cells.append((label.replace("/", "-"), {**changes, **extra}))
    return cells


def nested(dotted: Mapping[str, object]) -> dict[str, object]:
    """Convert `{"a.b": 1}` to `{"a": {"b": 1}}`; values may be mappings."""
    tree: dict[str, object] = {}
    for key, value in dotted.items():
        first, _, rest = key.partition(".")
        new = nested({rest: value}) if rest else value
        old = tree.get(first)
        tree[first] = merged(old, new) if isinstance(old, Mapping) and isinstance(new, Mapping) else new
    return tree


def _equal(name: str, config: Config, how: str, first: Arm | None) -> Arm:
    if first is not None and how == "parameters":
        config = same_parameters(config, first.parameters, name)
    flops = step_flops(config)
    if first is not None and how == "flops":
        steps = max(1, round(first.config.train.steps * first.flops / flops))
        config = override(config, {"train": {"steps": steps}})
    return Arm(name, config, parameters(config), flops)


def parameters(config: Config) -> int:
    """Return the number of parameters of the model of a configuration, without allocating it."""
    vocabulary = len(Tokenizer.of(config))
    with torch.device("meta"):
        return sum(p.numel() for p in MMGenModel(MMGenConfig.of(config, vocabulary)).parameters())


def same_parameters(config: Config, wanted: int, name: str) -> Config:
    """Return the configuration with the feed-forward width whose parameter count is nearest to `wanted`.

    Raises:
        ValueError: no width gives a count within 2%, or the backbone is pretrained.
    """
    if config.model.backbone.pretrained is not None:
        raise ValueError(
            f"arm '{name}': a pretrained backbone has a fixed number of parameters; set `equal` to steps or flops"
        )

    def at(width: int) -> Config:
        return override(config, {"model": {"backbone": {"intermediate_size": width}}})

    one, two = parameters(at(WIDTH_STEP)), parameters(at(2 * WIDTH_STEP))
    width = WIDTH_STEP * max(1, 1 + round((wanted - one) / (two - one)))
    count = parameters(at(width))
    if abs(count - wanted) > 0.02 * wanted:
        raise ValueError(
            f"arm '{name}' cannot have {wanted} parameters: with a feed-forward width of {width} it has {count}; "
            "make its head or depth smaller, or the first arm larger"
        )
    return at(width)


def step_flops(config: Config) -> float:
    """Return the floating-point operations of one training step, which torch counts on the first batch of the run."""
    tokenizer = Tokenizer.of(config)
    corpus = training_corpus(config, tokenizer, find_facts(config, tokenizer))
    model = build_model(config, len(tokenizer))
    batches = [prepare(raw, corpus.patcher) for raw in corpus.first_step().micro]
    with FlopCounterMode(display=False) as counter:
        for batch in batches:
            losses = model(batch)
            (losses.text + losses.image).backward()
    return float(counter.get_total_flops())


def ablate(path: Path, report: Callable[[str], None]) -> Comparison:
    """Train and score the runs that are not finished, one process per command, and write `report.json` into `out`.

    `report` is called with lines of progress.

    Raises:
        ValueError: the file is invalid, or a run in `out` has other settings.
        ChildProcessError: a run failed; the message names it and its log.
    """
    file, arms = read(path)
    for arm in arms:
        report(
            f"{arm.name}: {arm.parameters:,} parameters, {arm.config.train.steps} steps of {arm.flops / 1e9:.2f} GFLOP"
        )
    reports: dict[str, list[Report]] = {arm.name: [] for arm in arms}
    for seed in file.seeds:  # seeds are the outer loop, so that a table of all arms exists after the first seed
        for arm in arms:
            folder = file.out / arm.name / f"seed-{seed}"
            config = override(arm.config, {"run": {"dir": folder, "seed": seed}})
            reports[arm.name].append(_run(config, arm, report))
        done = len(reports[arms[0].name])
        comparison = Comparison(file.equal, file.seeds[:done], {name: summary(runs) for name, runs in reports.items()})
        write_report(file.out, asdict(comparison))
    return comparison


def _run(config: Config, arm: Arm, report: Callable[[str], None]) -> Report:
    """Return the report of one run, after training and scoring it if that is not done yet."""
    settings = keep_settings(config, "ablation.yaml", "choose another `out` in the ablation file")
    scores_file = config.run.dir / "report.json"
    if not scores_file.exists():
        for command in ("train", "eval"):
            report(f"{config.run.dir}: {command}")
            run_command(command, settings)
    scores = json.loads(scores_file.read_text())
    seconds = scores["train_seconds"] / config.train.steps
    return {
        **scores,
        "seconds_per_step": seconds,
        "steps": config.train.steps,
        "gflop_per_step": arm.flops / 1e9,
    }


def summary(reports: Sequence[Report]) -> dict[str, Interval | Intervals]:
    """Return the interval over runs of every number, or list of numbers, that all of them report."""
    result: dict[str, Interval | Intervals] = {}
    for key in reports[0]:
        values = [run.get(key) for run in reports]
        numbers = [value for value in values if _number(value)]
        lists = [value for value in values if isinstance(value, list) and value and all(map(_number, value))]
        if len(numbers) == len(values):
            result[key] = interval(numbers)
        elif len(lists) == len(values):
            result[key] = intervals(lists)
    return result


def _number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def interval(values: Sequence[float]) -> Interval:
    """Return the mean and the half-width of Student's 95% interval."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, None)
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, float(stats.t.ppf(0.975, len(values) - 1)) * spread)


def intervals(values: Sequence[Sequence[float]]) -> Intervals:
    """Return the interval of each element of lists of equal length."""
    each = [interval(column) for column in zip(*values, strict=True)]
    return Intervals([item.mean for item in each], [item.half_width for item in each])
