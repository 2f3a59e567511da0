"""Uses of checkpoints: exports, `train.init_from`, EMA of any width; and which checkpoints are kept."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mmgen.cli.export import export as export_command
from mmgen.config import Config
from mmgen.config_io import override
from mmgen.generate import Decoder, Request
from mmgen.model import MMGenModel
from mmgen.sequence.tokenizer import Tokenizer
from mmgen.train.checkpoint import posthoc
from mmgen.train.checkpoint import read as checkpoint
from mmgen.train.checkpoint.export import export
from mmgen.train.loop import train
from mmgen.train.optimizer import AveragingAdamW, power, power_exponent


@pytest.mark.parametrize("average", ["ema", "weight", "ema_0.5", "power_0.1", "power:0.12"])
def test_transformers_reads_an_export(config: Config, tmp_path: Path, average: str) -> None:
    config = override(config, {"train": {"ema_more": [0.5], "ema_power": [0.1, 0.2], "keep_every": 3}})
    train(config)
    found = checkpoint.latest(config.run.dir)
    out = tmp_path / "out"
    export(config.run.dir, found, out, average)
    model = MMGenModel.from_pretrained(out)
    if ":" not in average:
        expected = checkpoint.load_model(found, average)[0]
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), expected.parameters(), strict=True))
    assert json.loads((out / "model_index.json").read_text())["_class_name"] == "MMGenPipeline"
    tokenizer = AutoTokenizer.from_pretrained(out)
    ours = Tokenizer.of(config)
    assert tokenizer("picture 1", add_special_tokens=False)["input_ids"] == ours.encode("picture 1")
    assert tokenizer.eos_token_id == ours.eos


@pytest.mark.parametrize("positions", ["shared", "axial"])
def test_the_language_model_alone_writes_the_same_text(config: Config, tmp_path: Path, positions: str) -> None:
    config = override(config, {"model": {"positions": positions}})
    train(config)
    found = checkpoint.latest(config.run.dir)
    export(config.run.dir, found, tmp_path / "out", "ema", text_only=True)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = Decoder(*checkpoint.load_model(found), config.sample.model_copy(update={"temperature": 0.0}))
    for prompt in ("picture 12", "picture", "a 3"):
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
        written = plain.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        wanted = ours.generate([Request([prompt], "text", max_new_tokens=8)])[0].text
        assert wanted
        assert tokenizer.decode(written, skip_special_tokens=True) == wanted


def test_export_command(config: Config, tmp_path: Path) -> None:
    train(config)
    assert export_command(config=config, out=tmp_path / "out") == 0
    with pytest.raises(ValueError, match="no weights 'ema_0.3'.*it has ema, weight"):
        export_command(config=override(config, {"sample": {"weights": "ema_0.3"}}), out=tmp_path / "no")


def test_a_new_run_starts_from_the_weights_of_another(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train(config)
    found = checkpoint.latest(config.run.dir)
    other = {"run": {"dir": str(tmp_path / "next")}, "train": {"init_from": str(found), "lr": 1e-12, "steps": 1}}
    assert train(override(config, other)) == 0
    weights = checkpoint.load_model(tmp_path / "next" / "checkpoints" / "latest", "weight")[0]
    expected = checkpoint.load_model(found)[0]
    for p, q in zip(weights.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    larger = {"model": {"patcher": {"patch_size": 1, "channels": 3}}, "run": {"dir": str(tmp_path / "larger")}}
    assert train(override(config, {**other, **larger})) == 0
    out = capsys.readouterr().out
    assert re.search(r"these start fresh, because the checkpoint has none of that name and size: objective\.", out)


def test_checkpoints_of_keep_every_are_kept(config: Config) -> None:
    train(override(config, {"train": {"steps": 8, "save_every": 1, "keep_last": 1, "keep_every": 3}}))
    names = {path.name for path in checkpoint.candidates(config.run.dir)}
    assert names == {"step-3", "step-6", "step-8"}


def test_power_function_ema_of_any_width_after_training() -> None:
    """Compare with the integral of the profile, and compute a width that was not tracked from two that were."""
    for width in (0.05, 0.1, 0.25):
        gamma = power_exponent(width)
        tau = np.linspace(0, 1, 200_001)[1:]
        profile = tau**gamma / (tau**gamma).sum()
        mean = (profile * tau).sum()
        assert ((profile * tau**2).sum() - mean**2) ** 0.5 == pytest.approx(width, rel=1e-3)
    path = np.cumsum(np.random.default_rng(0).standard_normal((2000, 8)), axis=0)
    tracked, snapshots = {}, []
    for n, value in enumerate(path, 1):
        for width in (0.05, 0.1, 0.08):
            keep = power(width)(n)
            tracked[width] = value if n == 1 else keep * tracked[width] + (1 - keep) * value
        if n % 250 == 0:
            snapshots += [(n, width, tracked[width]) for width in (0.05, 0.1)]
    weights = posthoc.solve(np.array([s for s, _, _ in snapshots]), np.array([w for _, w, _ in snapshots]), 2000, 0.08)
    made = sum(weight * value for weight, (_, _, value) in zip(weights, snapshots, strict=True))
    assert np.abs(made - tracked[0.08]).max() < 0.02 * np.abs(tracked[0.08]).max()
    assert weights.sum() == pytest.approx(1, abs=0.01)


def test_several_emas_follow_their_recursions() -> None:
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(5))
    decays = {"ema": lambda n: 0.9, "power_0.1": power(0.1)}
    optimizer = AveragingAdamW([p], decays, lr=0.1)
    expected: dict[str, torch.Tensor] = {}
    for n in range(1, 20):
        (p * torch.randn(5)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, decay in decays.items():
            now = p.detach().double()
            expected[name] = now if n == 1 else decay(n) * expected[name] + (1 - decay(n)) * now
    for name, value in expected.items():
        torch.testing.assert_close(optimizer.state[p][name].double(), value, rtol=1e-5, atol=1e-6)
