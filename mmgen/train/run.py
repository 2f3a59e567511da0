"""A run in memory: the parts that the training loop uses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mmgen.config import Config
from mmgen.data.documents import Share, Step
from mmgen.data.loader import Corpus, steps
from mmgen.data.streams import StreamCorpus
from mmgen.image.patch import Patcher
from mmgen.train.checkpoint import read as checkpoint
from mmgen.train.checkpoint.write import Saver
from mmgen.train.engine import Engine
from mmgen.train.guard import Watchdog
from mmgen.train.log import Log
from mmgen.train.ranks import Ranks
from mmgen.train.report import Reporter, everywhere
from mmgen.train.state import NOISE, Progress, TrainerState
from mmgen.train.validate import Probe


@dataclass(frozen=True)
class Run:
    """The parts of a run. The counters of the run are in `progress`; the other parts hold their own state only."""

    engine: Engine
    corpus: Corpus | StreamCorpus
    patcher: Patcher
    progress: Progress
    log: Log
    reporter: Reporter
    saver: Saver
    probe: Probe
    watchdog: Watchdog

    @property
    def config(self) -> Config:
        """The settings of the run."""
        return self.engine.config

    @property
    def ranks(self) -> Ranks:
        """The processes of the run."""
        return self.engine.ranks

    def batches(self, resumed: Path | None) -> Iterator[Step]:
        """This rank's part of the remaining steps; with the random state of the checkpoint `resumed`, if given."""
        progress, ranks = self.progress, self.ranks
        last = self.config.train.steps
        stream = steps(self.corpus, progress.step, last, progress.position, Share(ranks.rank, ranks.world))
        return stream if resumed is None else self._with_random_state(stream, resumed)

    def _with_random_state(self, stream: Iterator[Step], folder: Path) -> Iterator[Step]:
        first = next(stream)  # before restoring, because starting the loader draws random numbers too
        checkpoint.restore_random(folder, self.ranks, self.progress.step)
        yield first
        yield from stream

    def save(self, must: bool) -> None:
        """Start a checkpoint of the step that is done; with `must`, wait until it is written.

        Raises:
            OSError: `must` is set and the checkpoint could not be written.
        """
        self.watchdog.phase("save", self.progress.step)
        self.saver.begin(self.state())
        if must or not self.config.train.save_async:
            self.saver.finish(must)

    def state(self) -> TrainerState:
        """The contents of trainer.json of the next checkpoint; every rank must call this."""
        progress = self.progress
        return TrainerState(
            step=progress.step,
            config=self.config.model_dump(mode="json"),
            position=everywhere(progress.position, self.ranks),
            optimizer_steps=progress.step - progress.skipped,
            left_out=tuple(sorted(progress.left_out)),
            train_seconds=progress.train_seconds,
            productive_seconds=progress.productive_seconds,
            born=progress.born,
            world=self.ranks.world,
            data=self.corpus.dataset.fingerprint,
            autoencoder=self.engine.model.autoencoder,
            positions=self.engine.model.positions,
            noise=NOISE,
        )
