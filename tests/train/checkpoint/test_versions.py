"""Runs and exports of earlier versions still load, continue and draw the same images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from mmgen.data.order import Cursors, Position
from mmgen.image.latent import AutoencoderFacts
from mmgen.model import MMGenModel
from mmgen.train.checkpoint.fragments import Store
from mmgen.train.checkpoint.read import load_model, read_trainer
from mmgen.train.state import TrainerState
from tests.conftest import pairs, run, write_tar
from tests.golden.record import FOLDER as GOLDEN
from tests.golden.record import environment

FIXTURES = Path(__file__).parents[2] / "fixtures" / "version1"
NAMES = ["mar", "latent"]


@pytest.fixture
def version1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files of version 1 as the working directory, because their paths are relative."""
    folder = tmp_path / "version1"
    shutil.copytree(FIXTURES, folder, symlinks=True)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_an_old_run_is_recognised_and_continues(version1: Path, capsys: pytest.CaptureFixture, name: str) -> None:
    code, out, err = run(capsys, "train", "--config", f"{name}.yaml")
    assert (code, out.split(":")[0]) == (0, f"{name} is trained"), err
    code, _, err = run(capsys, "train", "--config", f"{name}.yaml", "--train.steps", "3")
    assert code == 0, err
    assert f"{name}: steps 3 to 3" in err
    lines = [json.loads(line) for line in (version1 / name / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    old, new = (read_trainer(version1 / name / "checkpoints" / f"step-{step}") for step in (2, 3))
    assert (new.step, new.optimizer_steps, new.born, new.data) == (3, 3, old.born, old.data)
    assert new.train_seconds > old.train_seconds > 0


@pytest.mark.parametrize("name", NAMES)
def test_an_old_run_draws_the_same_image(version1: Path, capsys: pytest.CaptureFixture, name: str) -> None:
    code, out, err = run(capsys, "sample", "a picture", "--config", f"{name}.yaml", "--json")
    assert code == 0, err
    (drawn,) = json.loads(out)["samples"]
    expected = np.array(json.loads((FIXTURES / "expected.json").read_text())[name])
    same_machine = json.loads((GOLDEN / "digits.json").read_text())["environment"] == environment()
    difference = np.abs(np.asarray(Image.open(drawn["image"]), dtype=int) - expected).max()
    assert difference <= (0 if same_machine else 1)


@pytest.mark.parametrize("name", NAMES)
def test_old_runs_and_exports_have_the_averaged_weights(version1: Path, name: str) -> None:
    latest = version1 / name / "checkpoints" / "latest"
    store = Store(latest)
    averaged = {parameter: store.whole("ema", parameter) for parameter in store.names("ema")}
    assert any(not torch.equal(weight, store.whole("weight", parameter)) for parameter, weight in averaged.items())
    for model in (MMGenModel.from_pretrained(f"{name}_export"), load_model(latest)[0]):
        found = {parameter: weight.detach().flatten() for parameter, weight in model.named_parameters()}
        assert found.keys() == averaged.keys()
        assert all(torch.equal(weight, averaged[parameter]) for parameter, weight in found.items())


def test_a_trainer_state_is_restored_from_its_json() -> None:
    text = (FIXTURES / "mar" / "checkpoints" / "step-2" / "trainer.json").read_text()
    state = TrainerState.from_json(text)
    assert json.loads(state.to_json()) == {**json.loads(text), "positions": "shared", "noise": "loader"}
    assert (state.step, state.position, state.world) == (2, Position(**json.loads(text)["position"]), 1)
    streams = state.model_copy(update={"position": Cursors.of({"streams": [[0, 1, 2, 3, 4, 5, 6]]})})
    assert TrainerState.from_json(streams.to_json()) == streams
    measured = state.model_copy(update={"autoencoder": AutoencoderFacts("abc", [0.5], [2.0])})
    assert TrainerState.from_json(measured.to_json()) == measured


def test_autoencoder_facts_are_read_from_old_settings() -> None:
    state = TrainerState.from_json((FIXTURES / "latent" / "checkpoints" / "step-2" / "trainer.json").read_text())
    old = state.config["model"]["patcher"]["vae"]
    assert state.autoencoder == AutoencoderFacts(old["fingerprint"], old["mean"], old["std"])
    assert old["mean"] != [0.0, 0.0]


def test_missing_keys_have_defaults_and_unknown_ones_are_ignored() -> None:
    oldest = {"step": 3, "config": {}, "position": {"epoch": 1}, "optimizer_steps": 2, "unknown": [1]}
    state = TrainerState.from_json(json.dumps(oldest))
    assert state == TrainerState(step=3, config={}, position=Position(epoch=1), optimizer_steps=2)
    assert (state.left_out, state.train_seconds, state.born, state.data) == ((), 0.0, None, "")
    with pytest.raises(ValueError, match="optimizer_steps"):
        TrainerState.from_json(json.dumps({name: oldest[name] for name in ("step", "config", "position")}))


def settings_of(file: str, patcher: dict) -> str:
    """Write a copy of a configuration with other settings of its autoencoder; returns its path."""
    written = yaml.safe_load(Path(file).read_text())
    written["model"]["patcher"]["vae"] |= patcher
    Path("changed.yaml").write_text(yaml.safe_dump(written))
    return "changed.yaml"


def test_statistics_that_a_user_sets_are_compared_with_those_of_the_run(
    version1: Path, capsys: pytest.CaptureFixture
) -> None:
    """Earlier versions stored measured statistics as settings; a run with explicit settings equal to them continues."""
    facts = read_trainer(version1 / "latent" / "checkpoints" / "step-2").autoencoder
    assert facts is not None
    same = settings_of("latent.yaml", {"mean": facts.mean, "std": facts.std})
    code, _, err = run(capsys, "train", "--config", same, "--train.steps", "3")
    assert code == 0, err
    other = settings_of("latent.yaml", {"mean": facts.mean, "std": [1.0, 1.0]})
    code, _, err = run(capsys, "sample", "a", "--config", other)
    assert code == 2
    assert "belongs to another configuration: model.patcher.vae.std" in err


@pytest.mark.parametrize("words", [["data", "show", "1"], ["data", "check"], ["check", "parity"]])
def test_tools_use_the_latent_statistics_of_a_run(
    version1: Path, capsys: pytest.CaptureFixture, words: list[str]
) -> None:
    """The statistics were measured when the run started; neither the settings nor the autoencoder's files hold them."""
    code, _, err = run(capsys, *words, "--config", "latent.yaml", "--json")
    assert code == 0, err


def test_init_from_takes_over_the_latent_statistics(version1: Path, capsys: pytest.CaptureFixture) -> None:
    """A run that starts from weights normalises latents as the run of those weights did, whatever its images are."""
    shard = write_tar(version1 / "other.tar", pairs(6, seed=5))
    start = ["--train.init_from", "latent/checkpoints/step-2", "--data.train", shard, "--run.dir", "next"]
    code, _, err = run(capsys, "train", "--config", "latent.yaml", *start)
    assert code == 0, err
    old, new = (read_trainer(version1 / name / "checkpoints" / "step-2").autoencoder for name in ("latent", "next"))
    assert old == new


def test_the_section_of_another_objective_is_ignored(version1: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["sample", "a picture", "--config", "mar.yaml", "--json"]
    code, _, err = run(capsys, *words, "--objective.transfusion.cap", 0.3)
    assert code == 0, err
    code, _, err = run(capsys, *words, "--objective.mar.draws_per_patch", 7)
    assert code == 2
    assert "objective.mar.draws_per_patch" in err


def test_an_old_run_continues_with_its_positions_and_a_line_about_the_noise(
    version1: Path, capsys: pytest.CaptureFixture
) -> None:
    for steps, expected in (("3", True), ("4", False)):
        code, out, err = run(capsys, "train", "--config", "latent.yaml", "--train.steps", steps)
        assert code == 0, err
        assert ("is of an earlier version: the run continues with the noise of this one" in out) == expected
    state = read_trainer(version1 / "latent" / "checkpoints" / "step-4")
    assert (state.positions, state.noise) == ("shared", "philox4x32")
    code, _, err = run(capsys, "train", "--config", "latent.yaml", "--train.steps", "5", "--model.positions", "raster")
    assert code == 2
    assert "model.positions ('raster' here, 'shared' there)" in err
