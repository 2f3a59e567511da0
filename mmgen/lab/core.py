"""Experiments: functions that record figures and bounds and draw a picture; their results as JSON."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from mmgen.config import choose
from mmgen.lab.faults import injected

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Number = TypeVar("Number", int, float)
Json = bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"] | None
"""A value that a JSON file can hold."""


@dataclass(frozen=True)
class Bound:
    """A figure that must lie between two limits; either limit may be infinite."""

    figure: str
    value: float
    at_least: float = -math.inf
    at_most: float = math.inf

    @property
    def holds(self) -> bool:
        """Whether the value lies between the limits; nan does not."""
        return self.at_least <= self.value <= self.at_most

    @property
    def limits(self) -> dict[str, float]:
        """The limits `at_least` and `at_most` that are finite, by name."""
        limits = {"at_least": self.at_least, "at_most": self.at_most}
        return {name: limit for name, limit in limits.items() if math.isfinite(limit)}

    @property
    def wanted(self) -> str:
        """The limits as text, such as "at least 0.9 at most 1.1"."""
        return " ".join(f"{name.replace('_', ' ')} {limit:g}" for name, limit in self.limits.items())

    def as_json(self) -> dict[str, Json]:
        """The bound as an object of the result's JSON."""
        return {"figure": self.figure, "value": self.value, "holds": self.holds, **self.limits}


@dataclass(frozen=True)
class KnownDifference:
    """A figure that is known to differ from the published value, with the reason; it has no effect on `holds`."""

    figure: str
    wanted: str
    measured: float
    reason: str

    def as_json(self) -> dict[str, Json]:
        """The difference as an object of the result's JSON."""
        return {"figure": self.figure, "wanted": self.wanted, "measured": self.measured, "reason": self.reason}


@dataclass(frozen=True)
class Options:
    """Options of a run: size, seed, folder and fault."""

    fast: bool = False
    """Whether small sizes and few training steps are used."""
    seed: int = 0
    out: Path = Path("runs/lab")
    """The folder for the results."""
    inject: str | None = None
    """The fault of `mmgen.lab.faults` that is injected, if any."""
    jobs: int = 1
    """Number of processes that an experiment may use."""

    def stem(self, name: str) -> Path:
        """Return the path of an experiment's files without the suffix."""
        parts = [name, *(["fast"] if self.fast else []), *([self.inject] if self.inject else [])]
        return self.out / ".".join(parts)


@dataclass
class Run:
    """One execution of an experiment: its size and seed, and the figures and bounds recorded so far."""

    options: Options = Options()
    stem: Path = Path("runs/lab/experiment")
    """The path of its files without the suffix."""
    figures: dict[str, Json] = field(default_factory=dict)
    bounds: list[Bound] = field(default_factory=list)
    differences: list[KnownDifference] = field(default_factory=list)

    @property
    def fast(self) -> bool:
        """Whether small sizes and few training steps are used."""
        return self.options.fast

    @property
    def seed(self) -> int:
        """The seed of all random numbers."""
        return self.options.seed

    def pick(self, full: Number, fast: Number) -> Number:
        """Return the size, or the bound, for a full or a fast run."""
        return fast if self.fast else full

    def note(self, **figures: Json) -> None:
        """Record figures without a bound."""
        self.figures.update(figures)

    def bound(self, figure: str, value: float, *, at_least: float = -math.inf, at_most: float = math.inf) -> None:
        """Record a figure with a bound."""
        self.figures[figure] = value
        self.bounds.append(Bound(figure, value, at_least, at_most))

    def bound_when_trained(
        self, figure: str, value: float, *, at_least: float = -math.inf, at_most: float = math.inf
    ) -> None:
        """As `bound` in a full run; in a fast run, which trains too few steps, record a known difference instead."""
        if not self.fast:
            self.bound(figure, value, at_least=at_least, at_most=at_most)
            return
        wanted = Bound(figure, value, at_least, at_most).wanted
        self.known_difference(figure, value, wanted=wanted, reason="a fast run trains too few steps for it")

    def known_difference(self, figure: str, value: float, *, wanted: str, reason: str) -> None:
        """Record a figure that misses the value `wanted` for a known reason; it has no bound."""
        self.figures[figure] = value
        self.differences.append(KnownDifference(figure, wanted, value, reason))

    @property
    def generator(self) -> torch.Generator:
        """A new generator with the run's seed."""
        return torch.Generator().manual_seed(self.seed)


Execute = Callable[[Run], "Figure"]
"""A function that records figures and bounds in the run and returns the picture."""


@dataclass(frozen=True)
class Experiment:
    """A named experiment; the first sentence of its function's docstring is the question that it asks."""

    name: str
    title: str
    run: Execute
    faults: tuple[str, ...] = ()
    """The faults that must break at least one of its bounds."""
    shared: str = ""
    """Experiments of the same name here share trained models: they run in one process, one after the other."""


@dataclass(frozen=True)
class Result:
    """The result of one execution of an experiment."""

    experiment: Experiment
    options: Options
    bounds: Sequence[Bound]
    differences: Sequence[KnownDifference]
    figures: Mapping[str, Json]
    seconds: float
    cpu_seconds: float

    @property
    def name(self) -> str:
        """The name of the experiment."""
        return self.experiment.name

    @property
    def holds(self) -> bool:
        """Whether every bound holds; known differences are not considered."""
        return all(bound.holds for bound in self.bounds)

    @property
    def picture(self) -> Path:
        """The path of the picture."""
        return Path(f"{self.options.stem(self.name)}.png")

    def as_json(self) -> Json:
        """The result as one JSON object; infinite numbers and nan become None."""
        return finite(
            {
                "name": self.name,
                "title": self.experiment.title,
                "holds": self.holds,
                "bounds": [bound.as_json() for bound in self.bounds],
                "known_differences": [difference.as_json() for difference in self.differences],
                "figures": self.figures,
                "fast": self.options.fast,
                "seed": self.options.seed,
                "inject": self.options.inject,
                "seconds": self.seconds,
                "cpu_seconds": self.cpu_seconds,
                "picture": str(self.picture),
            }
        )


EXPERIMENTS: dict[str, Experiment] = {}
"""All experiments by name; `mmgen.lab.catalog` imports the modules that register them."""


def experiment(title: str, faults: Sequence[str] = (), shared: str = "") -> Callable[[Execute], Execute]:
    """Register a function as an experiment under its own name."""

    def register(function: Execute) -> Execute:
        name = function.__name__
        EXPERIMENTS[name] = Experiment(name, title, function, tuple(faults), shared)
        return function

    return register


def check(name: str, inject: str | None = None) -> Experiment:
    """Return the experiment `name`.

    Raises:
        ValueError: an unknown experiment, or a fault that it does not detect.
    """
    chosen: Experiment = choose(EXPERIMENTS, name, "experiment")
    if inject is not None and inject not in chosen.faults:
        faults = ", ".join(chosen.faults) or "none"
        raise ValueError(f"experiment '{name}' does not detect the fault '{inject}' (it detects: {faults})")
    return chosen


def execute(name: str, options: Options = Options()) -> Result:
    """Run one experiment and write `NAME.json` and `NAME.png` into the folder of the options.

    A fast run writes `NAME.fast.*` and a run with a fault `NAME.FAULT.*`, so that neither replaces a full result.

    Raises:
        ValueError: an unknown experiment, or a fault that it does not detect.
    """
    chosen = check(name, options.inject)
    torch.manual_seed(options.seed)
    run = Run(options, options.stem(name))
    options.out.mkdir(parents=True, exist_ok=True)
    began, busy = time.perf_counter(), time.process_time()
    with injected(options.inject):
        picture = chosen.run(run)
    picture.suptitle(chosen.title, fontsize=11)
    picture.savefig(f"{run.stem}.png", dpi=110, bbox_inches="tight")
    seconds, cpu_seconds = round(time.perf_counter() - began, 1), round(time.process_time() - busy, 1)
    result = Result(chosen, options, run.bounds, run.differences, run.figures, seconds, cpu_seconds)
    part = Path(f"{run.stem}.json.part")
    part.write_text(json.dumps(result.as_json(), indent=1, allow_nan=False))
    os.replace(part, f"{run.stem}.json")
    return result


def finite(value: Json) -> Json:
    """Return the same value with None for infinite numbers and nan, which JSON cannot hold."""
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
