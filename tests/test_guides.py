"""Guides are executed: their commands and Python run, their tables are current, their links and paths resolve."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.guides import ROOT, Fence, broken_links, fences, guides, slug, table, with_tables, without_fences

BIN = Path(sys.executable).parent
FEW_STEPS = "--train.steps 3 --train.compile=false --train.sample_every 0 --train.first_sample 0 --train.save_every 3"
SMALL = {
    "train": FEW_STEPS,
    "eval": "--eval.samples 20 --sample.steps 2",
    "sample": "--sample.steps 2",
    "demo": "--sample.steps 2",
    "lab run": "--fast",
    "bench step": "--rounds 2",
    "bench generation": "--rounds 1",
    "bench samplers": "--rounds 1",
    "bench data": "--rounds 1 --samples 50",
}
"""Sizes that are appended to a command of a guide, so that a test of minutes becomes one of seconds."""
GUIDES = guides()
EXECUTED = [
    path
    for path in GUIDES
    if any(f.language in ("bash", "python") and not f.skipped for f in fences((ROOT / path).read_text()))
]


def small(command: str) -> str:
    """A command with its small sizes, unless it only prints a plan."""
    words = shlex.split(command, comments=True)
    if words[0] not in ("mmgen", "python") or "--dry-run" in words or "--help" in words:
        return shlex.join(words)
    for name, sizes in SMALL.items():
        parts = name.split()
        if words[1 : 1 + len(parts)] == parts:
            return f"{shlex.join(words)} {sizes}"
    return shlex.join(words)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's configs, scripts, small data and a run of three steps."""
    folder = tmp_path_factory.mktemp("guides")
    for name in ("configs", "data_prep", "launch", "tests"):
        (folder / name).symlink_to(ROOT / name)
    for command in (
        "python -m data_prep.digits --out data/digits",
        'python -m data_prep.tokenizer --out data/digits/tokenizer.json "data/digits/train-{000000..000001}.tar"',
        "python -m data_prep.scenes --out data/scenes",
        "python -m data_prep.tokenizer --out data/scenes/tokenizer.json data/scenes/train-000000.tar",
        "mmgen train --config configs/scenes.yaml",
    ):
        run(small(command), folder, 0)
    own_pictures(folder / "pictures")
    return folder


def own_pictures(folder: Path) -> None:
    """Captioned pictures of several shapes, as a user might have them."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(100):
        pixels = np.full((36 + i % 3, 32, 3), 255, np.uint8)
        pixels[rng.integers(8) : 20, rng.integers(8) : 24] = (255 * (i % 2), 0, 255 * (1 - i % 2))
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"a {'red' if i % 2 else 'blue'} box")


def environment(folder: Path) -> dict[str, str]:
    """The variables of a user's shell in which mmgen is installed."""
    return {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": f"{folder}:{ROOT}"}


def run(command: str, folder: Path, code: int) -> None:
    """Run one line of a shell in a folder, and compare its exit code."""
    began = time.monotonic()
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environment(folder), capture_output=True, text=True, check=False
    )
    print(f"{time.monotonic() - began:6.1f} s  {command}", flush=True)
    assert done.returncode == code, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def exit_code(command: str) -> int:
    """The exit code that a line of a guide announces: `# exits N`, or 1 with `--inject`."""
    stated = re.search(r"# exits (\d+)", command)
    return int(stated[1]) if stated else int("--inject" in shlex.split(command, comments=True))


SHELL = """
import sys, traceback
names = {"__name__": "guide"}
for path in sys.stdin:
    try:
        exec(compile(open(path.strip()).read(), path.strip(), "exec"), names)
        print("\\nEND 0", flush=True)
    except Exception:
        print(traceback.format_exc(), "\\nEND 1", flush=True)
"""


class Python:
    """A process that runs the Python blocks of a guide one after another, in one namespace."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.process: subprocess.Popen[str] | None = None

    def run(self, text: str) -> None:
        began = time.monotonic()
        self.process = self.process or subprocess.Popen(
            [sys.executable, "-c", SHELL],
            cwd=self.folder,
            env=environment(self.folder),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.process.stdin
        assert self.process.stdout
        self.count += 1
        name = f"snippet_{self.count}.py"
        (self.folder / name).write_text(text)
        self.process.stdin.write(f"{name}\n")
        self.process.stdin.flush()
        lines: list[str] = []
        for line in self.process.stdout:
            if line.startswith("END "):
                break
            lines.append(line)
        print(f"{time.monotonic() - began:6.1f} s  Python block {self.count}", flush=True)
        assert line == "END 0\n", f"{name}:\n{text}\n{''.join(lines)}"

    def close(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()


def execute(blocks: list[Fence], folder: Path) -> None:
    """Run the fences of a guide in order."""
    python = Python(folder)
    try:
        for block in blocks:
            if block.file:
                (folder / block.file).write_text(block.text)
            elif block.language == "python" and not block.skipped:
                python.run(block.text)
            elif block.language == "bash" and not block.skipped:
                for line in block.commands:
                    if not line.startswith(("make ", "git clone", "cd ", "pip install")):
                        run(small(line), folder, exit_code(line))
    finally:
        python.close()


@pytest.mark.slow
@pytest.mark.parametrize("guide", EXECUTED, ids=str)
def test_every_command_and_snippet_of_a_guide_runs(guide: Path, prepared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "guide"
    shutil.copytree(prepared, folder, symlinks=True)
    execute(fences((ROOT / guide).read_text()), folder)


def test_worked_examples_of_contributing_run(tmp_path: Path) -> None:
    blocks = fences((ROOT / "CONTRIBUTING.md").read_text())
    execute([block for block in blocks if block.language == "python"], tmp_path)


@pytest.mark.parametrize("guide", GUIDES, ids=str)
def test_links_resolve(guide: Path) -> None:
    assert not broken_links(guide)


@pytest.mark.parametrize("guide", GUIDES, ids=str)
def test_generated_tables_are_current(guide: Path) -> None:
    text = (ROOT / guide).read_text()
    assert with_tables(text) == text, "run python -m tests.guides --write"
    assert text.count("<!-- table: ") == text.count("<!-- end -->")


@pytest.mark.parametrize("guide", GUIDES, ids=str)
def test_a_fence_of_bash_that_does_not_run_gives_a_reason(guide: Path) -> None:
    for language, options in re.findall(
        r"^```(bash|python|sh|shell|console)([^\n]*)$", (ROOT / guide).read_text(), re.MULTILINE
    ):
        assert language in ("bash", "python"), "a fence that tests do not see"
        assert options == "" or re.fullmatch(r" norun=\S.*", options), options


def test_make_targets_of_guides_exist() -> None:
    for guide in GUIDES:
        for block in fences((ROOT / guide).read_text()):
            for line in block.commands if block.language == "bash" else []:
                if line.startswith("make "):
                    target = shlex.split(line, comments=True)[1]
                    subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def test_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert len(text.encode()) <= 10_000


def test_guides_of_folders_are_readable_in_one_sitting() -> None:
    for guide in (guide for guide in GUIDES if guide.name == "README.md" and guide != Path("README.md")):
        assert 60 <= len((ROOT / guide).read_text().splitlines()) <= 250, guide


def test_table_cells_are_short() -> None:
    """A cell holds a number or a name, not an argument; generated tables hold one sentence per row."""
    for guide in GUIDES:
        text = re.sub(r"<!-- table: .*?<!-- end -->", "", (ROOT / guide).read_text(), flags=re.DOTALL)
        for line in without_fences(text).splitlines():
            if line.startswith("|"):
                for cell in line.strip("|").split(" | "):
                    assert len(re.sub(r"\]\([^)]*\)", "]", cell)) <= 110, (str(guide), cell)


class TestTheChecks:
    """Each check above is seen to fail."""

    def test_broken_links_are_seen(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tests.guides.ROOT", tmp_path)
        (tmp_path / "a.md").write_text(
            "# One `two`: three\n[x](b.md) [y](#one-two-three) [z](#none) [w](https://a.b/c)\n"
        )
        assert broken_links(Path("a.md")) == ["b.md", "#none"]

    def test_slugs_are_those_of_github(self) -> None:
        assert slug("Training, at scale: `train.zero_stage` 0-3") == "training-at-scale-trainzero_stage-0-3"

    def test_a_stale_table_is_seen(self) -> None:
        guide = f"<!-- table: registry solvers -->\n\n{table('registry solvers')}\n<!-- end -->\n"
        assert with_tables(guide) == guide
        assert with_tables(guide.replace("`heun`", "`hewn`")) == guide

    def test_unknown_tables_are_refused(self) -> None:
        with pytest.raises(ValueError, match="no table 'registr solvers'"):
            table("registr solvers")
        with pytest.raises(ValueError, match="no setting is in section 'objektive'"):
            table("settings objektive")

    def test_a_failing_command_is_seen(self, tmp_path: Path) -> None:
        ok, bad = fences("```bash\ntrue\n```\n```bash\ntrue  # fine\nfalse\n```\n")
        execute([ok], tmp_path)
        with pytest.raises(AssertionError, match="false"):
            execute([ok, bad], tmp_path)
        (reasoned,) = fences("```bash norun=needs Slurm\nfalse\n```\n")
        execute([reasoned], tmp_path)

    def test_a_file_that_a_guide_shows_is_written(self, tmp_path: Path) -> None:
        execute(fences("```yaml a.yaml\na: 1\n```\n```bash\ngrep 'a: 1' a.yaml\n```\n"), tmp_path)
        with pytest.raises(AssertionError, match="grep"):
            execute(fences("```yaml a.yaml\nb: 1\n```\n```bash\ngrep 'a: 1' a.yaml\n```\n"), tmp_path)

    def test_a_failing_snippet_is_seen(self, tmp_path: Path) -> None:
        blocks = fences("```python\na = 1\n```\ntext\n```python\nassert a == 2\n```\n")
        with pytest.raises(AssertionError, match="assert a == 2"):
            execute(blocks, tmp_path)
        execute(
            fences(
                "```python\nopen('b', 'w').close()\nc = 3\n```\n```bash\nls b\n```\n```python\nassert c == 3\n```\n"
            ),
            tmp_path,
        )
