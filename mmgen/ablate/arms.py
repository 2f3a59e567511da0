"""The file of an ablation: a grid of settings and seeds, at equal steps, parameters or FLOPs.

It is YAML:

    base: configs/digits.yaml        # the run that the arms change
    out: runs/ablate/objective
    equal: parameters                # steps, parameters or flops
    seeds: [0, 1, 2]
    baseline: transfusion            # the arm that the others are compared with; the first one if left out
    common: {train.steps: 600}       # optional: overrides of all arms
    arms:                            # name: overrides
      transfusion: {}
      mar: {objective.kind: mar}
    grid:                            # optional: every arm times every combination
      train.lr: [0.001, 0.003]
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from mmgen.ablate.equal import Cost, parameters, same_parameters, step_cost
from mmgen.config import CAPTIONS, Config, choose, nearest
from mmgen.config_io import explain, load, merged, override, read_yaml
from mmgen.data.shards.samples import read as read_samples
from mmgen.evaluate.judge import truth


class AblationFile(BaseModel):
    """The contents of the YAML file of an ablation."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    base: Path = Field(description="the YAML file of the run that the arms change")
    out: Path = Field(description="the folder of the runs and the report")
    equal: Literal["steps", "parameters", "flops"] = "steps"
    seeds: list[int] = Field([0], min_length=1)
    baseline: str | None = Field(None, description="the arm that the others are compared with")
    common: dict[str, object] = {}
    arms: dict[str, dict[str, object]] = Field(min_length=1, description="the changed settings of each arm, by name")
    grid: dict[str, list[object]] = {}


@dataclass(frozen=True)
class Arm:
    """One set of settings, already adjusted to the steps, parameters or FLOPs of the first arm."""

    name: str
    config: Config
    parameters: int
    flops: float
    """FLOPs of one training step, forward and backward: the mean of the first steps."""
    documents: float
    """Documents of one training step, the mean of the same steps."""
    baseline: str | None
    """Name of the arm that it is compared with; None for the first arm."""
    trained_by: str
    """Name of the arm whose training it uses: the first one that differs only in settings of sampling and scoring."""
    judged: bool
    """Whether its pictures and captions are scored; if not, it has losses alone."""

    @property
    def shape(self) -> Shape:
        """Its sizes and costs."""
        backbone = self.config.model.backbone
        sizes = backbone.model_dump(include={"hidden_size", "intermediate_size", "num_hidden_layers"})
        if backbone.pretrained is not None:
            sizes = dict.fromkeys(sizes)
        return Shape(
            **sizes,
            objective=self.config.objective.section.model_dump(mode="json"),
            parameters=self.parameters,
            steps=self.config.train.steps,
            flops_per_step=self.flops,
            documents_per_step=self.documents,
            trained_by=self.trained_by,
            judged=self.judged,
        )

    @property
    def line(self) -> str:
        """The arm in one line of text."""
        shape, backbone = self.shape, self.config.model.backbone
        size = backbone.pretrained or (
            f"{shape.num_hidden_layers} layers, width {shape.hidden_size}, feed-forward {shape.intermediate_size}"
        )
        notes = [] if self.trained_by == self.name else [f"training of {self.trained_by}"]
        notes += [] if self.judged else ["losses alone, as there is no judge or labels are missing"]
        return (
            f"{self.name}: {self.parameters:,} parameters ({size}), {shape.steps} steps of {self.flops / 1e9:.2f} "
            f"GFLOP and {self.documents:.0f} documents" + "".join(f"; {note}" for note in notes)
        )


@dataclass(frozen=True)
class Shape:
    """Sizes and costs of an arm, in the `report.json` of an ablation."""

    hidden_size: int | None
    """None for a pretrained backbone."""
    intermediate_size: int | None
    num_hidden_layers: int | None
    objective: dict[str, object]
    """The settings of its objective, with the widths of its own networks."""
    parameters: int
    steps: int
    flops_per_step: float
    documents_per_step: float
    trained_by: str
    judged: bool


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
    if file.baseline is not None:
        choose(file.arms, file.baseline, f"{path}: baseline")
    base = override(load(file.base), nested(file.common))
    arms: list[Arm] = []
    costs: dict[str, Cost] = {}
    for cell in _cells(file):
        try:
            config = override(base, nested(cell.changes))
        except ValueError as error:
            raise ValueError(f"{path}: arm '{cell.name}': {error}") from None
        arms.append(_equal(cell, config, file.equal, arms, costs))
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


@dataclass(frozen=True)
class _Cell:
    """An arm at one point of the grid."""

    name: str
    changes: dict[str, object]
    baseline: str | None


def _cells(file: AblationFile) -> list[_Cell]:
    """Return every arm at every point of the grid. Its baseline is the baseline arm at the same point.

    The baseline arm itself is compared with its own first point.
    """
    points = [dict(zip(file.grid, values, strict=True)) for values in itertools.product(*file.grid.values())]
    baseline = file.baseline or next(iter(file.arms))

    def label(name: str, point: Mapping[str, object]) -> str:
        return "_".join([name, *(f"{key.split('.')[-1]}={value}" for key, value in point.items())]).replace("/", "-")

    cells = []
    for name, changes in file.arms.items():
        for point in points:
            against = label(baseline, points[0] if name == baseline else point)
            own = label(name, point)
            cells.append(_Cell(own, {**changes, **point}, None if against == own else against))
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


def _equal(cell: _Cell, config: Config, how: str, earlier: Sequence[Arm], costs: dict[str, Cost]) -> Arm:
    """The arm of a cell, made equal to the first one. `costs` holds the cost of each training that is known."""
    judged = _judged(config)
    if not judged and not config.data.val:
        raise ValueError(
            f"arm '{cell.name}' has nothing to compare: set data.val for losses, and eval.judge and eval.test to "
            "shards whose JSON lists the objects of each picture for scores"
        )
    if earlier and how == "parameters":
        config = same_parameters(config, earlier[0].parameters, cell.name)
    training = _training(config, judged)
    cost = costs[training] = costs.get(training) or step_cost(config)
    if earlier and how == "flops":
        steps = max(1, round(earlier[0].config.train.steps * earlier[0].flops / cost.flops))
        config = override(config, {"train": {"steps": steps}})
        training = _training(config, judged)
    return Arm(
        name=cell.name,
        config=config,
        parameters=parameters(config),
        flops=cost.flops,
        documents=cost.documents,
        baseline=cell.baseline,
        trained_by=next((arm.name for arm in earlier if _training(arm.config, arm.judged) == training), cell.name),
        judged=judged,
    )


def _training(config: Config, judged: bool) -> str:
    """All settings that a training depends on, as text: those of sampling and scoring are left out.

    Without a judge, the losses come from the training itself, which computes them with `sample.weights`.
    """
    settings = config.model_dump(mode="json", exclude={"run", "sample", "eval"})
    return json.dumps([settings, None if judged else config.sample.weights], sort_keys=True)


def _judged(config: Config) -> bool:
    """Whether a run of these settings can be scored: a labelled task needs a judge, and labels in each part."""
    if config.eval.task == CAPTIONS:
        return bool(config.data.train and config.eval.test)
    shards = (config.data.train, config.eval.test, config.eval.judge)
    if not all(shards):
        return False
    try:
        for patterns in shards:
            truth(next(iter(read_samples(patterns, bad=[]))))
    except (ValueError, StopIteration):
        return False
    return True
