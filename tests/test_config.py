"""Settings of an objective are in its own section, and keys of earlier versions are still read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from mmgen.config import FLAT, Config
from mmgen.config_io import load, override
from mmgen.model import MMGenConfig
from tests.conftest import run

OLD = {"kind": "mar", "order": "raster", "head": {"width": 16}, "draws_per_patch": 2, "lambda_image": 1.0}
NEW = {"kind": "mar", "mar": {"order": "raster", "head": {"width": 16}, "draws_per_patch": 2}, "lambda_image": 1.0}


def written(tmp_path: Path, **sections: object) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(sections))
    return file


def test_flat_keys_of_the_chosen_kind_are_read_with_a_note(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    old = load(written(tmp_path, objective=OLD))
    note = capsys.readouterr().err
    assert "objective.order is now objective.mar.order" in note
    assert "objective.draws_per_patch is now objective.mar.draws_per_patch" in note
    assert old == load(written(tmp_path, objective=NEW))
    assert capsys.readouterr().err == ""
    assert load(written(tmp_path, objective={"cap": 0.2, "context": "noisy"})).objective.transfusion.cap == 0.2


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"order": "raster"}, r"objective.order is a setting of 'mar', but objective.kind is 'transfusion'"),
        ({"kind": "mar", "cap": 0.1}, r"write it as objective.transfusion.cap"),
        ({"kind": "mar", "context": "noisy"}, r"write it as objective.transfusion.context"),
        ({"kind": "mar", "mar": {"ordr": "raster"}}, r"unknown key 'objective.mar.ordr', did you mean"),
        ({"transfusion": {"cap": 2}}, r"objective.transfusion.cap"),
        ({"mar": {"head": {"depth": 0}}}, r"objective.mar.head.depth"),
        ({"kind": "mar", "order": "raster", "mar": None}, r"objective.mar must be a mapping"),
        (
            {"kind": "mar", "order": "random", "mar": {"order": "raster"}},
            r"are the same setting: keep objective.mar.order",
        ),
    ],
)
def test_settings_of_another_objective_are_refused(tmp_path: Path, objective: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(written(tmp_path, objective=objective))


def test_one_line_switches_the_objective(tmp_path: Path) -> None:
    """The section of the other kind is checked and ignored, so that the arms of an ablation can share a base."""
    shared = {"transfusion": {"cap": 0.3}, "mar": {"order": "random"}}
    for kind in ("transfusion", "mar"):
        assert load(written(tmp_path, objective={"kind": kind, **shared})).objective.mar.order == "random"
    with pytest.raises(ValueError, match="objective.mar.order"):
        load(written(tmp_path, objective={"kind": "transfusion", "mar": {"order": "spiral"}}))


def test_all_settings_that_earlier_versions_stored_are_read() -> None:
    """Earlier versions stored the keys of both kinds without sections, and null for an absent context."""
    stored = {
        "kind": "mar", "order": "raster", "head": {"kind": "flow", "depth": 2, "width": 64}, "draws_per_patch": 2,
        "mask_ratio": {"mean": 1.0, "std": 0.25, "low": 0.7}, "context": None, "cap": 0.2,
    }  # fmt: skip
    assert set(FLAT) < set(stored)
    found = Config.model_validate({"objective": stored}).objective
    assert (found.mar.order, found.mar.head.width, found.transfusion.cap) == ("raster", 64, 0.2)
    assert found.transfusion.context == "capped"
    assert Config.model_validate({"objective": {**stored, "kind": "transfusion"}}).objective.transfusion.cap == 0.2


def test_a_flat_override_changes_one_field_of_its_section() -> None:
    config = override(Config(), {"objective": NEW})
    changed = override(config, {"objective": {"head": {"depth": 5}}})
    assert (changed.objective.mar.head.depth, changed.objective.mar.head.width) == (5, 16)
    assert changed.objective.mar.order == "raster"


def test_facts_in_settings_of_earlier_versions_are_ignored(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    vae = {"name": "vae", "fingerprint": "0123", "mean": [0.0] * 4, "std": [1.0] * 4}
    patcher = {"kind": "vae", "patch_size": 2, "vae": vae}
    found = load(written(tmp_path, model={"patcher": patcher})).model.patcher.vae
    assert (found.mean, found.std) == (None, None)
    assert "now kept with the model" in capsys.readouterr().err
    del vae["fingerprint"]
    found = load(written(tmp_path, model={"patcher": patcher})).model.patcher.vae
    assert found.std == [1.0] * 4, "statistics that a user sets remain settings"


def test_flat_flags_are_read(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = written(tmp_path, objective=NEW, data={"tokenizer": str(tmp_path / "none.json")})
    words = ("train", "--config", file, "--dry-run", "--json", "--objective.order", "random")
    code, out, err = run(capsys, *words, "--objective.head.depth", 2)
    assert code == 0, err
    mar = json.loads(out)["config"]["objective"]["mar"]
    assert (mar["order"], mar["head"]["depth"], mar["head"]["width"]) == ("random", 2, 16)
    code, _, err = run(capsys, "train", "--config", file, "--dry-run", "--objective.cap", 0.1)
    assert code == 2
    assert "write it as objective.transfusion.cap" in err
    _, out, _ = run(capsys, "settings", "objective")
    assert "objective.mar.order" in out
    assert "objective.order" not in out


def test_the_timestep_distribution_is_read_under_its_earlier_name(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    old = load(written(tmp_path, objective={"time": {"sampler": "logit_normal", "mu": 0.5}}))
    assert "objective.time.sampler is now objective.time.distribution" in capsys.readouterr().err
    assert old == load(written(tmp_path, objective={"time": {"distribution": "logit_normal", "mu": 0.5}}))
    assert capsys.readouterr().err == ""
    assert old.objective.time.distribution == "logit_normal"
    changed = override(old, {"objective": {"time": {"sampler": "uniform"}}}).objective.time
    assert (changed.distribution, changed.mu) == ("uniform", 0.5)
    with pytest.raises(ValueError, match="are the same setting: keep objective.time.distribution"):
        load(written(tmp_path, objective={"time": {"sampler": "uniform", "distribution": "uniform"}}))
    with pytest.raises(ValueError, match="unknown objective.time.distribution 'normal'"):
        load(written(tmp_path, objective={"time": {"sampler": "normal"}}))
    file = written(tmp_path, data={"tokenizer": str(tmp_path / "none.json")})
    words = ("train", "--config", file, "--dry-run", "--json", "--objective.time.sampler", "logit_normal")
    code, out, err = run(capsys, *words)
    assert code == 0, err
    assert json.loads(out)["config"]["objective"]["time"]["distribution"] == "logit_normal"


def test_stored_models_with_the_earlier_name_are_read() -> None:
    stored = json.loads(Path("tests/fixtures/version1/mar/checkpoints/step-2/config.json").read_text())
    assert stored["objective"]["time"]["sampler"] == "logit_normal"
    assert MMGenConfig(objective=stored["objective"]).objective["time"]["distribution"] == "logit_normal"
