"""Settings from files and overrides, and the checks that apply to settings of any origin."""

from __future__ import annotations

import functools
from operator import attrgetter
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field

from mmgen.config import OBJECTIVE_SETTINGS, Config, PatcherConfig, SampleConfig, Settings
from mmgen.config_io import REGISTRIES, check_names, field_names, load, merged, override, settings
from tests.conftest import run

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


WRONG = {
    "train.steps": [(0, "a whole number above 0, such as 1000 (got 0)"), (1.5, "(got 1.5)"), ("many", "(got 'many')")],
    "train.micro_rows": [("some", "a whole number above 0 or null (got 'some')")],
    "train.max_skips": [(-1, "a whole number of 0 or more, such as 10 (got -1)")],
    "train.zero_stage": [(4, "a whole number from 0 to 3, such as 0 (got 4)")],
    "train.lr": [(float("nan"), "a number above 0, such as 0.001 (got nan)"), ([1], "(got [1])")],
    "train.ema_decay": [(2, "a number from 0 to 1, such as 0.999 (got 2)")],
    "train.ema_power": [([0.3], "a list, each item a number above 0 and below 0.28 (got 0.3 at train.ema_power.0)")],
    "train.betas": [
        ([0.9], "a list [a number from 0 to 1, a number from 0 to 1], such as [0.9, 0.95] (got [0.9] at train.betas.1)"),
        ([0.9, 0.95, 1], "(got [0.9, 0.95, 1])"),
        (0.9, "(got 0.9)"),
    ],
    "train.compile": [("maybe", "true or false (got 'maybe')")],
    "train.precision": [("fp8", "one of auto, fp32, bf16 (got 'fp8')")],
    "train.trackers": [(["mlflow"], "a list, each item one of wandb, trackio (got 'mlflow' at train.trackers.0)")],
    "train.deepspeed": [(5, "a mapping (got 5)")],
    "run.dir": [(5, 'a path, such as "runs/default" (got 5)')],
    "model.patcher.image_sizes": [
        ([[40]], "a list, each item a list [a whole number above 0, a whole number above 0], such as [[16, 16]] (got [40] at model.patcher.image_sizes.0.1)"),
        ([[40, 40, 3]], "(got [40, 40, 3] at model.patcher.image_sizes.0)"),
        ([[8, -8]], "(got -8 at model.patcher.image_sizes.0.1)"),
        ("[[a,b]]", "(got '[[a,b]]')"),
        ([40], "(got 40 at model.patcher.image_sizes.0)"),
    ],
    "model.patcher.vae.std": [([0.0], "a list, each item a number above 0 or null (got 0.0 at model.patcher.vae.std.0)")],
    "objective.kind": [(5, "one of transfusion, mar (got 5)")],
    "objective.prediction": [("u", "one of x, eps, v, score, v_sh (got 'u')")],
    "objective.mar": [(None, "a mapping with the keys order, head, draws_per_patch, mask_ratio, entry_norm (got null)")],
    "data.train": [(5, "a list, each item text or a mapping with the keys shards, weight, name (got 5)"), ([5], "(got 5 at data.train.0)")],
    "data.limits": [("small", "a mapping with the keys member_bytes, shard_bytes, ratio")],
    "sample.guidance_interval": [(["a", 1], "(got 'a' at sample.guidance_interval.0)")],
}  # fmt: skip


@pytest.mark.parametrize(("key", "value", "message"), [(key, *case) for key, cases in WRONG.items() for case in cases])
def test_a_wrong_value_is_explained_without_words_of_a_library(key: str, value: object, message: str) -> None:
    changes = value
    for section in reversed(key.split(".")):
        changes = {section: changes}
    with pytest.raises(ValueError, match="got") as error:
        override(Config(), changes)
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"{key} must be ")
    assert message in line
    assert not any(word in line for word in ("Input", "valid", "Tuple", "pydantic", "required"))


def test_every_setting_has_an_expectation_in_words() -> None:
    for setting in settings():
        with pytest.raises(ValueError, match=setting.name) as error:
            override(
                Config(), functools.reduce(lambda inner, key: {key: inner}, reversed(setting.name.split(".")), object())
            )
        assert "any value" not in str(error.value)
        assert "must be" in str(error.value)


def test_several_errors_are_one_line_each() -> None:
    with pytest.raises(ValueError, match="steps") as error:
        override(Config(), {"train": {"steps": 0, "lr": -1}, "data": {"train": [5]}})
    assert [line.split()[0] for line in str(error.value).splitlines()] == ["data.train", "train.steps", "train.lr"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty, not a mapping of sections"),
        (b"- 1", r"holds \[1\], not a mapping of sections"),
        (b"train: {1: 2}", "unknown key 'train.1"),
        (b"1: 2", "unknown key '1"),
        (b"train: [", "line 1: a bracket, brace or quote is not closed"),
        (b"train:\n\tlr: 1", "line 2: a tab in the indentation: use spaces"),
        (b"run:\n  dir: a: b", "line 2: put quotes around a value that contains ': '"),
        (b"run: {dir: *foo}", "line 1: a value that begins with '\\*': put quotes around it"),
        (b"run: !!python/none x", "line 1: a tag that begins with '!': remove it"),
        (b"run: {}\n---\nrun: {}", "line 2: '---' begins a second document: keep one"),
        (b"run: {dir: \x01}", "a control character: remove it"),
        (b"train: {steps: 5}\ntrain: {lr: 1}", r"the key 'train' is given twice \(lines 1 and 2\): keep one"),
        (b"train: {lr: yes}", r"train.lr must be a number above 0, such as [0-9.]+ \(got true\)"),
        (b"train: {micro_rows: off}", r"train.micro_rows must be .* \(got false\)"),
        (b"run: {dir: \xff\xfe}", "is not text in UTF-8"),
        (b"train:", r"train must be a mapping with keys such as steps, batch_rows, micro_rows \(got null\)"),
        (b"data: {train: [{weight: 2}]}", "data.train must be a list, each item text or a mapping"),
        (b"objective: {others: {dream: {}}}", "objective.others.dream: no such objective"),
    ],
)
def test_a_wrong_file_is_explained(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load(file)
    assert str(error.value).startswith(str(file))


def test_settings_of_an_added_objective_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    class Codes(Settings):
        codes: Annotated[int, Field(gt=0)] = 8

    monkeypatch.setitem(OBJECTIVE_SETTINGS, "discrete", Codes)
    with pytest.raises(ValueError, match="objective.discrete.codes must be a whole number above 0, such as 8"):
        override(Config(), {"objective": {"discrete": {"codes": 0}}})
    with pytest.raises(
        ValueError, match="unknown key 'objective.discrete.code', did you mean 'objective.discrete.codes'"
    ):
        override(Config(), {"objective": {"discrete": {"code": 1}}})


def test_a_wrong_flag_of_the_command_line_is_explained(capsys: pytest.CaptureFixture) -> None:
    code, _, err = run(capsys, "train", "--dry-run", "--model.patcher.image_sizes", "[[40]]")
    assert code == 2
    assert "model.patcher.image_sizes must be a list, each item a list [a whole number above 0" in err
    code, _, err = run(capsys, "train", "--dry-run", "--objective.time.sampler", 5)
    assert code == 2
    assert "unknown objective.time.distribution '5'" in err


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
