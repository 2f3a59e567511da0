"""`mmgen bench data`: reading through the index against webdataset's own pipeline, packing, and the cost of resuming.

Both sides decode with the same functions and turn a sample into the same token ids and patch rows, in one process and
one thread, in alternating rounds; seconds are processor time, so that other programs on the machine disturb little.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from mmgen.config import Config
from mmgen.config_io import override
from mmgen.data.loader import Corpus, steps
from mmgen.data.order import Mixture, Plan, Position, mix
from mmgen.data.shards import store
from mmgen.data.shards.index import build
from mmgen.data.shards.pictures import open_image
from mmgen.data.shards.samples import IMAGES
from mmgen.data.tools.check import greedy_fill
from mmgen.image.latent import AutoencoderFacts
from mmgen.image.resize import draft, fit
from mmgen.model import build_model
from mmgen.sequence.batch import prepare
from mmgen.sequence.tokenizer import Tokenizer
from mmgen.train.checkpoint.read import known_facts
from mmgen.train.optimizer import build_optimizer

SIMULATED = 10**8
POSITIONS = (10, 10**4, 10**6)


Decoder = Callable[[dict[str, Any]], Any]
"""From the members of a sample, extension to bytes, to its token ids and patch rows."""


def decoder(corpus: Corpus) -> Decoder:
    """What every pipeline does with a captioned image."""
    data, patcher = corpus.config.data, corpus.config.model.patcher

    def rows(sample: dict[str, Any]) -> Any:
        image = next(sample[name] for name in IMAGES if name in sample)
        opened = open_image(image, data.limits, lambda image: draft(image, patcher.image_sizes))
        framed = fit(opened, patcher.channels, patcher.image_sizes, data.resize)
        caption = sample["txt"].decode() if "txt" in sample else json.loads(sample["json"])["caption"]
        return corpus.tokenizer.encode(caption), corpus.patcher.pixels(framed)

    return rows


def webdataset_pipeline(shards: list[str], rows: Decoder) -> Iterator[Any]:
    """webdataset's reader, grouping and map."""
    import webdataset

    pipeline = webdataset.WebDataset(shards, shardshuffle=False, handler=webdataset.reraise_exception)
    return iter(pipeline.map(rows))


def spdl_pipeline(shards: list[str], rows: Decoder) -> Iterator[Any]:
    """SPDL's tar reader, and its pipeline with one thread for the decoding."""
    from spdl.io import iter_tarfile
    from spdl.pipeline import PipelineBuilder

    def samples() -> Iterator[dict[str, Any]]:
        for shard in shards:
            with open(shard, "rb") as file:
                split = ((*path.rsplit(".", 1), data) for path, data in iter_tarfile(file))
                for _, members in itertools.groupby(split, key=lambda member: member[0]):
                    yield {extension: data for _, extension, data in members}

    pipeline = (
        PipelineBuilder().add_source(samples()).pipe(rows, output_order="input").add_sink(16).build(num_threads=1)
    )
    with pipeline.auto_stop():
        yield from pipeline


def _timed(work: Callable[[], int]) -> float:
    """Samples per second of processor time."""
    began = time.process_time()
    count = work()
    return count / (time.process_time() - began)


@dataclass(frozen=True)
class DataTimes:
    """What reading costs, and what packing wastes."""

    rates: dict[str, float]
    """Samples per second of processor time: `webdataset`, `cold` (nothing decoded is kept), `warm`, perhaps `spdl`."""
    wait_fraction: float
    packing_fill: float
    packing_fill_greedy: float
    packing_fill_padded: float
    packing_fill_long_rows: float
    index_samples_per_second: float
    resume_seconds: dict[str, float]
    """By the number of documents behind which a run resumes."""
    resume_from_files_seconds: float
    samples: int
    lost: int
    document_lengths: dict[str, int]
    """By percentile."""
    rounds: int

    def as_dict(self) -> dict[str, object]:
        """The times in `mmgen bench data --json`."""
        rates, rest = self.rates, asdict(self)
        del rest["rates"]
        return {
            "cold_vs_webdataset": rates["cold"] / rates["webdataset"],
            "warm_vs_webdataset": rates["warm"] / rates["webdataset"],
            **({"cold_vs_spdl": rates["cold"] / rates["spdl"]} if "spdl" in rates else {}),
            **{f"{name}_samples_per_second": value for name, value in rates.items()},
            **rest,
        }


def bench_data(config: Config, rounds: int, samples: int, report: Callable[[str], None]) -> DataTimes:
    """Medians over interleaved rounds.

    Raises:
        ValueError, FileNotFoundError: the configuration names shards or a tokenizer that do not exist.
    """
    torch.set_num_threads(1)
    config = override(config, {"data": {"workers": 0, "crop": "center"}})
    tokenizer = Tokenizer.of(config)
    facts = known_facts(config)
    warm = Corpus(config.data.train, tokenizer, config, facts)
    cold = Corpus(config.data.train, tokenizer, override(config, {"data": {"cache_bytes": 0}}), facts)
    shards, count = warm.dataset.shards, min(samples, len(warm.samples))
    order = [int(i) for i in cold.plan.mixture.documents(0, count)[1]]
    if store.is_url(shards[0]):
        raise ValueError("mmgen bench data reads local shards: give paths in data.train")

    def theirs(pipeline: Callable[[list[str], Decoder], Iterator[Any]]) -> Callable[[], int]:
        return lambda: sum(1 for _ in itertools.islice(pipeline(shards, decoder(cold)), count))

    def through(corpus: Corpus) -> Callable[[], int]:
        return lambda: len([corpus.decoded(0, index) for index in order])

    through(warm)()
    contestants = {"webdataset": theirs(webdataset_pipeline), "cold": through(cold), "warm": through(warm)}
    if importlib.util.find_spec("spdl") and importlib.util.find_spec("spdl.io"):
        contestants["spdl"] = theirs(spdl_pipeline)
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds):
        for name, work in contestants.items():
            rates[name].append(_timed(work))
        report(f"round {number + 1} of {rounds}: " + ", ".join(f"{name} {rates[name][-1]:.0f}/s" for name in rates))
    medians = {name: statistics.median(values) for name, values in rates.items()}

    lengths = [warm.length(0, index) for index in range(min(count, 2000))]
    began = time.process_time()
    build(shards[0], tokenizer, config.data)
    indexed = warm.dataset.index(0).count / (time.process_time() - began)
    positions = [0, 0]
    for row in warm.plan.epoch_rows(0):
        positions[0] += sum(document.length for document in row)
        positions[1] += config.data.row_length
    return DataTimes(
        rates=medians,
        wait_fraction=wait_fraction(config, warm, rounds),
        packing_fill=positions[0] / positions[1],
        packing_fill_greedy=greedy_fill(lengths, config.data.row_length),
        packing_fill_padded=float(np.mean(lengths) / max(lengths)),
        packing_fill_long_rows=simulated_fill(),
        index_samples_per_second=indexed,
        resume_seconds={str(at): resume_seconds(at) for at in POSITIONS},
        resume_from_files_seconds=reopened(config, tokenizer, facts),
        samples=count,
        lost=len(warm.bad),
        document_lengths={str(q): int(np.quantile(lengths, q / 100)) for q in (0, 10, 50, 90, 100)},
        rounds=rounds,
    )


def wait_fraction(config: Config, corpus: Corpus, rounds: int) -> float:
    """Share of a training step spent waiting for its batch, with the decoded samples warm and one loader process."""
    ahead = override(config, {"data": {"workers": 1}})
    corpus.config = ahead
    model = build_model(config, len(corpus.tokenizer))
    optimizer = build_optimizer(model, config.train)
    stream = steps(corpus, 0, rounds + 2, Position())
    waits, wholes = [], []
    for number in range(rounds + 2):
        began = time.perf_counter()
        step = next(stream)
        waited = time.perf_counter() - began
        for raw in step.micro:
            losses = model(prepare(raw, corpus.patcher))
            (losses.text / max(1, losses.text_count) + losses.image / max(1, losses.image_count)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if number >= 2:  # the loader starts up during the first ones
            waits.append(waited)
            wholes.append(time.perf_counter() - began)
    corpus.config = config
    return sum(waits) / sum(wholes)


def _simulated(epochs: Any, indices: Any) -> Any:
    """Lengths of a made-up index: a log-normal caption and an image of 64 patches."""
    bits = (mix(indices.astype(np.uint64)) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    text = np.exp(3 + 0.7 * np.sqrt(2) * _inverse_erf(2 * bits - 1)).astype(np.int64)
    return 69 + np.minimum(text, 400), np.ones_like(indices), np.zeros_like(indices)


def _inverse_erf(x: Any) -> Any:
    return torch.erfinv(torch.from_numpy(x).clamp(-1 + 1e-12, 1 - 1e-12)).numpy()


def _plan() -> Plan:
    return Plan(Mixture([SIMULATED], [1.0], 0, 16), 4096, 2048, _simulated)


def simulated_fill() -> float:
    """Fill where a row is more than 16 median documents long."""
    source = _plan().rows(Position())
    rows = [next(source)[0] for _ in range(500)]
    return sum(document.length for row in rows for document in row) / (500 * 2048)


def resume_seconds(at: int) -> float:
    """From nothing to the first row behind `at` documents, over a simulated index of 10^8 samples."""
    times = []
    for _ in range(3):
        began = time.process_time()
        plan = _plan()
        next(plan.rows(Position(0, at // plan.window, 0)))
        times.append(time.process_time() - began)
    return min(times)


def reopened(config: Config, tokenizer: Tokenizer, facts: AutoencoderFacts | None) -> float:
    """From the files of the run's own shards to its first row."""
    began = time.process_time()
    corpus = Corpus(config.data.train, tokenizer, config, facts)
    next(corpus.plan.rows(Position()))
    return time.process_time() - began
