"""The commands `mmgen data ...`: index, check and show shards, and propose image sizes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from mmgen.cli.flags import DataSettings, Json, at_least
from mmgen.cli.show import log, print_json, show
from mmgen.config import Config, SourceConfig

if TYPE_CHECKING:
    from mmgen.sequence.tokenizer import Tokenizer

Shards = Annotated[str, Parameter(help="Shard files; by default those of data.train and data.val.")]
Workers = Annotated[int, Parameter(help="Worker processes; 0 starts one per core.", validator=at_least(0))]


def index(*shards: Shards, config: DataSettings = Config(), workers: Workers = 0, as_json: Json = False) -> int:
    """Write the index of every shard that has none.

    The same command continues an index that was stopped.

    Example:
        mmgen data index --config configs/scenes.yaml
    """
    from mmgen.data.tools.check import index_shards

    show(index_shards(*_chosen(shards, config), config, workers or os.cpu_count() or 1, log).as_dict(), as_json)
    return 0


def buckets(
    *shards: Shards,
    config: DataSettings = Config(),
    n: Annotated[int, Parameter(help="Largest number of sizes.", validator=at_least(1))] = 5,
    pixels: Annotated[str, Parameter(help="Height and width; no size has a larger area.")] = "256x256",
    as_json: Json = False,
) -> int:
    """Propose image sizes that crop least from the images of shards.

    The result is a value for `model.patcher.image_sizes`. The shards must have an index.

    Example:
        mmgen data buckets --config configs/scenes.yaml --n 3 --pixels 40x40
    """
    from mmgen.data.tools.sizes import propose

    sides = pixels.split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise ValueError(f"--pixels: '{pixels}' is not a height and a width such as 256x256")
    show(propose(*_chosen(shards, config), config, n, (int(sides[0]), int(sides[1]))).as_dict(), as_json)
    return 0


def check(
    *shards: Shards,
    config: DataSettings = Config(),
    decode: Annotated[bool, Parameter(help="Also decode every image.")] = True,
    world: Annotated[
        int, Parameter(help="Processes for which the balance of shares is checked.", validator=at_least(1))
    ] = 8,
    inject: Annotated[
        str | None,
        Parameter(help="Break the order on purpose: per_rank_seed, dropped_carry, off_by_one or duplicated_shard."),
    ] = None,
    workers: Workers = 0,
    as_json: Json = False,
) -> int:
    """Check shards and the order of their samples; code 1 if a check fails.

    Example:
        mmgen data check --config configs/scenes.yaml
    """
    from mmgen.data.tools import check as whole
    from mmgen.data.tools.check_streams import check_streams
    from mmgen.train.checkpoint.read import known_facts

    patterns, tokenizer = _chosen(shards, config)
    facts = known_facts(config)
    options = whole.CheckOptions(log, decode, inject, workers or os.cpu_count() or 1, world, facts)
    report: whole.Report
    if config.data.streams and not shards:
        report = check_streams(tokenizer, config, options)
    else:
        report = whole.check(patterns, tokenizer, config, options)
    for line in [] if as_json else report.findings():
        print(line)
    show(report.as_dict() if as_json else report.figures(), as_json)
    return 0 if report.holds else 1


def show_rows(
    count: Annotated[int, Parameter(help="Number of rows.", validator=at_least(1))] = 4,
    *shards: Shards,
    config: DataSettings = Config(),
    out: Annotated[Path, Parameter(help="Folder for the pictures of rows.")] = Path("runs/data"),
    as_json: Json = False,
) -> int:
    """Draw packed rows as the model reads them: mask, text and images.

    Example:
        mmgen data show 2 --config configs/scenes.yaml
    """
    from mmgen.data.loader import Corpus
    from mmgen.data.tools.show import show as draw_rows
    from mmgen.train.checkpoint.read import known_facts

    patterns, tokenizer = _chosen(shards, config)
    rows = draw_rows(Corpus(patterns, tokenizer, config, known_facts(config)), count, out)
    if as_json:
        print_json([row.as_dict() for row in rows])
    for row in [] if as_json else rows:
        print(f"{row.picture}: {row.positions} positions of {', '.join(row.samples)}\n    {row.row}")
    return 0


def _chosen(shards: tuple[str, ...], config: Config) -> tuple[list[str | SourceConfig], Tokenizer]:
    """The shard patterns and the tokenizer of a `data` command."""
    from mmgen.sequence.tokenizer import Tokenizer

    patterns: list[str | SourceConfig] = [*shards] or [*config.data.train, *config.data.val]
    if not patterns:
        raise ValueError("no shards are given: name .tar files, or give --config FILE with data.train")
    return patterns, Tokenizer.of(config)
