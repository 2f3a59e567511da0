"""`mmgen ablate FILE`: a grid of settings times seeds, compared at equal steps, parameters or FLOPs.

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

Each run is a process of its own in `out/ARM/seed-N`; the same command goes on where it stopped.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeGuard

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails
from scipy import stats
from torch.utils.flop_counter import FlopCounterMode

from mmgen.config import Config, nearest
from mmgen.config_io import explain, load, merged, override
from mmgen.data.latents import find_facts
from mmgen.data.streams import training_corpus
from mmgen.evaluate.report import write_report
from mmgen.model import MMGenConfig, MMGenModel, build_model
from mmgen.sequence.batch import prepare
from mmgen.sequence.tokenizer import Tokenizer

WIDTH_STEP = 8
"""Feed-forward widths are tried in multiples of this."""
SCORES = (
    "t2i_accuracy", "t2i_accuracy_w1", "i2t_accuracy", "within_class_variance_ratio", "two_sample_accuracy", "fd_pixel",
    "val_loss_text", "val_loss_image", "seconds_per_step", "seconds_per_image", "parameters", "steps",
)  # fmt: skip
"""Columns of the table; `report.json` has every number that all runs of an arm report."""
VAL_PLACES = "val_loss_image_by_place"
"""A list in a run's report: the image loss at each place of a patch grid."""


class AblationFile(BaseModel):
    """What is compared."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    base: Path
    out: Path
    equal: Literal["steps", "parameters", "flops"] = "steps"
    seeds: list[int] = Field([0], min_length=1)
    arms: dict[str, dict[str, object]] = Field(min_length=1)
    grid: dict[str, list[object]] = {}


@dataclass(frozen=True)
class Arm:
    """One column of settings, made equal to the first arm in the way the file asks for."""

    name: str
    config: Config
    parameters: int
    flops: float
    """Of one training step, forward and backward."""


@dataclass(frozen=True)
class Interval:
    """Mean over seeds and half-width of its 95% interval, which a single seed does not have."""

    mean: float
    half_width: float | None


@dataclass(frozen=True)
class Intervals:
    """Intervals of a list of numbers, place by place."""

    mean: list[float]
    half_width: list[float | None]

    def at(self, place: int) -> Interval:
        """The interval of one place."""
        return Interval(self.mean[place], self.half_width[place])


@dataclass(frozen=True)
class Comparison:
    """Every number that all runs of an arm report, by arm; its fields are those of the ablation's `report.json`."""

    equal: str
    seeds: list[int]
    arms: dict[str, dict[str, Interval | Intervals]]


Report = Mapping[str, object]
"""The `report.json` of one run."""


def read(path: Path) -> tuple[AblationFile, list[Arm]]:
    """The arms of a file, their settings checked and made equal.

    Raises:
        ValueError: the file, its base or an override is wrong, or arms cannot be made equal.
        FileNotFoundError: the base's tokenizer or shards are missing.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError(f"{path} is no mapping: write the keys {', '.join(AblationFile.model_fields)}")
        file = AblationFile.model_validate(raw)
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a YAML file: it is not text in UTF-8") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
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
        return f"the key '{key}' is missing"
    if error["type"] == "extra_forbidden":
        near = nearest(key, list(AblationFile.model_fields))
        hint = f"did you mean '{near}'?" if near else f"the keys are {', '.join(AblationFile.model_fields)}"
        return f"unknown key '{key}', {hint}"
    return explain(error)


def _cells(file: AblationFile) -> list[tuple[str, dict[str, object]]]:
    """Every arm times every combination of the grid, by name."""
    cells = []
    for name, changes in file.arms.items():
        for values in itertools.product(*file.grid.values()):
            extra = dict(zip(file.grid, values, strict=True))
            label = "_".join([name, *(f"{key.split('.')[-1]}={value}" for key, value in extra.items())])
            cells.append((label.replace("/", "-"), {**changes, **extra}))
    return cells


def nested(dotted: Mapping[str, object]) -> dict[str, object]:
    """`{"a.b": 1}` as `{"a": {"b": 1}}`; values may be mappings themselves."""
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
    """Number of parameters of a configuration's model; nothing is allocated."""
    vocabulary = len(Tokenizer.of(config))
    with torch.device("meta"):
        return sum(p.numel() for p in MMGenModel(MMGenConfig.of(config, vocabulary)).parameters())


def same_parameters(config: Config, wanted: int, name: str) -> Config:
    """The configuration with the feed-forward width that brings it nearest to `wanted` parameters.

    Raises:
        ValueError: no width comes within 2%, or the backbone is a pretrained one.
    """
    if config.model.backbone.pretrained is not None:
        raise ValueError(f"arm '{name}': a pretrained backbone has a fixed size; compare at equal steps or flops")

    def at(width: int) -> Config:
        return override(config, {"model": {"backbone": {"intermediate_size": width}}})

    one, two = parameters(at(WIDTH_STEP)), parameters(at(2 * WIDTH_STEP))
    width = WIDTH_STEP * max(1, 1 + round((wanted - one) / (two - one)))
    found = parameters(at(width))
    if abs(found - wanted) > 0.02 * wanted:
        raise ValueError(
            f"arm '{name}' cannot have {wanted} parameters: at its smallest feed-forward layers it has {found}; "
            "make its head or depth smaller, or the first arm larger"
        )
    return at(width)


def step_flops(config: Config) -> float:
    """Floating-point operations of one training step, counted by torch on the run's first batch."""
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
    """Run what is missing, one process per run, and write `report.json` into the file's `out`.

    Raises:
        ValueError: the file is wrong, or a finished run in `out` has other settings.
        ChildProcessError: a run failed; the message names it and its log.
    """
    file, arms = read(path)
    for arm in arms:
        report(
            f"{arm.name}: {arm.parameters:,} parameters, {arm.config.train.steps} steps of {arm.flops / 1e9:.2f} GFLOP"
        )
    reports: dict[str, list[Report]] = {arm.name: [] for arm in arms}
    for seed in file.seeds:  # seeds outermost, so that a table over few seeds exists early
        for arm in arms:
            folder = file.out / arm.name / f"seed-{seed}"
            config = override(arm.config, {"run": {"dir": folder, "seed": seed}})
            reports[arm.name].append(_run(config, arm, report))
        done = len(reports[arms[0].name])
        found = Comparison(file.equal, file.seeds[:done], {name: summary(runs) for name, runs in reports.items()})
        write_report(file.out, asdict(found))
    return found


def _run(config: Config, arm: Arm, report: Callable[[str], None]) -> Report:
    """The report of one run, which is trained and scored unless it has been."""
    folder = config.run.dir
    folder.mkdir(parents=True, exist_ok=True)
    settings = folder / "ablation.yaml"
    wanted = config.model_dump(mode="json")
    if settings.exists() and yaml.safe_load(settings.read_text()) != wanted:
        raise ValueError(f"{settings} is of other settings than the file now asks for: choose another `out`")
    settings.write_text(yaml.safe_dump(wanted, sort_keys=False))
    scores = folder / "report.json"
    if not scores.exists():
        for command in ("train", "eval"):
            report(f"{folder}: {command}")
            with (folder / f"{command}.log").open("w") as log:
                words = [sys.executable, "-m", "mmgen.cli", command, "--config", str(settings)]
                code = subprocess.run(words, stdout=log, stderr=subprocess.STDOUT).returncode
            if code:
                raise ChildProcessError(
                    f"{command} of {folder} ended with code {code}: see {log.name}. The same command goes on from here"
                )
    found = json.loads(scores.read_text())
    seconds = found["train_seconds"] / config.train.steps
    return {
        **found,
        "seconds_per_step": seconds,
        "steps": config.train.steps,
        "gflop_per_step": arm.flops / 1e9,
    }


def summary(reports: Sequence[Report]) -> dict[str, Interval | Intervals]:
    """The interval over the runs of an arm of every number, or list of numbers, that all of them report."""
    found: dict[str, Interval | Intervals] = {}
    for key in reports[0]:
        values = [report.get(key) for report in reports]
        numbers = [value for value in values if _number(value)]
        lists = [value for value in values if isinstance(value, list) and value and all(map(_number, value))]
        if len(numbers) == len(values):
            found[key] = interval(numbers)
        elif len(lists) == len(values):
            found[key] = intervals(lists)
    return found


def _number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def interval(values: Sequence[float]) -> Interval:
    """Mean and half-width of Student's 95% interval."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, None)
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, float(stats.t.ppf(0.975, len(values) - 1)) * spread)


def intervals(values: Sequence[Sequence[float]]) -> Intervals:
    """The interval of each place of equally long lists."""
    each = [interval(column) for column in zip(*values, strict=True)]
    return Intervals([item.mean for item in each], [item.half_width for item in each])
