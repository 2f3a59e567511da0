"""The command as a user types it: overrides, typos, bad input, exit codes, JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from mmgen.config import Config
from mmgen.config_io import field_names, load, override
from tests.conftest import run


@pytest.fixture
def file(config: Config, tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


def test_dry_run_prints_the_plan_and_touches_nothing(file: Path, config: Config, capsys: pytest.CaptureFixture) -> None:
    code, out, _ = run(capsys, "train", "--config", file, "--train.steps", 7, "--model.backbone.extra.rope_theta", 5.0,
                       "--dry-run", "--json")  # fmt: skip
    plan = json.loads(out)
    assert code == 0
    assert plan["tokens_per_step"] == 4 * 48
    assert plan["tokens_total"] == 7 * 4 * 48
    assert plan["config"]["train"]["steps"] == 7
    assert plan["config"]["data"]["row_length"] == 48, "the file's values stay where nothing overrides them"
    assert plan["parameters"] > 1000
    assert plan["memory_state_bytes"] == 20 * plan["parameters"]
    assert not config.run.dir.exists()


def test_dry_run_prints_a_table_for_people(file: Path, capsys: pytest.CaptureFixture) -> None:
    code, out, error = run(capsys, "train", "--config", file, "--dry-run")
    assert (code, error) == (0, "")
    assert "tokens_per_step" in out
    assert "kind transfusion" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--train.stpes", "5"], "--train.stpes. Did you mean --train.steps?"),
        (["trian"], "train"),
        (["train", "--train.steps", "-1"], "train.steps"),
        (["train", "--train.steps", "many"], "train.steps"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml cannot be read"),
        (["train"], "no tokenizer at tokenizer.json"),
        (["sample"], "the prompt is empty"),
        (["sample", " "], "the prompt is empty"),
        (["caption"], "no image is given"),
        (["caption", "pyproject.toml"], "pyproject.toml cannot be read as an image"),
        (["eval"], "holds no checkpoint"),
        (["train", "--objective.prediction", "w"], "prediction"),
        (["sample", "a", "--sample.guidance-interval", "0.9", "0.1"], "sample.guidance_interval must rise"),
        (["train", "--model.patcher.patch_size", "5"], "not divisible by patch_size 5"),
    ],
)
def test_usage_errors(capsys: pytest.CaptureFixture, words: list[str], message: str) -> None:
    code, out, err = run(capsys, *words)
    assert code == 2
    assert message in err.replace("\n", " ")
    assert "Traceback" not in err
    assert not out


def test_typos_in_yaml_name_file_key_and_nearest(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "typo.yaml"
    path.write_text("objective: {predictoin: x}\n")
    code, _, err = run(capsys, "train", "--config", path)
    assert code == 2
    assert "typo.yaml: unknown key 'objective.predictoin', did you mean 'objective.prediction'?" in err
    for text, message in (("- 1\n", "not a mapping"), ("a: [", "not valid YAML"), ("train: {lr: fast}", "train.lr")):
        path.write_text(text)
        code, _, err = run(capsys, "train", "--config", path)
        assert (code, message in err) == (2, True), err


def test_missing_shard(file: Path, capsys: pytest.CaptureFixture) -> None:
    code, _, err = run(capsys, "train", "--config", file, "--data.train", "gone-{000..002}.tar")
    assert code == 2
    assert "shard gone-000.tar does not exist" in err


def test_train_sample_caption(file: Path, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(capsys, "train", "--config", file)[0] == 0
    code, out, _ = run(
        capsys, "sample", "--config", file, "picture 1", "picture 2", "--out", tmp_path / "out", "--json"
    )
    drawn = json.loads(out)["samples"]
    assert code == 0
    assert [item["prompt"] for item in drawn] == ["picture 1", "picture 2"]
    assert Image.open(drawn[0]["image"]).size == (4, 4)
    code, out, _ = run(capsys, "caption", "--config", file, drawn[0]["image"], "--json")
    assert code == 0
    assert isinstance(json.loads(out)["captions"][0]["caption"], str)
    code, _, err = run(capsys, "sample", "--config", file, "x", "--objective.prediction", "x")
    assert code == 2
    assert "objective.prediction ('x' here, 'v' there)" in err


def test_overrides_keep_the_rest(config: Config) -> None:
    changed = override(config, {"train": {"lr": 0.5}})
    assert changed.train.lr == 0.5
    assert changed.train.steps == config.train.steps
    with pytest.raises(ValueError, match="did you mean 'train.lr'"):
        override(config, {"train": {"lrr": 0.5}})


NAMES = """run.dir run.seed data.train data.val data.row_length train.steps train.batch_rows train.log_every train.save_every
train.zero_stage train.lr train.warmup_steps model.backbone model.patcher.kind objective.kind objective.prediction
objective.loss_space objective.lambda_image sample.steps sample.guidance_scale sample.solver"""


def test_settings_that_scripts_rely_on_exist() -> None:
    assert set(NAMES.split()) <= set(field_names())


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_configs_load_and_say_what_they_give(path: Path) -> None:
    assert load(path).run.dir == Path("runs") / path.stem
    assert path.read_text().startswith("# "), "a header with command, minutes and result"
