"""The metrics of a step, and the trackers that receive them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mmgen.config import Config
from mmgen.config_io import override
from mmgen.data.documents import Share
from mmgen.data.loader import Corpus
from mmgen.sequence.tokenizer import Tokenizer
from mmgen.train import loop
from mmgen.train import metrics as meter
from mmgen.train.flops import Arithmetic
from mmgen.train.loop import train
from mmgen.train.ranks import Ranks
from tests.conftest import pairs, ready, write_tar
from tests.train.test_loop import losses, metrics


def test_trackers_receive_metrics(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[object] = []

    class Tracker:
        def log(self, values: dict, step: int) -> None:
            received.append((step, values["loss"]))

        def finish(self) -> None:
            received.append("finished")

    module = type(sys)("wandb")
    module.init = lambda **settings: received.append(settings["name"]) or Tracker()
    monkeypatch.setitem(sys.modules, "wandb", module)
    run = override(config, {"train": {"trackers": ["wandb"], "steps": 2}, "data": {"val": []}})
    train(run)
    assert received == ["run", *[(step, loss) for step, loss, _ in losses(run)], "finished"]
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ValueError, match="trackio, which is not installed: pip install trackio"):
        train(override(config, {"train": {"trackers": ["trackio"], "steps": 3}}))


def test_metrics_of_a_step(config: Config) -> None:
    train(override(config, {"train": {"peak_tflops": 1.0, "val_every": 3}}))
    line = [line for line in metrics(config) if "loss" in line][-1]
    parts = [value for name, value in line.items() if name.startswith("grad_norm/")]
    assert sum(part**2 for part in parts) ** 0.5 == pytest.approx(line["grad_norm"], rel=1e-4)
    assert len(parts) == 3
    assert 0 < line["goodput"] <= 1
    assert line["memory_bytes"] > 10**6
    validations = [line for line in metrics(config) if "val_loss/text" in line]
    assert [line["step"] for line in validations] == [3, 6]
    assert any(name.startswith("val_loss/image_t") for name in validations[0])


OBJECTIVES = [
    {},
    *({"kind": "mar", "mar": {"order": order}} for order in ("raster", "random", "masked")),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("content", ["text", "pictures", "nothing"])
def test_every_parameter_takes_part(config: Config, tmp_path: Path, objective: dict, content: str) -> None:
    """Every parameter has a gradient, whatever a rank's rows contain; else ZeRO-1 and 2 abort, and ZeRO-3 hangs."""
    kept = {"text": ".json", "pictures": ".png", "nothing": ""}[content]
    members = {name: data for name, data in pairs(8).items() if name.endswith(kept)}
    shard = str(write_tar(tmp_path / "some.tar", members))
    data = {"train": [shard], "captionless": "keep"}
    config = override(config, {"data": data, "objective": objective, "train": {"batch_rows": 1}})
    tokenizer = Tokenizer.of(config)
    model = loop.build_engine(config, len(tokenizer), Ranks()).model
    rank, world = (7, 8) if content == "nothing" else (0, 1)
    corpus = Corpus(config.data.train, tokenizer, config)
    (raw,) = corpus.first_step(Share(rank, world)).micro
    found = model(ready(corpus, raw))
    # In rows of pictures only, BOI and EOS are text targets.
    assert (found.text_count > 0, found.image_count > 0) == (content != "nothing", content == "pictures")
    (found.text + found.image).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_losses_per_range_of_t_add_up_to_the_image_loss(config: Config) -> None:
    tokenizer = Tokenizer.of(config)
    corpus = Corpus(config.data.train, tokenizer, config)
    model = loop.build_engine(config, len(tokenizer), Ranks()).model
    (raw,) = corpus.first_step().micro
    batch = ready(corpus, raw)
    found = model(batch)
    times = meter.by_time(batch, found)
    assert float(times[0].sum()) == pytest.approx(float(found.image), rel=1e-5)
    assert int(times[1].sum()) == found.image_count


def test_mfu_is_the_counted_flops_over_time_and_peak(config: Config) -> None:
    config = override(config, {"train": {"peak_tflops": 2.0}})
    tokenizer = Tokenizer.of(config)
    engine = loop.build_engine(config, len(tokenizer), Ranks())
    step = Corpus(config.data.train, tokenizer, config).first_step()
    flops = Arithmetic(engine.model).of(step.micro)
    assert flops > 10**6
    assert meter.Meter(engine, 0).read(1, step, working=4.0)["mfu"] == pytest.approx(flops / 4.0 / 2e12)
