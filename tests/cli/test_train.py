"""`mmgen train`: its plan, and a run that is finished."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmgen.config import Config
from mmgen.config_io import load
from tests.conftest import run


def test_dry_run_prints_the_plan_and_touches_nothing(file: Path, config: Config, capsys: pytest.CaptureFixture) -> None:
    code, out, _ = run(capsys, "train", "--config", file, "--train.steps", 7, "--model.backbone.extra.rope_theta", 5.0,
                       "--dry-run", "--json")  # fmt: skip
    plan = json.loads(out)
    assert code == 0
    assert list(plan) == [
        "parameters", "vocabulary", "tokens_per_step", "tokens_total", "positions_per_image",
        "positions_added_by_copies", "numbers_per_patch", "processes", "memory_state_bytes", "memory_weights_bytes",
        "memory_gradients_bytes", "memory_master_bytes", "memory_moments_bytes", "memory_averages_bytes",
        "memory_activation_bytes", "config",
    ]  # fmt: skip
    assert plan["tokens_per_step"] == 4 * 48
    assert plan["tokens_total"] == 7 * 4 * 48
    assert plan["config"]["train"]["steps"] == 7
    assert plan["config"]["model"]["backbone"]["extra"] == {"rope_theta": 5.0}
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
    ("words", "sizes"),
    [
        (["[8,8]"], [[8, 8]]),
        (["[[8,8]]"], [[8, 8]]),
        (["[[8,8],[4,8]]"], [[8, 8], [4, 8]]),
        (["[8,8]", "--model.patcher.image_sizes", "[4,8]"], [[8, 8], [4, 8]]),
    ],
)
def test_lists_of_sizes(file: Path, capsys: pytest.CaptureFixture, words: list[str], sizes: list) -> None:
    code, out, err = run(
        capsys, "train", "--config", file, "--dry-run", "--json", "--model.patcher.image_sizes", *words
    )
    assert code == 0, err
    assert json.loads(out)["config"]["model"]["patcher"]["image_sizes"] == sizes


def test_a_finished_run_names_the_settings_that_have_no_effect(trained: Path, capsys: pytest.CaptureFixture) -> None:
    run_dir = load(trained).run.dir
    code, out, _ = run(capsys, "train", "--config", trained, "--train.lr", 0.5, "--data.workers", 1)
    assert code == 0
    assert out.splitlines() == [
        f"{run_dir} is trained: it is finished at step 6, and train.steps is 6.",
        "These settings differ from those of the run, and have no effect: "
        "data.workers (1 here, 0 there); train.lr (0.5 here, 0.001 there).",
        "To continue this run, set train.steps above 6. To train a new run, set another run.dir.",
    ]
    assert run(capsys, "train", "--config", trained)[1].splitlines() == [
        f"{run_dir} is trained: it is finished at step 6, and train.steps is 6.",
        "To continue this run, set train.steps above 6. To train a new run, set another run.dir.",
    ]
    assert "train.steps (4 here, 6 there)" in run(capsys, "train", "--config", trained, "--train.steps", 4)[1]
