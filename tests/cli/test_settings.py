"""`mmgen settings`."""

from __future__ import annotations

import json

import pytest
from pydantic import BaseModel

from mmgen.config import Config
from mmgen.config_io import REGISTRIES, field_names
from mmgen.flow import SOLVERS
from tests.conftest import run


def leaves(settings: BaseModel, prefix: str = "") -> set[str]:
    found: set[str] = set()
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, BaseModel) else {prefix + name}
    return found


def test_every_setting_is_listed_with_its_meaning(capsys: pytest.CaptureFixture) -> None:
    code, out, err = run(capsys, "settings", "--json")
    found = {item["name"]: item for item in json.loads(out)}
    assert (code, err) == (0, "")
    assert set(found) == leaves(Config())
    assert set(found) <= set(field_names())
    assert all(item["description"] for item in found.values())
    assert found["train.lr"]["default"] == Config().train.lr
    assert found["run.dir"] == {
        "name": "run.dir", "type": "Path", "default": "runs/default", "choices": [],
        "description": "Run folder: config, metrics, samples, checkpoints and reports.",
    }  # fmt: skip
    types = {"train.micro_rows": "int | null", "data.val": "list[str | dict]", "train.ema_more": "tuple[float, ...]"}
    types |= {"model.patcher.image_sizes": "list[tuple[int, int]]", "sample.solver_options": "dict[str, any]"}
    assert {name: found[name]["type"] for name in types} == types
    assert found["train.precision"]["choices"] == ["auto", "fp32", "bf16"]


@pytest.mark.parametrize("setting", REGISTRIES)
def test_every_name_of_a_registry_is_listed(setting: str, capsys: pytest.CaptureFixture) -> None:
    names = list(REGISTRIES[setting]())
    _, out, _ = run(capsys, "settings", setting)
    assert out.startswith(f"{setting}: str")
    assert f"One of: {', '.join(names)}." in out
    _, out, _ = run(capsys, "settings", "--json")
    (found,) = [item for item in json.loads(out) if item["name"] == setting]
    assert found["choices"] == names
    written = [name for name in names if f"`{name}`" in found["description"]]
    assert len(written) < max(2, len(names)), "the registry lists its names, not the docstring"


def test_an_added_solver_is_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(SOLVERS, "leap", SOLVERS["euler"])
    assert "leap" in run(capsys, "settings", "sample.solver")[1]


def test_settings_of_a_section(capsys: pytest.CaptureFixture) -> None:
    _, out, _ = run(capsys, "settings", "sample", "objective.time", "--json")
    sections = {item["name"].rpartition(".")[0] for item in json.loads(out)}
    assert sections == {"sample", "objective.time"}


def test_search_in_keys_and_descriptions(capsys: pytest.CaptureFixture) -> None:
    """A word that is no section or key is looked for in all keys and descriptions, in any case."""
    listed = {item["name"]: item for item in json.loads(run(capsys, "settings", "--json")[1])}
    _, out, _ = run(capsys, "settings", "GUIDANCE", "warmup", "--json")
    found = {item["name"] for item in json.loads(out)}
    assert {"sample.guidance_scale", "sample.guidance_interval", "train.warmup_steps"} <= found
    for name, item in listed.items():
        text = f"{name} {item['description']}".lower()
        assert (name in found) == ("guidance" in text or "warmup" in text), name
    assert run(capsys, "settings", "--", "--train.lr")[1].startswith("train.lr: float")


def test_a_search_without_a_match_names_the_nearest_key(capsys: pytest.CaptureFixture) -> None:
    for word, near in (("samle", ": did you mean 'sample'?"), ("zzzzzz", ": `mmgen settings` lists all")):
        code, out, err = run(capsys, "settings", word)
        assert (code, out) == (2, "")
        assert err == f"mmgen: error: no section, key or description contains '{word}'{near}\n"
    assert run(capsys, "settings", " ")[0] == 2
