"""The speed run: the training time of the first checkpoint that reaches the target, from runs of the real command."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from data_prep import digits, tokenizer
from mmgen.bench.speedrun import Attempt, Options, Scored, as_json
from mmgen.config_io import load
from tests.conftest import run


def test_the_first_checkpoint_at_the_target_counts() -> None:
    slow, fast = Scored(10, 5.0, 0.96, 0.9), Scored(20, 9.0, 0.951, 0.95)
    assert not slow.reaches(0.95)
    assert fast.reaches(0.95)
    found = as_json(
        [Attempt(0, [slow, fast], True), Attempt(1, [slow], False)], Options(range(2), 0.95, 2, Path("runs"))
    )
    assert found == {
        "seeds": [0, 1], "seconds": [9.0, None], "steps": [20, 10], "t2i_accuracy": [0.951, 0.96],
        "i2t_accuracy": [0.95, 0.9], "target": 0.95, "threads": 2,
    }  # fmt: skip


@pytest.mark.slow
def test_runs_are_trained_and_scored_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    base = load(root / "configs" / "digits.yaml").model_dump(mode="json")
    monkeypatch.chdir(tmp_path)
    digits.main(out=Path("data/digits"))
    tokenizer.main("data/digits/train-000000.tar", out=Path("data/digits/tokenizer.json"))
    base["train"] |= {"steps": 40, "compile": False, "warmup_steps": 1, "batch_rows": 2}
    base["sample"] |= {"steps": 1}
    base["eval"] |= {"samples": 4}
    Path("run.yaml").write_text(yaml.safe_dump(base))
    words = ["bench", "speedrun", "--config", "run.yaml", "--seeds", "1", "--target", "0", "--threads", "1"]
    capsys.readouterr()
    code, out, err = run(capsys, *words, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["seeds"], found["steps"], found["target"]) == ([0], [2], 0.0)
    assert found["seconds"][0] > 0
    assert len(list(Path("runs/speedrun/seed-0/checkpoints").glob("step-*"))) == 20
    log = Path("runs/speedrun/seed-0/train.log")
    trained = log.read_text().count("step 40/40")
    assert json.loads(run(capsys, *words, "--json")[1]) == found, "a complete run is not trained again"
    assert log.read_text().count("step 40/40") == trained == 1
    code, _, err = run(capsys, *words, "--train.lr", "0.5")
    assert code == 2
    assert "has other settings than this command: choose another --out" in err
