"""What an experiment is: a function that records figures and bounds, and draws a picture."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mmgen.config import choose
from mmgen.lab.faults import injected

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Json = bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"] | None
"""What a JSON file can hold."""


@dataclass(frozen=True)
class Bound:
    """A figure that must lie between two limits, either of which may be infinite."""

    figure: str
    value: float
    at_least: float = -math.inf
    at_most: float = math.inf

    @property
    def holds(self) -> bool:
        """Whether the value lies between the limits; a value that is not a number does not."""
        return self.at_least <= self.value <= self.at_most

    @property
    def limits(self) -> dict[str, float]:
        """The finite ones of `at_least` and `at_most`."""
        limits = {"at_least": self.at_least, "at_most": self.at_most}
        return {name: limit for name, limit in limits.items() if math.isfinite(limit)}

    @property
    def wanted(self) -> str:
        """The limits in words: "at least 0.9 at most 1.1"."""
        return " ".join(f"{name.replace('_', ' ')} {limit:g}" for name, limit in self.limits.items())

    def as_json(self) -> dict[str, Json]:
        """For the result's JSON."""
        return {"figure": self.figure, "value": self.value, "holds": self.holds, **self.limits}


@dataclass(frozen=True)
class KnownDifference:
    """A figure that is known to miss what write-ups lead one to expect, and why. It decides nothing."""

    figure: str
    wanted: str
    measured: float
    reason: str

    def as_json(self) -> dict[str, Json]:
        """For the result's JSON."""
        return {"figure": self.figure, "wanted": self.wanted, "measured": self.measured, "reason": self.reason}


@dataclass(frozen=True)
class Options:
    """How an experiment is executed."""

    fast: bool = False
    """Small sizes."""
    seed: int = 0
    out: Path = Path("runs/lab")
    """Folder of the results."""
    inject: str | None = None
    """A fault of `mmgen.lab.faults`."""

    def stem(self, name: str) -> Path:
        """Where the files of an experiment go, without their endings."""
        parts = [name, *(["fast"] if self.fast else []), *([self.inject] if self.inject else [])]
        return self.out / ".".join(parts)


@dataclass
class Run:
    """One execution of an experiment: its size and seed, and what it found."""

    fast: bool = False
    seed: int = 0
    stem: Path = Path("runs/lab/experiment")
    """Where its files go, without their endings."""
    figures: dict[str, Json] = field(default_factory=dict)
    bounds: list[Bound] = field(default_factory=list)
    differences: list[KnownDifference] = field(default_factory=list)

    def pick(self, full: int, fast: int) -> int:
        """A size: of the full experiment or of the fast one."""
        return fast if self.fast else full

    def note(self, **figures: Json) -> None:
        """Record figures that no bound judges."""
        self.figures.update(figures)

    def bound(self, figure: str, value: float, *, at_least: float = -math.inf, at_most: float = math.inf) -> None:
        """Record a figure and judge it."""
        self.figures[figure] = value
        self.bounds.append(Bound(figure, value, at_least, at_most))

    def bound_when_trained(
        self, figure: str, value: float, *, at_least: float = -math.inf, at_most: float = math.inf
    ) -> None:
        """As `bound`, for a figure that takes the training of a full run; in a fast run it is not judged."""
        if not self.fast:
            self.bound(figure, value, at_least=at_least, at_most=at_most)
            return
        wanted = Bound(figure, value, at_least, at_most).wanted
        self.known_difference(figure, value, wanted=wanted, reason="a fast run trains too few steps for it")

    def known_difference(self, figure: str, value: float, *, wanted: str, reason: str) -> None:
        """Record a figure that misses what was expected of it, for a known reason; it is not judged."""
        self.figures[figure] = value
        self.differences.append(KnownDifference(figure, wanted, value, reason))

    @property
    def generator(self) -> torch.Generator:
        """A fresh generator with the run's seed."""
        return torch.Generator().manual_seed(self.seed)


Execute = Callable[[Run], "Figure"]
"""Records figures and bounds in the run and returns the picture."""


@dataclass(frozen=True)
class Experiment:
    """A named experiment."""

    name: str
    title: str
    run: Execute
    faults: tuple[str, ...] = ()
    """Faults that must turn it red."""


@dataclass(frozen=True)
class Result:
    """What one execution of an experiment found."""

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
        """Whether every bound holds; known differences have no part in it."""
        return all(bound.holds for bound in self.bounds)

    @property
    def picture(self) -> Path:
        """Where the picture is."""
        return Path(f"{self.options.stem(self.name)}.png")

    def as_json(self) -> Json:
        """One object, with None in place of numbers that JSON cannot hold."""
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


def experiment(title: str, faults: Sequence[str] = ()) -> Callable[[Execute], Execute]:
    """Register a function under its own name."""

    def register(function: Execute) -> Execute:
        name = function.__name__
        EXPERIMENTS[name] = Experiment(name, title, function, tuple(faults))
        return function

    return register


def check(name: str, inject: str | None = None) -> Experiment:
    """The experiment `name`; raises ValueError where it is unknown or does not answer to the fault."""
    found: Experiment = choose(EXPERIMENTS, name, "experiment")
    if inject is not None and inject not in found.faults:
        has = ", ".join(found.faults) or "none"
        raise ValueError(f"experiment '{name}' answers to no fault '{inject}' (it has: {has})")
    return found


def execute(name: str, options: Options = Options()) -> Result:
    """Run one experiment; writes `NAME.json` and `NAME.png` into the folder of the options.

    A fast run writes `NAME.fast.*` and one with a fault `NAME.FAULT.*`, so that neither replaces a full result.

    Raises:
        ValueError: an unknown experiment, or a fault that it does not answer to.
    """
    found = check(name, options.inject)
    torch.manual_seed(options.seed)
    run = Run(options.fast, options.seed, options.stem(name))
    options.out.mkdir(parents=True, exist_ok=True)
    began, busy = time.perf_counter(), time.process_time()
    with injected(options.inject):
        picture = found.run(run)
    picture.suptitle(found.title, fontsize=11)
    picture.savefig(f"{run.stem}.png", dpi=110, bbox_inches="tight")
    seconds, cpu_seconds = round(time.perf_counter() - began, 1), round(time.process_time() - busy, 1)
    result = Result(found, options, run.bounds, run.differences, run.figures, seconds, cpu_seconds)
    part = Path(f"{run.stem}.json.part")
    part.write_text(json.dumps(result.as_json(), indent=1, allow_nan=False))
    os.replace(part, f"{run.stem}.json")
    return result


def finite(value: Json) -> Json:
    """The same with None in place of numbers that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
