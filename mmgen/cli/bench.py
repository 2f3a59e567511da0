"""The commands `mmgen bench ...`: speed of a training step, generation, data, solvers and a whole run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from mmgen.cli.flags import Json, Rounds, Settings, at_least
from mmgen.cli.show import log, show
from mmgen.config import Config


def step(*, config: Settings = Config(), rounds: Rounds = 30, as_json: Json = False) -> int:
    """Time a training step against a bare loop of the same products.

    Both are timed in turns, with and without torch.compile.

    Example:
        mmgen bench step --config configs/scenes.yaml --rounds 5
    """
    from mmgen.bench.step import bench_step

    show(bench_step(config, rounds, log).as_dict(), as_json)
    return 0


def generation(*, config: Settings = Config(), rounds: Rounds = 3, as_json: Json = False) -> int:
    """Time drawing images with and without the key-value cache.

    Each objective draws images of 64 and of 256 patches.

    Example:
        mmgen bench generation --config configs/scenes.yaml --rounds 1
    """
    from mmgen.bench import generation as bench

    show(bench.as_json(bench.bench_generation(config, rounds)), as_json)
    return 0


def data(
    *,
    config: Settings = Config(),
    rounds: Rounds = 5,
    samples: Annotated[int, Parameter(help="Samples that each repetition reads.", validator=at_least(1))] = 2000,
    as_json: Json = False,
) -> int:
    """Time reading shards against webdataset; packing, resuming.

    The waiting time of a training step for its batch is measured too.

    Example:
        mmgen bench data --config configs/scenes.yaml --samples 500
    """
    from mmgen.bench.data import bench_data

    show(bench_data(config, rounds, samples, log).as_dict(), as_json)
    return 0


def samplers(*, rounds: Rounds = 15, as_json: Json = False) -> int:
    """Time what each solver adds to the network that it calls.

    The network is artificial and takes a millisecond or more per call.

    Example:
        mmgen bench samplers --rounds 3
    """
    from mmgen.bench.samplers import bench_samplers

    show(bench_samplers(rounds).as_dict(), as_json)
    return 0


def speedrun(
    *,
    config: Settings = Config(),
    seeds: Annotated[int, Parameter(help="Number of runs, with seeds 0, 1, ...", validator=at_least(1))] = 3,
    target: Annotated[float, Parameter(help="Accuracy that both scores must reach.")] = 0.95,
    threads: Annotated[int, Parameter(help="Threads of the training process.", validator=at_least(1))] = 2,
    out: Annotated[Path, Parameter(help="Folder of the runs; complete runs are not repeated.")] = Path("runs/speedrun"),
    as_json: Json = False,
) -> int:
    """Time training until pictures and captions are right.

    Checkpoints of each run are scored on the validation shards; the time of scoring is not counted.

    Example:
        mmgen bench speedrun --config configs/scenes.yaml --seeds 1
    """
    from mmgen.bench import speedrun as bench

    options = bench.Options(range(seeds), target, threads, out)
    show(bench.as_json(bench.bench_speedrun(config, options, log), options), as_json)
    return 0
