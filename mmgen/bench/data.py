"""`mmgen bench data`: times reading against webdataset's pipeline, and measures packing, waiting and resuming.

All readers decode with the same functions and return the same token ids and patches, in one process and one thread, in
alternating rounds. Seconds are processor time, which other programs on the machine affect little. `pictures.py` adds
the comparison with the bare decoder, on photographs.
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

from mmgen.bench.pictures import PICTURES, PictureTimes, bench_pictures
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
"""Samples of the simulated index."""
POSITIONS = (10, 10**4, 10**6)
"""Numbers of documents after which a run resumes."""


Decoder = Callable[[dict[str, Any]], Any]
"""Decodes the members of a sample, bytes by extension, to its token ids and patches."""


def decoder(corpus: Corpus) -> Decoder:
    """Return the function that every reader uses to decode a captioned image."""
    data, patcher = corpus.config.data, corpus.config.model.patcher

    def decode(sample: dict[str, Any]) -> Any:
        image = next(sample[name] for name in IMAGES if name in sample)
        opened = open_image(image, data.limits, lambda image: draft(image, patcher.image_sizes))
        framed = fit(opened, patcher.channels, patcher.image_sizes, data.resize)
        caption = sample["txt"].decode() if "txt" in sample else json.loads(sample["json"])["caption"]
        return corpus.tokenizer.encode(caption), corpus.patcher.pixels(framed)

    return decode


def webdataset_pipeline(shards: list[str], decode: Decoder) -> Iterator[Any]:
    """Read shards with webdataset's reader, grouping and map."""
    import webdataset

    pipeline = webdataset.WebDataset(shards, shardshuffle=False, handler=webdataset.reraise_exception)
    return iter(pipeline.map(decode))


def spdl_pipeline(shards: list[str], decode: Decoder) -> Iterator[Any]:
    """Read shards with SPDL's tar reader and its pipeline, which decodes in one thread."""
    from spdl.io import iter_tarfile
    from spdl.pipeline import PipelineBuilder

    def samples() -> Iterator[dict[str, Any]]:
        for shard in shards:
            with open(shard, "rb") as file:
                split = ((*path.rsplit(".", 1), data) for path, data in iter_tarfile(file))
                for _, members in itertools.groupby(split, key=lambda member: member[0]):
                    yield {extension: data for _, extension, data in members}

    pipeline = (
        PipelineBuilder().add_source(samples()).pipe(decode, output_order="input").add_sink(16).build(num_threads=1)
    )
    with pipeline.auto_stop():
        yield from pipeline


def _timed(work: Callable[[], int]) -> float:
    """Return the samples per second of processor time of `work`, which returns the number of samples."""
    began = time.process_time()
    count = work()
    return count / (time.process_time() - began)


@dataclass(frozen=True)
class DataTimes:
    """Speed of reading and resuming, and how full rows are; a fill is the share of positions that are not padding."""

    rates: dict[str, float]
    """Samples per second of processor time, by reader.

    `webdataset`; `cold` (mmgen without its cache of decoded samples); `warm` (mmgen with all samples in the cache);
    `spdl` if it is installed.
    """
    wait_fraction: float
    """Share of a training step that waits for data."""
    packing_fill: float
    """Fill of the rows of the run."""
    packing_fill_greedy: float
    """Fill of greedy packing."""
    packing_fill_padded: float
    """Fill of one document per row, padded to the longest document."""
    packing_fill_long_rows: float
    """Fill of rows of a simulated index that are longer than 16 times the median document."""
    index_samples_per_second: float
    """Speed of writing the index of a shard."""
    resume_seconds: dict[str, float]
    """Seconds of resuming, by the number of documents before that point."""
    resume_from_files_seconds: float
    """Seconds from opening the shards of the run to its first row."""
    samples: int
    """Samples read per round."""
    lost: int
    """Samples that could not be read."""
    document_lengths: dict[str, int]
    """Positions of a document, by percentile."""
    rounds: int
    pictures: PictureTimes
    """The loader against the bare decoder."""

    def as_dict(self) -> dict[str, object]:
        """Return the times as `mmgen bench data --json` prints them."""
        rates, rest = self.rates, asdict(self)
        del rest["rates"]
        pictures = rest.pop("pictures")
        return {
            "cold_vs_webdataset": rates["cold"] / rates["webdataset"],
            "warm_vs_webdataset": rates["warm"] / rates["webdataset"],
            **({"cold_vs_spdl": rates["cold"] / rates["spdl"]} if "spdl" in rates else {}),
            **{f"{name}_samples_per_second": value for name, value in rates.items()},
            **rest,
            **pictures,
        }


def bench_data(config: Config, rounds: int, samples: int, report: Callable[[str], None]) -> DataTimes:
    """Time all readers in `rounds` alternating rounds of `samples` samples; rates are medians over the rounds.

    Raises:
        ValueError: the shards are not local.
        FileNotFoundError: shards or the tokenizer do not exist.
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

    def library_reader(pipeline: Callable[[list[str], Decoder], Iterator[Any]]) -> Callable[[], int]:
        return lambda: sum(1 for _ in itertools.islice(pipeline(shards, decoder(cold)), count))

    def mmgen_reader(corpus: Corpus) -> Callable[[], int]:
        return lambda: len([corpus.decoded(0, index) for index in order])

    mmgen_reader(warm)()
    readers = {"webdataset": library_reader(webdataset_pipeline), "cold": mmgen_reader(cold)}
    readers["warm"] = mmgen_reader(warm)
    if importlib.util.find_spec("spdl") and importlib.util.find_spec("spdl.io"):
        readers["spdl"] = library_reader(spdl_pipeline)
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for number in range(rounds):
        for name, work in readers.items():
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
        pictures=bench_pictures(config, rounds, report, min(samples, PICTURES)),
    )


def wait_fraction(config: Config, corpus: Corpus, rounds: int) -> float:
    """Return the share of a training step that waits for its batch, with one loader worker and a warm cache."""
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
        if number >= 2:  # the first steps include the start of the loader
            waits.append(waited)
            wholes.append(time.perf_counter() - began)
    corpus.config = config
    return sum(waits) / sum(wholes)


def _simulated(epochs: Any, indices: Any) -> Any:
    """Return document lengths of a simulated index: a caption of log-normal length and an image of 64 patches."""
    bits = (mix(indices.astype(np.uint64)) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    text = np.exp(3 + 0.7 * np.sqrt(2) * _inverse_erf(2 * bits - 1)).astype(np.int64)
    return 69 + np.minimum(text, 400), np.ones_like(indices), np.zeros_like(indices)


def _inverse_erf(x: Any) -> Any:
    return torch.erfinv(torch.from_numpy(x).clamp(-1 + 1e-12, 1 - 1e-12)).numpy()


def _plan() -> Plan:
    return Plan(Mixture([SIMULATED], [1.0], 0, 16), 4096, 2048, _simulated)


def simulated_fill() -> float:
    """Return the fill of packed rows that are longer than 16 times the median document."""
    source = _plan().rows(Position())
    rows = [next(source)[0] for _ in range(500)]
    return sum(document.length for row in rows for document in row) / (500 * 2048)


def resume_seconds(at: int) -> float:
    """Return the seconds to plan the first row after `at` documents of a simulated index of 10^8 samples."""
    times = []
    for _ in range(3):
        began = time.process_time()
        plan = _plan()
        next(plan.rows(Position(0, at // plan.window, 0)))
        times.append(time.process_time() - began)
    return min(times)


def reopened(config: Config, tokenizer: Tokenizer, facts: AutoencoderFacts | None) -> float:
    """Return the seconds from opening the shards of the run to its first row."""
    began = time.process_time()
    corpus = Corpus(config.data.train, tokenizer, config, facts)
    next(corpus.plan.rows(Position()))
    return time.process_time() - began
