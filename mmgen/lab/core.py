"""What an experiment is: a function that records figures and bounds, and draws a picture."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmgen.config import choose
from mmgen.lab.faults import injected

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class Run:
    """One execution of an experiment: its size and seed, and what it found."""

    fast: bool = False
    seed: int = 0
    stem: Path = Path("runs/lab/experiment")
    """Where its files go, without their endings."""
    figures: dict[str, Any] = field(default_factory=dict)
    bounds: list[dict[str, Any]] = field(default_factory=list)

    def pick(self, full: int, fast: int) -> int:
        """A size: of the full experiment or of the fast one."""
        return fast if self.fast else full

    def note(self, **figures: Any) -> None:
        """Record figures that no bound judges."""
        self.figures.update(figures)

    def bound(
        self, figure: str, value: float, *, at_least: float = -math.inf, at_most: float = math.inf, why: str = ""
    ) -> None:
        """Record a figure and judge it; `why` explains a bound that is known not to hold."""
        holds = bool(at_least <= value <= at_most)
        limits = {"at_least": at_least, "at_most": at_most}
        record = {"figure": figure, "value": value, "holds": holds}
        record |= {name: limit for name, limit in limits.items() if math.isfinite(limit)}
        self.figures[figure] = value
        self.bounds.append(record | ({"why": why} if why and not holds else {}))

    @property
    def generator(self) -> torch.Generator:
        """A fresh generator with the run's seed."""
        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True)
class Experiment:
    """A named experiment."""

    name: str
    title: str
    run: Callable[[Run], Figure]
    faults: tuple[str, ...] = ()
    """Faults that must turn it red."""


EXPERIMENTS: dict[str, Experiment] = {}


def experiment(title: str, faults: Sequence[str] = ()) -> Callable[[Callable[[Run], Figure]], Callable[[Run], Figure]]:
    """Register a function under its own name."""

    def register(function: Callable[[Run], Figure]) -> Callable[[Run], Figure]:
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


def execute(
    name: str, fast: bool = False, seed: int = 0, out: Path = Path("runs/lab"), inject: str | None = None
) -> dict[str, Any]:
    """Run one experiment; writes `out/NAME.json` and `out/NAME.png` and returns what the JSON holds.

    A fast run writes `NAME.fast.*` and one with a fault `NAME.FAULT.*`, so that neither replaces a full result.

    Raises:
        ValueError: an unknown experiment, or a fault that it does not answer to.
    """
    found = check(name, inject)
    stem = ".".join([name, *(["fast"] if fast else []), *([inject] if inject else [])])
    torch.manual_seed(seed)
    run = Run(fast, seed, out / stem)
    out.mkdir(parents=True, exist_ok=True)
    began, busy = time.perf_counter(), time.process_time()
    with injected(inject):
        picture = found.run(run)
    picture.suptitle(found.title, fontsize=11)
    picture.savefig(out / f"{stem}.png", dpi=110, bbox_inches="tight")
    result = {
        "name": name,
        "title": found.title,
        "holds": all(bound["holds"] for bound in run.bounds),
        "bounds": run.bounds,
        "figures": run.figures,
        "fast": fast,
        "seed": seed,
        "inject": inject,
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(time.process_time() - busy, 1),
        "picture": str(out / f"{stem}.png"),
    }
    result = {key: finite(value) for key, value in result.items()}
    part = out / f"{stem}.json.part"
    part.write_text(json.dumps(result, indent=1, allow_nan=False))
    os.replace(part, out / f"{stem}.json")
    return result


def finite(value: Any) -> Any:
    """The same with None in place of numbers that JSON cannot hold."""
    if isinstance(value, dict):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
