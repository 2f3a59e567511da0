"""The report of the parity check for one variant of the objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mmgen.objective.replay import TOLERANCE
from mmgen.parity.record import Fed, Identity


@dataclass(frozen=True)
class Difference:
    """A value that differs between sampling and training."""

    where: str
    """Request, image, step and position."""
    what: str
    """The value and the size of the difference."""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass
class Largest:
    """The largest differences, relative to the largest magnitude of the compared tensor."""

    inputs: float = 0.0
    hidden: float = 0.0
    patches: float = 0.0


@dataclass
class Report:
    """The number of compared positions of a variant, the largest differences, and the first one above the tolerance."""

    variant: str
    positions: int = 0
    largest: Largest = field(default_factory=Largest)
    first: Difference | None = None

    @property
    def holds(self) -> bool:
        """Whether all differences are within the tolerance."""
        return self.first is None

    def same(self, where: str, sampled: Sequence[Fed], trained: Mapping[Identity, Fed]) -> None:
        """Compare the positions that were fed in sampling with the same positions in training."""
        for fed in sampled:
            self._position(f"{where}, {fed.identity}", fed, trained[fed.identity])

    def patches(self, where: str, sampled: Tensor, drawn: Tensor) -> None:
        """Compare sampled patches with those of the second drawing."""
        difference = _difference(sampled, drawn)
        self.largest.patches = max(self.largest.patches, difference)
        self._bound(where, "patches", difference)

    def calls(self, where: str, made: int, compared: int) -> None:
        """Compare the number of backbone calls for an image with the number that the settings ask for."""
        if made != compared:
            self._note(where, f"the decoder made {made} backbone calls, and the settings explain {compared} of them")

    def _position(self, where: str, fed: Fed, trained: Fed) -> None:
        self.positions += 1
        if fed.position != trained.position:
            self._note(where, f"position is {fed.position}, in training {trained.position}")
        if fed.sees != trained.sees:
            others = sorted(map(str, fed.sees ^ trained.sees))
            self._note(where, f"attends to other positions than in training ({len(others)}, such as {others[0]})")
        inputs = _difference(fed.inputs_D, trained.inputs_D)
        hidden = _difference(fed.hidden_D, trained.hidden_D)
        self.largest.inputs = max(self.largest.inputs, inputs)
        self.largest.hidden = max(self.largest.hidden, hidden)
        self._bound(where, "inputs", inputs)
        self._bound(where, "hidden", hidden)

    def _bound(self, where: str, what: str, difference: float) -> None:
        if not difference <= TOLERANCE:  # true for NaN as well
            self._note(where, f"{what} differ by {difference:.2g}")

    def _note(self, where: str, what: str) -> None:
        if self.first is None:
            self.first = Difference(where, what)

    def as_dict(self) -> dict[str, Any]:
        """Return the variant as `mmgen check parity --json` prints it."""
        return {
            "variant": self.variant,
            "holds": self.holds,
            "positions": self.positions,
            "largest_difference_inputs": self.largest.inputs,
            "largest_difference_hidden": self.largest.hidden,
            "largest_difference_patches": self.largest.patches,
            "first": None if self.first is None else str(self.first),
        }


def _difference(one: Tensor, other: Tensor) -> float:
    """Return the largest difference of two tensors, relative to the largest magnitude of the second one."""
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-12))
