"""`mmgen bench`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from mmgen.cli.flags import Json, Rounds, Settings
from mmgen.cli.show import log, show
from mmgen.config import Config


def step(*, config: Settings = Config(), rounds: Rounds = 30, as_json: Json = False) -> int:
    """Time a training step over a bare loop with the same matrix products, eager and compiled."""
    from mmgen.bench.step import bench_step

    show(bench_step(config, rounds, log).as_dict(), as_json)
    return 0


def generation(*, config: Settings = Config(), rounds: Rounds = 3, as_json: Json = False) -> int:
    """Time drawing with the cache against full recomputation, for each objective, at 64 and 256 patches."""
    from mmgen.bench import generation as bench

    show(bench.as_json(bench.bench_generation(config, rounds)), as_json)
    return 0


def data(
    *,
    config: Settings = Config(),
    rounds: Rounds = 5,
    samples: Annotated[int, Parameter(help="Samples read in each.")] = 2000,
    as_json: Json = False,
) -> int:
    """Time reading against webdataset's pipeline, and packing, waiting and resuming."""
    from mmgen.bench.data import bench_data

    show(bench_data(config, rounds, samples, log).as_dict(), as_json)
    return 0


def samplers(*, rounds: Rounds = 15, as_json: Json = False) -> int:
    """Time what each sampler adds to the calls of a network of a millisecond or more."""
    from mmgen.bench.samplers import bench_samplers

    show(bench_samplers(rounds).as_dict(), as_json)
    return 0
