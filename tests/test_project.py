"""The project itself: dependency direction, and the README's commands."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from packaging.utils import canonicalize_name

from mmgen.train.loop import train
from tests.conftest import pairs, tiny, write_tar
from tests.oldest import oldest, requirements

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
SMALL = {
    "train": "--train.steps 3 --train.compile=false --train.sample_every 0 --train.first_sample 0 --train.save_every 3",
    "eval": "--eval.samples 20 --sample.steps 2",
    "sample": "--sample.steps 2",
    "caption": "",
    "export": "",
}


def test_imports_go_one_way() -> None:
    done = subprocess.run([BIN / "lint-imports"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_flow_knows_nothing_of_the_rest() -> None:
    for path in (ROOT / "mmgen" / "flow").glob("*.py"):
        assert not re.search(
            r"import (mmgen\.(?!flow)|transformers|tokenizers)|from (mmgen\.(?!flow)|transformers|tokenizers)",
            path.read_text(),
        )


def test_tests_mirror_the_packages() -> None:
    """A folder or file of tests is named after what it tests; these few are about no single package."""
    packages = {path.name for path in (ROOT / "mmgen").iterdir() if path.is_dir()} | {"data_prep"}
    modules = {path.stem for path in (ROOT / "mmgen").glob("*.py")}
    folders = {path.parent.relative_to(ROOT / "tests").parts[0] for path in ROOT.glob("tests/*/__init__.py")}
    files = {path.stem.removeprefix("test_") for path in ROOT.glob("tests/test_*.py")}
    assert folders - packages == {"faults", "fixtures", "golden", "growth"}
    assert files - modules == {"project", "layout"}


def pins() -> dict[str, list[str]]:
    """The lines of constraints.txt per package: `name==version`, then its hashes."""
    text = re.sub(r"^#.*\n", "", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    entries = [entry.split() for entry in text.replace("\\\n", " ").splitlines()]
    return {canonicalize_name(entry[0].split("==")[0]): entry for entry in entries}


def test_every_requirement_is_pinned_within_its_range() -> None:
    pinned = pins()
    for requirement in requirements("dev", "mutation"):
        version = pinned[canonicalize_name(requirement.name)][0].split("==")[1]
        assert requirement.specifier.contains(version), (str(requirement), version)


def test_every_pin_but_torch_has_hashes() -> None:
    for name, (_, *hashes) in pins().items():
        assert bool(hashes) == (name != "torch"), name
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", found) for found in hashes), name


def test_every_requirement_names_a_version_that_was_tried() -> None:
    for requirement in requirements("data", "ode", "lab", "prep"):
        assert "==" in oldest(requirement), f"{requirement.name} has no lower bound"


def readme_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def test_make_targets_of_the_readme_exist() -> None:
    targets = {command.split()[1] for command in readme_commands() if command.startswith("make ")}
    assert {"demo", "test"} <= targets
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def test_python_of_the_toolbox_section_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if "mmgen.flow" in block]
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["samples"].shape == (1000, 2)
    assert float(names["exact"].log_prob(names["samples"], torch.ones(())).mean()) > -3


def test_python_of_the_first_section_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """On a small run in the place of the one that `make demo` trains."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    first, second = [block for block in blocks if "Decoder" in block or "Inpaint" in block]
    monkeypatch.chdir(tmp_path)
    shard = write_tar(tmp_path / "train-000.tar", pairs(8))
    patcher = {"image_sizes": [[8, 8]]}
    config = tiny(tmp_path, data={"train": [str(shard)]}, model={"patcher": patcher}, run={"dir": "runs/scenes"})
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "scenes.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert train(config) == 0
    names: dict[str, Any] = {}
    exec(first, names)
    assert (tmp_path / "seven.png").is_file()
    assert isinstance(names["said"], str)
    exec(second, names)
    assert "image" in capsys.readouterr().out


@pytest.mark.slow
def test_readme_commands_run(tmp_path: Path) -> None:
    """Every command of the README but `make`, in its order, with few steps and samples appended."""
    for name in ("configs", "data_prep", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(tmp_path)}
    ran = []
    for command in readme_commands():
        if command.startswith(("make ", "git ", "cd ", "mmgen ablate ")):
            continue
        words = shlex.split(command)
        if words[:2] == ["mmgen", "lab"]:
            command += f" --out {tmp_path / 'lab'} --fast" if "run" in words else ""
        elif words[0] == "mmgen" and "--dry-run" not in words and words[1] not in ("bench", "check", "data"):
            command += f" {SMALL[words[1]]}"
        if "bench" in words:
            command += " --rounds 2"
        began = time.monotonic()
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == ("--inject" in words), (command, done.stderr[-2000:])
        print(f"{time.monotonic() - began:6.1f} s  {command}", flush=True)
        ran.append(words[1])
    assert {"train", "eval", "sample", "caption", "bench", "lab"} <= set(ran)
