"""Global steps of indexed shards: rows are planned, decoded and collated in loader processes ahead of the model."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mmgen.config import Config
from mmgen.data.dataset import Dataset, Samples, shown_counts
from mmgen.data.documents import Decoded, Documents, Share, Step
from mmgen.data.order import Cursors, Mixture, Plan, PlannedDocument, PlannedRow, Position
from mmgen.data.shards import store
from mmgen.data.shards.pictures import STORED
from mmgen.data.shards.samples import BadSample, Sample
from mmgen.data.shards.store import Patterns
from mmgen.image.latent import AutoencoderFacts, LatentPatcher
from mmgen.sequence.tokenizer import Tokenizer

Form = Literal[
    "as written", "caption first", "image first", "caption dropped", "images dropped", "alone",
    "caption first, image copied", "caption dropped, image copied",
]  # fmt: skip
FORMS: tuple[Form, ...] = get_args(Form)
FETCHERS = 16
"""Samples of a remote store that are fetched concurrently."""


class Corpus(Documents):
    """The documents of a list of shards, read through their indexes, and the plan of their order.

    With `cut_overlong`, documents that are longer than a row are planned with the length of a row instead of refused;
    `mmgen data check` uses it to report all of them.

    Raises:
        ValueError: a document is longer than a row, or shards hold arrays that `model.patcher.kind` does not accept.
    """

    def __init__(
        self,
        patterns: Patterns,
        tokenizer: Tokenizer,
        config: Config,
        autoencoder: AutoencoderFacts | None = None,
        cut_overlong: bool = False,
    ) -> None:
        super().__init__(tokenizer, config, autoencoder)
        self.dataset = Dataset(patterns, tokenizer, config, cut_overlong)
        self._check_kind()
        if not cut_overlong:
            self.dataset.refuse_overlong()
        self.bad, self.samples = self.dataset.bad, Samples(self.dataset)
        self.start = Position()
        mixture = Mixture(self.dataset.counts, self.dataset.weights, config.run.seed, config.data.block)
        self.plan = Plan(mixture, config.data.window, config.data.row_length, self.dataset.lengths)
        self._cache: dict[int, Decoded] = {}
        self._cached_bytes = 0
        self._fetched: dict[int, Sample | BadSample] = {}
        self._remote = [store.is_url(shard) for shard in self.dataset.shards]
        self._pool: tuple[int, ThreadPoolExecutor] | None = None

    def _check_kind(self) -> None:
        """Raise ValueError if shards hold arrays that the patcher does not accept or that another autoencoder made."""
        patcher, dataset = self.config.model.patcher, self.dataset
        for kind, makers in dataset.stored.items():
            shard, plural = next(iter(makers.values())), STORED[kind].plural
            if kind != self.patcher.stored:
                raise ValueError(
                    f"{shard} holds {plural}, but model.patcher.kind is {patcher.kind}: {STORED[kind].remedy}name "
                    f"shards of {STORED[self.patcher.stored].plural if self.patcher.stored else 'images'}"
                )
            if dataset.pictures:
                raise ValueError(
                    f"{shard} holds {plural}, but {dataset.pictures} holds images: name shards of one kind "
                    "(`python -m data_prep.latents` makes latents of images)"
                )
            if self.config.data.crop == "random":
                raise ValueError(f"data.crop is random, but stored {plural} have one crop: set it to center")
        if isinstance(self.patcher, LatentPatcher):
            for fingerprint, shard in dataset.stored.get("latent", {}).items():
                if fingerprint and fingerprint != self.patcher.fingerprint:
                    raise ValueError(
                        f"the latents of {shard} come from another autoencoder (fingerprint {fingerprint}) than "
                        f"'{patcher.vae.name}' (fingerprint {self.patcher.fingerprint}): set model.patcher.vae.name to "
                        "the autoencoder that made them, or compute them again with `python -m data_prep.latents`"
                    )

    @property
    def unencoded(self) -> bool:
        return not self.dataset.stored

    @property
    def description(self) -> str:
        """The number of samples, for the first line of a run."""
        left_out = self.dataset.unwanted
        described = f"{len(self.samples)} samples" + (f" ({shown_counts(left_out)} left out)" if left_out else "")
        cut, longest = self.dataset.shortened()
        if cut:
            row = self.config.data.row_length
            described += f" (the text of {cut} is cut: the longest needs data.row_length {longest}, and it is {row})"
        return described

    def known(self, position: Position | Cursors) -> int:
        """Number of samples that the share of bad samples is relative to."""
        return len(self.samples) + len(self.bad)

    def form(self, epoch: int, index: int) -> Form:
        """The order of text and images of this sample in this epoch."""
        facts = self.dataset.gather(np.array([index]))
        return FORMS[int(self.dataset.forms(np.array([epoch]), facts)[0])]

    def length(self, epoch: int, index: int) -> int:
        """Number of positions of the sample's document in this epoch."""
        return int(self.dataset.lengths(np.array([epoch]), np.array([index]))[0][0])

    def has_image(self, index: int) -> bool:
        """Whether the sample holds an image."""
        return bool(self.dataset.gather(np.array([index])).images[0])

    def segments(self, planned: PlannedDocument) -> Decoded:
        return self.decoded(planned.epoch, planned.index)

    def name(self, planned: PlannedDocument) -> tuple[str, str]:
        return self.dataset.name(planned.index)

    def decoded(self, epoch: int, index: int) -> Decoded:
        """A decoded sample, from the cache where possible; raises `BadSample`.

        The first samples are cached up to `data.cache_bytes`, so that a small corpus is decoded once.
        """
        if index in self._cache:
            return self._cache[index]
        sample = self._fetched.pop(index, None) or self.dataset.sample(index)
        if isinstance(sample, BadSample):
            raise sample
        decoded = self.decode(sample, self.dataset.grids_of(index), epoch)
        size = decoded.nbytes
        if self.config.data.crop == "center" and self._cached_bytes + size <= self.config.data.cache_bytes:
            self._cache[index] = decoded
            self._cached_bytes += size
        return decoded

    def step(self, number: int, rows: Sequence[PlannedRow], after: Position, share: Share = Share()) -> Step:
        """Decode this process's share of a global step."""
        ends = list(accumulate(sum(document.images for document in row) for row in rows))
        self._prefetch([document.index for row in rows[share.rank :: share.world] for document in row])
        own = range(share.rank, len(rows), share.world)
        ordinals = [np.arange(ends[r - 1] if r else 0, ends[r]) for r in own]
        even = iter(self.quantiles(number, np.concatenate([np.arange(0), *ordinals]), ends[-1]))
        written = [self.written(rows[r], list(islice(even, len(n)))) for r, n in zip(own, ordinals, strict=True)]
        return Step.of_rows(number, self.micro_batches(written, share.world), after, written)

    def steps(self, first: int, last: int, start: Position, share: Share) -> Iterator[Step]:
        stream = _Stream(self, first, last, start, share)
        return ahead(stream, self.config.data.workers, torch.cuda.is_available())

    def first_step(self, share: Share = Share()) -> Step:
        (planned,) = planned_steps(self.plan, self.config.train.batch_rows, 0, 1, self.start)
        return self.step(planned.number, planned.rows, planned.after, share)

    def _prefetch(self, indices: Sequence[int]) -> None:
        """Fetch samples of remote shards concurrently, because each request waits for the network."""
        self._fetched.clear()
        if not any(self._remote):
            return
        far = [i for i in indices if i not in self._cache and self._remote[self.dataset.where(i)[0]]]
        if self._pool is None or self._pool[0] != os.getpid():  # threads do not survive a fork
            self._pool = os.getpid(), ThreadPoolExecutor(FETCHERS)
        for index, sample in zip(far, self._pool[1].map(self._fetch, far), strict=True):
            self._fetched[index] = sample

    def _fetch(self, index: int) -> Sample | BadSample:
        try:
            return self.dataset.sample(index)
        except BadSample as error:
            return error


@dataclass(frozen=True)
class PlannedStep:
    """A global step before its samples are decoded."""

    number: int
    rows: list[PlannedRow]
    after: Position
    """Position of the run in its data after this step."""


def planned_steps(plan: Plan, batch_rows: int, first: int, last: int, start: Position) -> Iterator[PlannedStep]:
    """Global steps [first, last) from position `start`, before their samples are decoded."""
    source = plan.rows(start)
    for number in range(first, last):
        rows = [next(source) for _ in range(batch_rows)]
        yield PlannedStep(number, [row for row, _ in rows], rows[-1][1])


class _Stream(IterableDataset[Step]):
    """Steps from a position; worker w of W makes steps w, w + W, ..."""

    def __init__(self, corpus: Corpus, first: int, last: int, start: Position, share: Share) -> None:
        self.corpus, self.first, self.last, self.start, self.share = corpus, first, last, start, share

    def __iter__(self) -> Iterator[Step]:
        worker = get_worker_info()
        lane, lanes = (worker.id, worker.num_workers) if worker else (0, 1)
        rows = self.corpus.config.train.batch_rows
        for step in planned_steps(self.corpus.plan, rows, self.first, self.last, self.start):
            if (step.number - self.first) % lanes == lane:
                yield self.corpus.step(step.number, step.rows, step.after, self.share)


def steps(corpus: Documents, first: int, last: int, start: Any, share: Share = Share()) -> Iterator[Step]:
    """Global steps [first, last) from position `start`, decoded ahead in `data.workers` processes."""
    return corpus.steps(first, last, start, share)


def ahead(source: IterableDataset[Any], workers: int, pinned: bool) -> Iterator[Any]:
    """The items of `source`, prefetched by `workers` processes; with 0 workers, this process makes them."""
    begin = partial(_begin_worker, os.getpid())
    options: dict[str, Any] = {"prefetch_factor": 4, "worker_init_fn": begin} if workers else {}
    return iter(DataLoader(source, batch_size=None, num_workers=workers, pin_memory=pinned, **options))


def _begin_worker(parent: int, worker: int) -> None:
    """Ignore signals in a worker: they reach the whole process group, and the training process ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


@atexit.register
def _end_workers() -> None:
    """End the workers of a loader that is still alive when an uncaught exception ends the process.

    multiprocessing sends them SIGTERM, which they ignore, and then waits. This function is registered later and
    therefore runs earlier.
    """
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _end_with(parent: int) -> None:
    """End a worker whose training process was killed; otherwise it waits without end to deliver its last step."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
