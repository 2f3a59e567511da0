"""The lab: bounds of exact experiments hold, and each injected fault breaks a bound."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from mmgen.flow.field import Field, GaussianMixture
from mmgen.flow.path import Path as FlowPath
from mmgen.flow.schedule import CosinePath, LinearPath
from mmgen.flow.solvers import runge_kutta, solve
from mmgen.flow.time import uniform_grid
from mmgen.lab import draw
from mmgen.lab.catalog import EXPERIMENTS, Experiment, Options, execute, run_all
from mmgen.lab.core import Bound, Run
from mmgen.lab.faults import FAULTS, HOOKS, injected
from mmgen.lab.nets import Preconditioned
from tests.conftest import run

EXACT = [name for name, experiment in EXPERIMENTS.items() if experiment.run.__module__.endswith("exact")]
FAULTY = [(name, fault) for name in EXPERIMENTS for fault in EXPERIMENTS[name].faults if not EXPERIMENTS[name].shared]


@pytest.mark.parametrize("path", [LinearPath(), CosinePath()], ids=["linear", "cosine"])
def test_preconditioning_is_exact_for_a_gaussian(path: FlowPath) -> None:
    """For N(0, s^2) the exact denoiser has an inner network of zero, and the inner target has variance one."""
    std, t = 0.3, torch.linspace(0.02, 0.98, 25, dtype=torch.float64).unsqueeze(1)
    net = Preconditioned(Zero(), path, std)
    data = GaussianMixture(torch.zeros(1, 4, dtype=torch.float64), std, path=path)
    z = torch.randn(25, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(net(z, t), data.denoised(z, t), rtol=1e-9, atol=1e-9)
    alpha, sigma = path.alpha(t), path.sigma(t)
    skip = net(torch.ones_like(t), t)  # x - skip z = (1 - skip alpha) x - skip sigma eps
    variance = ((1 - skip * alpha) * std).square() + (skip * sigma).square()
    torch.testing.assert_close(variance / net.out_scale(t).square(), torch.ones_like(t), rtol=1e-9, atol=0)
    field = Field(path, net, "x", clip=1e-3)
    start = path.sigma(torch.zeros((), dtype=torch.float64)) * z
    end = solve(runge_kutta(start, uniform_grid(200), path=path), field("v"))
    torch.testing.assert_close(end, std * z, rtol=1e-2, atol=1e-2)


class Zero(torch.nn.Module):
    def forward(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(z)


@pytest.mark.slow
def test_parallel_experiments_equal_sequential_ones(tmp_path: Path) -> None:
    """Two at a time yield results in the given order, with the figures of a single run."""
    names = ["paths", "gaussian_likelihood", "band_power"]
    options = Options(fast=True, out=tmp_path)
    together = list(run_all(names, 2, options))
    assert [result.name for result in together] == names
    assert all(result.holds for result in together)
    assert together[2].figures == execute("band_power", options).figures
    with pytest.raises(ValueError, match="at least one experiment"):
        next(run_all(names, 0))


@pytest.mark.parametrize("name", EXACT)
def test_exact_experiments_hold(name: str, tmp_path: Path) -> None:
    result = execute(name, Options(fast=True, out=tmp_path))
    assert result.holds, result.bounds
    assert result.bounds
    assert json.loads((tmp_path / f"{name}.fast.json").read_text()) == json.loads(json.dumps(result.as_json()))
    with Image.open(tmp_path / f"{name}.fast.png") as picture:
        assert min(picture.size) > 100


@pytest.mark.parametrize(("name", "fault"), FAULTY)
def test_faults_break_bounds(name: str, fault: str, tmp_path: Path) -> None:
    assert not execute(name, Options(fast=True, out=tmp_path, inject=fault)).holds


def test_a_fault_does_not_affect_the_next_run(tmp_path: Path) -> None:
    execute("gaussian_likelihood", Options(fast=True, out=tmp_path, inject="sign"))
    assert execute("gaussian_likelihood", Options(fast=True, out=tmp_path)).holds


def test_every_fault_is_detected_by_an_experiment() -> None:
    assert {fault for experiment in EXPERIMENTS.values() for fault in experiment.faults} == set(FAULTS)


def test_known_differences_do_not_affect_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An experiment with three figures: a bound, a known difference, and a bound for full runs only."""

    def toy(run: Run) -> Figure:
        run.bound("judged", 1.0, at_least=0.5)
        run.known_difference("known", 2.0, wanted="at most 1", reason="it is two")
        run.bound_when_trained("trained", 0.3, at_least=0.5)
        return draw.bars({"a": 1.0}, "y")

    for name in reversed(list(EXPERIMENTS)):  # from the end, so that they are restored in their order
        monkeypatch.delitem(EXPERIMENTS, name)
    monkeypatch.setitem(EXPERIMENTS, "toy", Experiment("toy", "A toy", toy))
    words = ("lab", "run", "--all", "--json", "--jobs", "1", "--out", str(tmp_path))
    code, result_json, messages = run(capsys, *words, "--fast")
    (result,) = json.loads(result_json)
    assert code == 0, messages
    assert "known difference" in messages
    assert [bound["figure"] for bound in result["bounds"]] == ["judged"]
    known, untrained = result["known_differences"]
    assert known == {"figure": "known", "wanted": "at most 1", "measured": 2.0, "reason": "it is two"}
    assert (untrained["figure"], untrained["wanted"]) == ("trained", "at least 0.5")
    assert result["figures"] == {"judged": 1.0, "known": 2.0, "trained": 0.3}
    code, result_json, _ = run(capsys, *words)
    (result,) = json.loads(result_json)
    assert code == 1
    assert result["holds"] is False
    assert [(bound["figure"], bound["holds"]) for bound in result["bounds"]] == [("judged", True), ("trained", False)]


@pytest.mark.parametrize(("value", "holds"), [(0.9, True), (1.1, True), (0.89, False), (1.2, False), (math.nan, False)])
def test_a_bound_holds_between_its_limits(value: float, holds: bool) -> None:
    bound = Bound("slope", value, 0.9, 1.1)
    assert bound.holds is holds
    assert bound.wanted == "at least 0.9 at most 1.1"


def test_a_fault_wraps_only_hooks() -> None:
    """Every method that a fault replaces is a hook, and is restored afterwards."""
    before = [getattr(hook.owner, hook.name) for hook in HOOKS]
    for fault, wraps in FAULTS.items():
        assert set(wraps) <= set(HOOKS)
        with injected(fault):
            changed = [getattr(hook.owner, hook.name) is not old for hook, old in zip(HOOKS, before, strict=True)]
        assert changed == [hook in wraps for hook in HOOKS]
    assert [getattr(hook.owner, hook.name) for hook in HOOKS] == before


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, listed, messages = run(capsys, "lab", "list", "--json")
    assert code == 0, messages
    assert {item["name"] for item in json.loads(listed)} == set(EXPERIMENTS)
    assert "E[x |" in run(capsys, "lab", "list")[1], "brackets are printed as they are"
    code, result_json, messages = run(
        capsys, "lab", "run", "gaussian_likelihood", "--fast", "--json", "--out", str(tmp_path)
    )
    assert code == 0, messages
    (result,) = json.loads(result_json)
    assert result["holds"] is True
    assert all({"figure", "value", "holds"} < set(bound) for bound in result["bounds"])
    assert result["known_differences"] == []
    assert {"name", "seconds", "picture", "figures"} < set(result)
    code, _, messages = run(
        capsys, "lab", "run", "gaussian_likelihood", "--fast", "--inject", "sign", "--out", str(tmp_path)
    )
    assert code == 1
    assert "FAILS  gaussian_likelihood" in messages


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["solver_ordre"], "solver_order"),
        ([], "--all"),
        (["guidance", "--inject", "minus_s2"], "does not detect the fault 'minus_s2'"),
    ],
)
def test_bad_input_is_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, messages = run(capsys, "lab", "run", *arguments)
    assert code == 2
    assert message in messages


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name not in EXACT])
def test_trained_experiments_run(name: str, tmp_path: Path) -> None:
    """Small sizes: every experiment holds, with bounds and a picture."""
    result = execute(name, Options(fast=True, out=tmp_path))
    assert result.bounds
    assert result.holds, [bound for bound in result.bounds if not bound.holds]
    assert result.picture.exists()
