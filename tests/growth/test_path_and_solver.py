"""Adding a path or a solver: one class or function, and one line of the registry."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mmgen.config import Config
from mmgen.config_io import override
from mmgen.flow import PATHS, SOLVERS, Path
from mmgen.flow.solvers import SolverKind
from mmgen.generate.decoder import Decoder, Request
from mmgen.train.checkpoint.read import load_model
from mmgen.train.loop import train


class QuarterCircle(Path):
    """alpha = sin(pi t / 2), sigma = cos(pi t / 2)."""

    def alpha(self, t: Tensor) -> Tensor:
        return (torch.pi / 2 * t).sin()

    def sigma(self, t: Tensor) -> Tensor:
        return (torch.pi / 2 * t).cos()

    def alpha_slope(self, t: Tensor) -> Tensor:
        return torch.pi / 2 * self.sigma(t)

    def sigma_slope(self, t: Tensor) -> Tensor:
        return -torch.pi / 2 * self.alpha(t)

    def time_of(self, log_snr: Tensor) -> Tensor:
        return (log_snr / 2).exp().atan() * 2 / torch.pi


def last_first(z: Tensor, times: Tensor, *, path: Path | None = None):
    """Euler steps whose slope is the mean of two evaluations at the same time: Euler's method at twice the cost."""
    for t, following in pairwise(times):
        one = yield z, t
        two = yield z, t
        z = z + (following - t) * (one + two) / 2
    return z


@pytest.mark.parametrize("objective", ["transfusion", "mar"])
def test_a_path_trains_and_draws(config: Config, monkeypatch: pytest.MonkeyPatch, objective: str) -> None:
    monkeypatch.setitem(PATHS, "quarter_circle", QuarterCircle)
    config = override(config, {"objective": {"kind": objective, "path": "quarter_circle"}, "train": {"steps": 2}})
    assert train(config) == 0
    lines = [json.loads(line) for line in (config.run.dir / "metrics.jsonl").read_text().splitlines()]
    assert all(line["loss/image"] > 0 for line in lines if "loss/image" in line)
    model, tokenizer = load_model(config.run.dir / "checkpoints" / "latest")
    assert isinstance(model.objective.flow.path_of(4), QuarterCircle)
    assert Decoder(model, tokenizer, config.sample).generate([Request(["ab"], "image", 1)])[0].images


def test_a_solver_draws(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The added solver, which is equivalent to Euler's method, draws the same image."""
    monkeypatch.setitem(SOLVERS, "twice", SolverKind(last_first, "v"))
    assert train(override(config, {"train": {"steps": 1}})) == 0
    model, tokenizer = load_model(config.run.dir / "checkpoints" / "latest")
    images = []
    for name in ("twice", "euler"):
        sample = override(config, {"sample": {"solver": name}}).sample
        (result,) = Decoder(model, tokenizer, sample).generate([Request(["ab"], "image", 1)])
        images.append(result.images[0].tobytes())
    assert images[0] == images[1]
