"""The parity check draws with the user's sampling settings: it holds with them, and fails if the decoder uses others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mmgen import parity
from mmgen.config import Config
from mmgen.config_io import override
from mmgen.flow.solvers import SOLVERS
from mmgen.generate.parts import Parts
from mmgen.objective import Drawing, ImageObjective, ImageSpec
from mmgen.parity.faults import FAULTS

BASE = {
    "steps": 5, "solver": "ddim", "solver_options": {"eta": 0.8}, "time_shift": 2.0, "guidance_scale": 1.6,
    "guidance_interval": (0.1, 0.7), "guidance_rescale": 0.4, "guidance_renorm": True, "clean_range": (-0.4, 0.5),
    "noise_temperature": 0.8, "unmask_steps": 3, "guidance_ramp": "linear",
}  # fmt: skip
OTHER: dict[str, Any] = {
    "steps": 4, "solver": "ancestral", "solver_options": {"eta": 0.7}, "time_shift": 1.0, "guidance_scale": 1.5,
    "guidance_interval": (0.0, 1.0), "guidance_rescale": 0.0, "guidance_renorm": False, "clean_range": None,
    "noise_temperature": 0.9, "unmask_steps": 2, "guidance_ramp": "constant",
}  # fmt: skip
ONLY_MAR = ("unmask_steps", "guidance_ramp")
CHECKED = {name: parity.VARIANTS[name] for name in ("transfusion, capped", "mar, masked", "mar, raster")}


@pytest.fixture(autouse=True)
def _few_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "VARIANTS", CHECKED)


def drawing_with(changes: dict[str, Any]) -> Parts:
    """A decoder that draws with other settings than those of the user."""

    def generate(objective: ImageObjective, spec: ImageSpec) -> Drawing:
        return objective.generate(replace(spec, sample=spec.sample.model_copy(update=changes)))

    return Parts(generate=generate)


def holds(config: Config) -> dict[str, bool]:
    return {report.variant: report.holds for report in parity.check_parity(config)}


@pytest.mark.slow
@pytest.mark.parametrize("setting", OTHER)
def test_a_decoder_that_ignores_a_setting_fails(setting: str, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {setting: OTHER[setting], **({"solver_options": {}} if setting == "solver" else {})}
    monkeypatch.setitem(FAULTS, "ignored", drawing_with(changes))
    for report in parity.check_parity(override(config, {"sample": BASE}), "ignored"):
        ignored = setting in ONLY_MAR and "mar" not in report.variant
        ignored |= setting == "unmask_steps" and "masked" not in report.variant
        assert report.holds == ignored, report


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SOLVERS if name not in ("langevin", "annealed_langevin")])
def test_it_holds_with_every_solver(name: str, config: Config) -> None:
    options = {"ddim": {"eta": 0.6}, "euler_maruyama": {"level": "constant"}}.get(name, {})
    sample = {**BASE, "solver": name, "solver_options": options}
    if not (SOLVERS[name].stochastic):
        sample["noise_temperature"] = 1.0
    assert all(holds(override(config, {"sample": sample})).values())


def test_the_solver_of_the_user_is_the_one_that_runs(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new solver is called by the decoder and by the check, with its own options."""
    called = []

    def own(z, times, *, path=None, noise=None, twist=0.0):
        called.append((len(times) - 1, twist))
        return SOLVERS["euler"].make(z, times, path=path)

    monkeypatch.setitem(SOLVERS, "own", type(SOLVERS["euler"])(own, "v"))
    sample = {"solver": "own", "solver_options": {"twist": 0.25}, "steps": 3}
    assert all(holds(override(config, {"sample": sample})).values())
    assert set(called) == {(3, 0.25)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "sample"),
    [
        ({"bidirectional": False}, {}),
        ({"bidirectional": True}, {}),
        ({}, {"guidance_scale": 1.0}),
        ({"prediction": "x"}, BASE),
        ({"prediction": "eps", "path": "cosine"}, BASE),
        ({"mar": {"head": {"kind": "mse"}}}, {}),
        ({"noise_scale": 1.5}, {**BASE, "solver_options": {"eta": 0.5}}),
    ],
    ids=["causal", "bidirectional", "no guidance", "x", "eps, cosine", "mse", "noise scale"],
)
def test_it_holds_with_other_settings(config: Config, objective: dict[str, Any], sample: dict[str, Any]) -> None:
    config = override(config, {"objective": objective, "sample": sample})
    assert holds(config) == dict.fromkeys(CHECKED, True)


def test_a_causal_image_is_detected_if_the_user_asked_for_a_bidirectional_one(config: Config) -> None:
    """And the other way round: without bidirectional attention the causal rule is the right one."""
    for bidirectional in (True, False):
        reports = parity.check_parity(override(config, {"objective": {"bidirectional": bidirectional}}), "causal-mask")
        found = {report.variant: report.holds for report in reports}
        assert found == {name: not bidirectional or name == "mar, raster" for name in CHECKED}


def test_settings_that_contradict_each_other_raise(config: Config) -> None:
    with pytest.raises(ValueError, match="'heun' adds no noise"):
        parity.check_parity(override(config, {"sample": {"solver": "heun", "noise_temperature": 0.5}}))
