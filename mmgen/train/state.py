"""The counters of a run in memory, and the contents of a checkpoint's trainer.json."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, model_validator

from mmgen.config import Positions
from mmgen.data.order import Cursors, Position
from mmgen.image.latent import AutoencoderFacts

NOISE = "philox4x32"
"""How this version draws the noise of training: on the device, by `mmgen.flow.philox`."""
Settings = dict[str, Any]
"""A configuration as it was written to JSON, possibly by an older version."""


def _position(stored: Any) -> Any:
    if not isinstance(stored, dict):
        return stored
    return Cursors.of(stored) if "streams" in stored else Position(**stored)


class TrainerState(BaseModel):
    """The contents of trainer.json. Keys that older versions did not write have defaults; unknown keys are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    step: int
    """Steps that are done, including skipped ones."""
    config: Settings
    position: Annotated[
        Position | Cursors, BeforeValidator(_position), PlainSerializer(lambda position: position.as_dict())
    ]
    """The position of all ranks in the data."""
    optimizer_steps: int
    left_out: tuple[int, ...] = ()
    """Steps that a rollback decided to skip."""
    train_seconds: float = 0.0
    productive_seconds: float = 0.0
    """Seconds of steps that were taken and not repeated."""
    born: float | None = None
    """Unix time of the run's first start."""
    world: int = 1
    data: str = ""
    """Fingerprint of the training shards; empty if it was not recorded."""
    autoencoder: AutoencoderFacts | None = None
    """Facts of the run's autoencoder; None for a run on pixels."""
    positions: Positions = "shared"
    """Positions of the patches of an image; versions that recorded nothing used `shared`."""
    noise: str = "loader"
    """How the noise of training is drawn; versions before `NOISE` drew it in the loader and recorded nothing."""

    @model_validator(mode="before")
    @classmethod
    def _facts_among_settings(cls, stored: Any) -> Any:
        """Older versions stored the facts of the autoencoder in the settings."""
        if isinstance(stored, dict) and stored.get("autoencoder") is None and isinstance(stored.get("config"), dict):
            patcher = stored["config"].get("model", {}).get("patcher", {})
            return {**stored, "autoencoder": AutoencoderFacts.of_settings(patcher)}
        return stored

    @classmethod
    def from_json(cls, text: str) -> TrainerState:
        """Read the text that `to_json` of this or an older version wrote.

        Raises:
            ValueError: the text is not JSON, or a key is missing or has a wrong type.
        """
        return cls.model_validate(json.loads(text))

    def to_json(self) -> str:
        """The text of trainer.json."""
        unused = {"autoencoder"} if self.autoencoder is None else None
        return json.dumps(self.model_dump(mode="json", exclude=unused), indent=1)


@dataclass
class Progress:
    """The counters of a run in this process."""

    position: Position | Cursors
    """The position of this rank in the data."""
    step: int = 0
    skipped: int = 0
    """Steps that the optimiser did not take."""
    left_out: set[int] = field(default_factory=set)
    """Steps that a rollback decided to skip."""
    productive_seconds: float = 0.0
    born: float = field(default_factory=time.time)
    seconds_before: float = 0.0
    """Seconds of training before the checkpoint that this process continued from."""
    since: float = field(default_factory=time.monotonic)

    @property
    def train_seconds(self) -> float:
        """Seconds of training since the first start, over all restarts of the run."""
        return self.seconds_before + time.monotonic() - self.since

    @property
    def goodput(self) -> float:
        """Fraction of the time since the run's first start that was spent on steps which were kept."""
        return self.productive_seconds / max(time.time() - self.born, 1e-9)

    def advance(self, after: Position | Cursors, taken: bool, seconds: float) -> None:
        """Count a step that is done."""
        self.step, self.position = self.step + 1, after
        self.skipped += not taken
        self.productive_seconds += seconds if taken else 0.0

    def resume(self, state: TrainerState) -> None:
        """Continue the counts of a checkpoint; steps to be skipped are added to those of the checkpoint."""
        self.step, self.position = state.step, state.position
        self.skipped = state.step - state.optimizer_steps
        self.left_out |= set(state.left_out)
        self.productive_seconds = state.productive_seconds
        self.born = self.born if state.born is None else state.born
        self.seconds_before, self.since = state.train_seconds, time.monotonic()
