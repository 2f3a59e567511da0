"""The command `mmgen eval`: scores a trained run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from mmgen.cli.flags import Json, Uses
from mmgen.cli.run import load_run
from mmgen.cli.show import log, print_table, show
from mmgen.config import CAPTIONS, Config
from mmgen.config_io import override

EvalSettings = Annotated[Config, Uses(("run", "sample", "eval"), trained=True)]


def evaluate(*, config: EvalSettings = Config(), as_json: Json = False) -> int:
    """Score a trained run and write its report.json.

    The run folder also gets samples/evaluation.png, a sheet of the first pictures that were drawn. The first argument
    may be a run folder, a checkpoint, whose run folder gets the report, or an exported folder, which gets it itself.

    Example:
        mmgen eval --config configs/scenes.yaml --eval.samples 200
    """
    log(f"loading the model of {config.run.dir}")
    from mmgen.evaluate.captioned import evaluate_captioned  # after the line, because it imports torch
    from mmgen.evaluate.report import evaluate as evaluate_labelled
    from mmgen.evaluate.summary import table
    from mmgen.train.checkpoint.trained import is_checkpoint

    trained = load_run(config)
    if is_checkpoint(config.run.dir):
        config = override(config, {"run": {"dir": config.run.dir.resolve().parents[1]}})
    for key, shards in needed(config).items():
        if not shards:
            raise ValueError(f"{key} is empty: the task '{config.eval.task}' needs shards there")
    plain = config.eval.task == CAPTIONS
    score = evaluate_captioned if plain else evaluate_labelled
    found = score(trained.model, trained.tokenizer, config, trained.trainer, log).flat()
    if plain and not as_json:
        print_table(table(found))
    else:
        show(found, as_json)
    log(f"report: {config.run.dir / 'report.json'}   pictures: {config.run.dir / 'samples' / 'evaluation.png'}")
    return 0


def needed(config: Config) -> dict[str, Sequence[object]]:
    """The settings that must name shards."""
    shards: dict[str, Sequence[object]] = {"data.train": config.data.train, "eval.test": config.eval.test}
    return shards if config.eval.task == CAPTIONS else shards | {"eval.judge": config.eval.judge}
