"""The command as a user types it: overrides, typos, wrong names, bad input, exit codes, help."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from mmgen.cli.app import build
from mmgen.cli.commands import COMMANDS, GROUPS
from mmgen.cli.flags import Json, Settings
from mmgen.cli.help import parts, used_sections
from mmgen.cli.show import show
from mmgen.config import Config
from mmgen.config_io import REGISTRIES, load
from mmgen.flow import PATHS, SOLVERS
from mmgen.lab.faults import FAULTS as LAB_FAULTS
from mmgen.parity.faults import FAULTS as PARITY_FAULTS
from tests.conftest import run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--train.stpes", "5"], "unknown option --train.stpes, did you mean --train.steps?"),
        (["trian"], "train"),
        (["train", "--train.steps", "-1"], "train.steps must be a whole number above 0, such as 1000 (got '-1')"),
        (["train", "--train.steps", "many"], "train.steps"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["train"], "no tokenizer at tokenizer.json"),
        (["sample"], "no caption is given"),
        (["sample", " "], "a caption is empty"),
        (["caption"], "no image is given"),
        (["caption", "pyproject.toml"], "pyproject.toml is not an image"),
        (["eval"], "has no checkpoint: name a trained run as the first argument or with --config FILE"),
        (["train", "--objective.prediction", "w"], "prediction"),
        (["sample", "a", "--sample.guidance-interval", "0.9", "0.1"], "error: sample.guidance_interval must rise"),
        (["train", "--model.patcher.patch_size", "5"], "error: image size 16x16 is not divisible by patch_size 5"),
        (["train", "--model.patcher.image_sizes", "40", "40"], "model.patcher.image_sizes.0"),
        (["train", "--data.streams", "5"], "error: train.batch_rows is 24 and data.streams 5"),
    ],
)
def test_usage_errors(capsys: pytest.CaptureFixture, words: list[str], message: str) -> None:
    code, out, err = run(capsys, *words)
    assert code == 2
    assert message in err.replace("\n", " ")
    assert "Traceback" not in err
    assert "pydantic" not in err
    assert not out


@pytest.mark.parametrize("setting", REGISTRIES)
@pytest.mark.parametrize("source", ["command line", "yaml"])
def test_wrong_names_of_registries(
    setting: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The nearest name, all names and exit code 2 before anything starts."""
    monkeypatch.chdir(tmp_path)
    names = list(REGISTRIES[setting]())
    wrong = names[0] + "x"
    if source == "yaml":
        section, *rest = setting.split(".")
        nested: object = wrong
        for key in reversed(rest):
            nested = {key: nested}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({section: nested}))
        words = ["--config", "run.yaml"]
    else:
        words = [f"--{setting}", wrong]
    before = list(tmp_path.iterdir())
    code, out, err = run(capsys, "train", *words)
    assert (code, out) == (2, "")
    where = "run.yaml: " if source == "yaml" else ""
    assert err == (
        f"mmgen: error: {where}unknown {setting} '{wrong}', did you mean '{names[0]}'? (one of: {', '.join(names)})\n"
    )
    assert list(tmp_path.iterdir()) == before


def test_only_solvers_that_draw_are_choices(capsys: pytest.CaptureFixture) -> None:
    assert "langevin" in SOLVERS
    code, _, err = run(capsys, "sample", "a", "--sample.solver", "langevin")
    assert code == 2
    assert "unknown sample.solver 'langevin'" in err


def test_an_added_name_is_a_choice(file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    words = ["train", "--config", file, "--objective.path", "straight", "--dry-run"]
    assert run(capsys, *words)[0] == 2
    monkeypatch.setitem(PATHS, "straight", PATHS["linear"])
    assert run(capsys, *words)[0] == 0
    assert "straight" in run(capsys, "settings", "objective.path")[1]


def test_typos_in_yaml_name_file_key_and_nearest(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "typo.yaml"
    path.write_text("objective: {predictoin: x}\n")
    code, _, err = run(capsys, "train", "--config", path)
    assert code == 2
    assert "typo.yaml: unknown key 'objective.predictoin', did you mean 'objective.prediction'?" in err
    for text, message in (
        ("- 1\n", "not a mapping"),
        ("a: [", "typo.yaml, line 1: a bracket, brace or quote is not closed"),
        ("train: {lr: fast}", "train.lr"),
    ):
        path.write_text(text)
        code, _, err = run(capsys, "train", "--config", path)
        assert (code, message in err) == (2, True), err


def test_flags_are_checked_together_with_the_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A patch size of 5 does not divide the default image size, but it divides that of the file."""
    path = tmp_path / "run.yaml"
    path.write_text("model: {patcher: {image_sizes: [[20, 20]]}}\n")
    words = ["train", "--config", path, "--dry-run", "--model.patcher.patch_size"]
    assert run(capsys, *words, "5")[0] == 0
    code, _, err = run(capsys, *words, "6")
    assert (code, "image size 20x20 is not divisible by patch_size 6" in err) == (2, True)


def test_missing_shard(file: Path, capsys: pytest.CaptureFixture) -> None:
    code, _, err = run(capsys, "train", "--config", file, "--data.train", "gone-{000..002}.tar")
    assert code == 2
    assert "shard gone-000.tar does not exist" in err


def entries(text: str) -> dict[str, str]:
    """The names in the first column of help, with their descriptions."""
    rows = [line.split(maxsplit=1) for line in text.splitlines() if line.startswith("  ")]
    return {row[0]: row[1] for row in rows if len(row) == 2}


@pytest.fixture
def _small_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.usefixtures("_small_terminal")
def test_help_fits_a_terminal_of_80x24(capsys: pytest.CaptureFixture) -> None:
    """One line per command, with its whole first sentence, and one line left for the prompt."""
    code, out, _ = run(capsys, "--help")
    lines = out.splitlines()
    assert code == 0
    assert len(lines) < 24
    assert max(map(len, lines)) <= 80
    assert list(entries(out)) == list(dict.fromkeys(name.split()[0] for name in COMMANDS))
    for name, command in COMMANDS.items():
        if " " not in name:
            assert entries(out)[name] == parts(command)[0].splitlines()[0]


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.usefixtures("_small_terminal")
def test_help_of_a_group_lists_its_commands(group: str, capsys: pytest.CaptureFixture) -> None:
    out = run(capsys, group, "--help")[1]
    commands = {
        name.split()[1]: parts(command)[0] for name, command in COMMANDS.items() if name.startswith(f"{group} ")
    }
    assert entries(out) == {name: description.splitlines()[0] for name, description in commands.items()}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.usefixtures("_small_terminal")
def test_help_of_a_command(name: str, capsys: pytest.CaptureFixture) -> None:
    """Own options first, then where settings are listed, then one example; never the 300 settings."""
    code, out, _ = run(capsys, *name.split(), "--help")
    assert code == 0
    assert len(out.splitlines()) < 40
    assert max(map(len, out.splitlines())) <= 80
    assert out.startswith(f"Usage: mmgen {name}")
    assert f"Example:\n  mmgen {name}" in out
    assert ("--json" in out) == (name != "prep"), "the scripts that `prep` runs have their own options"
    sections = used_sections(COMMANDS[name])
    assert (f"mmgen settings {' '.join(sections)} " in out) == bool(sections)
    if sections:
        assert out.index("--json") < out.index("\n  --config FILE") < out.index("Example:")
        assert run(capsys, "settings", *sections)[0] == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_of_a_command_can_be_run(name: str) -> None:
    """It has the words and flags of the command, and the files of configs/ that it names exist."""
    program, *words = shlex.split(parts(COMMANDS[name])[1])
    assert program == "mmgen"
    assert not [word for word in words if word.startswith("configs/") and not Path(word).is_file()]
    if "--config" in words:
        place = words.index("--config")
        del words[place : place + 2]
    _, bound, _ = build().parse_args(words, exit_on_error=False, print_error=False)
    assert bound.arguments or len(words) == len(name.split())


def test_help_lists_the_faults_that_can_be_injected(capsys: pytest.CaptureFixture) -> None:
    for name, faults in (("lab run", LAB_FAULTS), ("check parity", PARITY_FAULTS)):
        out = run(capsys, *name.split(), "--help")[1]
        assert all(fault in out for fault in faults), name


def test_the_command_starts_without_torch() -> None:
    """`mmgen --help` is fast."""
    script = (
        "import sys\nsys.argv = ['mmgen', '--help']\nfrom mmgen.cli import main\n"
        "try: main()\nexcept SystemExit as stop: assert stop.code == 0\n"
        "assert not {'torch', 'transformers', 'scipy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Commands" in done.stdout


def double(*, config: Settings = Config(), as_json: Json = False) -> int:
    """Print twice the number of steps."""
    show({"double": 2 * config.train.steps}, as_json)
    return 3


def test_a_command_is_one_function_and_one_line(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert run(capsys, "double")[0] == 2
    monkeypatch.setitem(COMMANDS, "double", double)
    code, out, _ = run(capsys, "double", "--config", file, "--json")
    assert (code, out) == (3, f'{{"double": {2 * load(file).train.steps}}}\n')
    assert run(capsys, "double", "--config", file, "--train.steps", 21, "--json")[1] == '{"double": 42}\n'
    assert "Print twice the number of steps." in run(capsys, "--help")[1]
    assert "mmgen settings run data model" in run(capsys, "double", "--help")[1]


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
