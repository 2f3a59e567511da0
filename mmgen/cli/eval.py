"""The command `mmgen eval`: scores a trained run."""

from __future__ import annotations

from typing import Annotated

from mmgen.cli.flags import Json, Uses
from mmgen.cli.run import load_run
from mmgen.cli.show import log, show
from mmgen.config import Config
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
    from mmgen.evaluate.report import evaluate as score  # after the line, because it imports torch
    from mmgen.train.checkpoint.trained import is_checkpoint

    trained = load_run(config)
    if is_checkpoint(config.run.dir):
        config = override(config, {"run": {"dir": config.run.dir.resolve().parents[1]}})
    for key, shards in (
        ("data.train", config.data.train),
        ("eval.test", config.eval.test),
        ("eval.judge", config.eval.judge),
    ):
        if not shards:
            raise ValueError(f"{key} is empty: the task '{config.eval.task}' needs labelled shards there")
    show(score(trained.model, trained.tokenizer, config, trained.trainer, log).flat(), as_json)
    log(f"report: {config.run.dir / 'report.json'}   pictures: {config.run.dir / 'samples' / 'evaluation.png'}")
    return 0
