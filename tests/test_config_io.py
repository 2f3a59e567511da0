"""Settings from files and overrides, and the checks that apply to settings of any origin."""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path

import pytest

from mmgen.config import Config, PatcherConfig, SampleConfig
from mmgen.config_io import REGISTRIES, check_names, field_names, load, merged, override

NAMES = """run.dir run.seed data.train data.val data.row_length train.steps train.batch_rows train.log_every
train.save_every train.zero_stage train.lr train.warmup_steps model.backbone model.patcher.kind
objective.kind objective.prediction objective.loss_space objective.lambda_image sample.steps
sample.guidance_scale sample.solver"""


def test_settings_that_scripts_rely_on_exist() -> None:
    assert set(NAMES.split()) <= set(field_names())


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_configs_load_and_have_a_header(path: Path) -> None:
    assert load(path).run.dir == Path("runs") / path.stem
    assert path.read_text().startswith("# "), "the file starts with a header: command, minutes and result"


def test_overrides_change_nothing_else(config: Config) -> None:
    changed = override(config, {"train": {"lr": 0.5}})
    assert changed.train.lr == 0.5
    assert changed.train.steps == config.train.steps
    with pytest.raises(ValueError, match="did you mean 'train.lr'"):
        override(config, {"train": {"lrr": 0.5}})


def test_merged_keeps_all_other_keys() -> None:
    old = {"a": {"b": 1, "c": [1, 2]}, "d": 2}
    assert merged(old, {"a": {"c": [3]}, "e": {"f": 4}}) == {"a": {"b": 1, "c": [3]}, "d": 2, "e": {"f": 4}}
    assert old == {"a": {"b": 1, "c": [1, 2]}, "d": 2}


@pytest.mark.parametrize("setting", REGISTRIES)
def test_every_registered_name_is_accepted(setting: str) -> None:
    *sections, last = setting.split(".")
    for name in REGISTRIES[setting]():
        nested: dict = {last: name}
        if (setting, name) == ("model.patcher.kind", "vae"):
            nested |= {"vae": {"name": "a folder"}, "patch_size": 2}
        for section in reversed(sections):
            nested = {section: nested}
        assert attrgetter(setting)(override(Config(), nested)) == name


def test_defaults_are_registered() -> None:
    check_names(Config().model_dump())
    with pytest.raises(ValueError, match="unknown sample.solver 'oiler', did you mean 'euler'"):
        check_names({"sample": {"solver": "oiler"}})


def test_sections_are_checked_on_construction() -> None:
    with pytest.raises(ValueError, match="not divisible by patch_size 5"):
        PatcherConfig(patch_size=5)
    with pytest.raises(ValueError, match="guidance_interval must rise"):
        SampleConfig(guidance_interval=(0.9, 0.1))
    with pytest.raises(ValueError, match="data.train has sources of different weight"):
        Config.model_validate(
            {"data": {"streams": 4, "train": ["a", {"shards": ["b"], "weight": 2.0}]}, "train": {"batch_rows": 4}}
        )


def test_the_readme_repeats_no_registry() -> None:
    for line in Path("README.md").read_text().splitlines():
        for setting, names in REGISTRIES.items():
            listed = [name for name in names() if f"`{name}`" in line]
            assert len(listed) < 4, f"{setting}: `mmgen settings` lists these: {line}"
