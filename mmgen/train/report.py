"""Reports the steps of a run: metrics, bad samples and spikes of the loss."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from mmgen.config import Config, ImageLoss
from mmgen.data.documents import Step
from mmgen.data.loader import Corpus
from mmgen.data.order import Cursors, Position
from mmgen.data.shards.samples import worst_shards
from mmgen.data.streams import StreamCorpus
from mmgen.train import metrics
from mmgen.train.engine import Engine
from mmgen.train.guard import Spikes
from mmgen.train.log import Log
from mmgen.train.ranks import Ranks
from mmgen.train.state import Progress


class Totals(NamedTuple):
    """Counts of a step, summed over all ranks in one message of fixed size."""

    texts: float
    """Text targets."""
    image_terms: float
    """Terms of the image loss: learned patches or learned images."""
    positions: float
    images: float
    bad: float
    """Samples that could not be read."""
    signals: float
    """Received signals that ask for a save."""
    unwritten: float
    """Ranks whose part of a save is not written."""
    failed: float
    """Ranks whose part of a save could not be written."""


def count(step: Step, image_loss: ImageLoss) -> tuple[int, int]:
    """(text targets, terms of the image loss) of this process's micro-batches."""
    return sum(len(batch.label_at_L) for batch in step.micro), sum(b.image_terms(image_loss) for b in step.micro)


class Clock:
    """Measures the parts of a step's time, in seconds."""

    def __init__(self) -> None:
        self._started, self._worked = time.monotonic(), time.thread_time()
        self.waited = 0.0
        """Waiting for data."""
        self.spent = 0.0
        """The whole step."""
        self.busy = 0.0
        """Waiting for data and the work of this process, without waiting for other ranks."""

    def data(self) -> None:
        """The data of the step has arrived."""
        self.waited = time.monotonic() - self._started

    def stop(self) -> None:
        """The step is done."""
        self.spent = time.monotonic() - self._started
        self.busy = self.waited + time.thread_time() - self._worked


@dataclass(frozen=True)
class Outcome:
    """The results of a step that is done."""

    step: int
    data: Step
    totals: Totals
    values: dict[str, float]
    """Losses and gradient norm."""
    lr: float
    by_time: Tensor
    """Sums and counts [2, BUCKETS] of this rank's losses per range of t."""
    clock: Clock
    before: Position | Cursors
    """This rank's position in the data before the step."""


class Reporter:
    """Reports the steps of a run; every rank must call it in the same way."""

    def __init__(self, engine: Engine, corpus: Corpus | StreamCorpus, log: Log) -> None:
        self.engine, self.corpus, self.log = engine, corpus, log
        self._bad = log.quarantine(corpus.bad)
        self._spikes = Spikes(engine.config.train.spike_factor)
        self._meter = metrics.Meter(engine, log.first)

    def step(self, outcome: Outcome) -> None:
        """Report bad samples and a spike of the loss, if the step has any, and count the step."""
        if outcome.totals.bad:
            self._report_bad(outcome.data)
        loss = outcome.values["loss"]
        median = self._spikes.seen(loss) if math.isfinite(loss) else None
        if median is not None:
            where = {"from": outcome.before.as_dict(), "to": outcome.data.after.as_dict()}
            self.log.event("spikes.jsonl", {"step": outcome.step, "loss": loss, "median": median, **where})
            self.log.print(
                f"step {outcome.step}: the loss {loss:.4g} is a spike, the median is {median:.4g} (see spikes.jsonl)"
            )
        self.log.advance(outcome.step)

    def _report_bad(self, data: Step) -> None:
        ranks = self.engine.ranks
        for bad in ranks.gather_objects(data.bad):
            self._bad = max(self._bad, self.log.quarantine(bad))
        known = self.corpus.known(everywhere(data.after, ranks))
        refuse_bad_data(int(ranks.maxima([self._bad])[0]), known, self.engine.config)

    def record(self, outcome: Outcome, progress: Progress) -> None:
        """Write the metrics of a logged step."""
        ranks, totals, clock = self.engine.ranks, outcome.totals, outcome.clock
        memory, wait = ranks.maxima([metrics.memory(self.engine.device), clock.waited])
        rank, over = metrics.slowest(ranks, clock.busy)
        slow = {"slowest_rank": float(rank), "slowest_over_median": over} if ranks.world > 1 else {}
        self.log.record(outcome.step, {
            **outcome.values, "lr": outcome.lr, **self.engine.norms(outcome.values["grad_norm"]),
            **metrics.time_losses(ranks.total(outcome.by_time)),
            "tokens_per_s": totals.positions / clock.spent, "images_per_s": totals.images / clock.spent,
            "data_wait": wait / clock.spent, **self._meter.read(outcome.step, outcome.data, clock.spent - wait),
            "memory_bytes": memory, "goodput": progress.goodput, "skipped": float(progress.skipped), **slow,
        })  # fmt: skip


def everywhere(position: Position | Cursors, ranks: Ranks) -> Position | Cursors:
    """The position of all ranks in the data; with `data.streams`, it is gathered from the streams of each rank."""
    if isinstance(position, Position):
        return position
    return Cursors.union(ranks.gather_objects(position))


def refuse_bad_data(bad: int, total: int, config: Config) -> None:
    """Raise ValueError if more of `total` samples are unreadable than `data.max_bad_fraction` allows."""
    if bad > config.data.max_bad_fraction * total:
        raise ValueError(
            f"{bad} of {total} samples cannot be read, more than data.max_bad_fraction {config.data.max_bad_fraction}: "
            f"see {config.run.dir / 'quarantine.jsonl'} (most in {worst_shards(config.run.dir / 'quarantine.jsonl')})"
        )
