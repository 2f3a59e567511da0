"""The guides (`README.md` files and CONTRIBUTING.md): their fences, links and generated tables.

`python -m tests.guides --write` writes every generated table again. A table is between two comment lines:

    <!-- table: registry solvers -->
    <!-- end -->

Its name is `files FOLDER`, `settings SECTION`, `registry NAME`, `commands` or `results`.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from mmgen import config_io

ROOT = Path(__file__).parent.parent
TABLE = re.compile(r"^(<!-- table: (.+?) -->\n)(.*?)^(<!-- end -->)$", re.MULTILINE | re.DOTALL)
FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
REGISTRIES = {
    "paths": "mmgen.flow.schedule:PATHS",
    "solvers": "mmgen.flow.solvers:SOLVERS",
    "distributions": "mmgen.flow.time:TIMES",
    "weights": "mmgen.flow.loss:WEIGHTS",
    "conversions": "mmgen.flow.path:KINDS",
    "objectives": "mmgen.objective:OBJECTIVES",
    "patchers": "mmgen.image.latent:PATCHERS",
    "projections": "mmgen.objective.layers:PROJECTIONS",
    "tasks": "mmgen.evaluate.tasks:TASKS",
    "extractors": "mmgen.evaluate.extractors:EXTRACTORS",
    "metrics": "mmgen.evaluate.metrics:METRICS",
    "baselines": "mmgen.evaluate.baselines:BASELINES",
    "experiments": "mmgen.lab.catalog:EXPERIMENTS",
}
HEADINGS = {"conversions": "quantity", "extractors": "`eval.features`", "distributions": "timestep distribution"}


@dataclass(frozen=True)
class Fence:
    """One fenced block of a guide."""

    language: str
    """`bash`, `python`, or another word for text that is only shown."""
    skipped: bool
    """It gives a reason not to be run."""
    text: str
    file: str = ""
    """The file that a reader makes of the block, as in a fence that begins with `yaml mine.yaml`."""

    @property
    def commands(self) -> list[str]:
        """The lines of a shell block: continued lines joined, lines of comments left out."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line for line in lines if line.strip() and not line.startswith("#")]


def guides() -> list[Path]:
    """Every guide of the repository, relative to its root."""
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [Path(line) for line in listed.stdout.splitlines()]


def fences(text: str) -> list[Fence]:
    """The fenced blocks of a guide, in order."""
    return [
        Fence(language, "norun=" in options, text, options.strip() if language == "yaml" else "")
        for language, options, text in FENCE.findall(text)
        if language
    ]


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")


def without_fences(text: str) -> str:
    """A guide without its fenced blocks."""
    return FENCE.sub("", text)


def broken_links(path: Path) -> list[str]:
    """Relative links of a guide whose file or anchor does not exist."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_fences((ROOT / path).read_text())):
        if re.match(r"\w+:", target):
            continue
        place, _, anchor = target.partition("#")
        file = (ROOT / path.parent / place).resolve() if place else ROOT / path
        if not file.exists():
            broken.append(target)
        elif anchor and file.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", without_fences(file.read_text()), re.MULTILINE)
            if anchor not in map(slug, headings):
                broken.append(target)
    return broken


def first_sentence(text: str | None) -> str:
    """The first sentence of a docstring, on one line."""
    paragraph = " ".join((text or "").strip().split("\n\n")[0].split())
    return re.split(r"(?<=[.?!]) (?=[A-Z`])", paragraph)[0].removesuffix(".")


def described(module: Any, name: str, entry: Any) -> str:
    """What a registry's entry is, from the docstring of its function or class."""
    if isinstance(entry, str):
        return first_sentence(entry)
    candidates = [entry, getattr(entry, "make", None), getattr(entry, "run", None), getattr(module, name, None)]
    for candidate in candidates:
        options = ""
        while isinstance(candidate, partial):
            options = "".join(f" ({key} `{value}`)" for key, value in candidate.keywords.items())
            candidate = candidate.func
        is_code = inspect.isfunction(candidate) or inspect.isclass(candidate)
        if is_code and (text := first_sentence(inspect.getdoc(candidate))):
            return text + options
    raise ValueError(f"{module.__name__}: '{name}' has no docstring for the table of its registry")


def rows_of_registry(name: str) -> Iterable[tuple[str, ...]]:
    module_name, variable = REGISTRIES[name].split(":")
    module = import_module(module_name)
    registry: Mapping[str, Any] = getattr(module, variable)
    yield HEADINGS.get(name, name.removesuffix("s")), "what it is"
    for key, entry in registry.items():
        source = import_module(function.__module__) if (function := getattr(entry, "make", None)) else module
        yield f"`{key}`", described(source, key, entry)


def rows_of_files(folder: str) -> Iterable[tuple[str, ...]]:
    yield "file", "what it holds"
    for path in sorted((ROOT / folder).iterdir()):
        source = path / "__init__.py" if path.is_dir() else path
        if source.suffix != ".py" or not source.exists() or path.name == "__init__.py":
            continue
        text = first_sentence(ast.get_docstring(ast.parse(source.read_text())))
        yield f"`{path.name}/`" if path.is_dir() else f"`{path.name}`", text


def rows_of_settings(section: str) -> Iterable[tuple[str, ...]]:
    yield "setting", "type", "default", "meaning"
    found = [item for item in config_io.settings() if f"{item.name}.".startswith(f"{section}.")]
    if not found:
        raise ValueError(f"no setting is in section '{section}'")
    for item in found:
        choices = f" One of {', '.join(f'`{choice}`' for choice in item.choices)}." if item.choices else ""
        yield f"`{item.name}`", item.type, f"`{json.dumps(item.default)}`", item.description + choices


def rows_of_commands() -> Iterable[tuple[str, ...]]:
    from mmgen.cli.commands import COMMANDS

    yield "command", "what it does"
    for words, function in COMMANDS.items():
        yield f"`mmgen {words}`", first_sentence(inspect.getdoc(function))


RESULTS = {
    "t2i_accuracy": "accuracy of images drawn from captions",
    "t2i_accuracy_w1": "the same, without guidance",
    "t2i_accuracy_heldout_combination": "the same, combinations not in the training set",
    "t2i_ceiling": "accuracy of the judge on real images",
    "i2t_accuracy": "accuracy of captions of images",
    "within_class_variance_ratio": "variety within a class (real images: 1)",
    "parameters": "parameters",
    "steps": "training steps",
    "train_seconds": "seconds of training",
}
COLUMNS = ("scenes, Transfusion", "digits, Transfusion", "digits, MAR `masked`", "digits, MAR `raster`")
"""The rows and columns of the README's table, which are copied from the table of all scores in configs/README.md."""


def rows_of_results() -> Iterable[tuple[str, ...]]:
    lines = (ROOT / "configs" / "README.md").read_text().splitlines()
    cells = {line.split("|")[1].strip().strip("`"): line for line in lines if line.startswith("|")}
    assert cells["score"].count("|") == len(COLUMNS) + 2
    yield "", *COLUMNS
    for key, label in RESULTS.items():
        yield label, *(cell.strip() for cell in cells[key].strip("|").split("|")[1:])


TABLES: dict[str, Callable[..., Iterable[tuple[str, ...]]]] = {
    "registry": rows_of_registry,
    "files": rows_of_files,
    "settings": rows_of_settings,
    "commands": rows_of_commands,
    "results": rows_of_results,
}


def table(name: str) -> str:
    """The Markdown of a generated table.

    Raises:
        ValueError: no such table.
    """
    kind, *words = name.split()
    if kind not in TABLES:
        raise ValueError(f"no table '{name}' (one of: {', '.join(TABLES)})")
    head, *rows = (tuple(cell.replace("|", "\\|").replace("\n", " ") for cell in row) for row in TABLES[kind](*words))
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines).replace("| --- ", "|---").replace("--- |\n", "---|\n")


def with_tables(text: str) -> str:
    """A guide with every generated table as the code gives it today."""
    return TABLE.sub(lambda match: f"{match[1]}\n{table(match[2])}\n{match[4]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Check the generated tables of the guides.")
    parser.add_argument("--write", action="store_true", help="write them again")
    options = parser.parse_args()
    stale = []
    for path in guides():
        text = (ROOT / path).read_text()
        if (new := with_tables(text)) != text:
            stale.append(str(path))
            if options.write:
                (ROOT / path).write_text(new)
    print(f"{'written' if options.write else 'out of date'}: {', '.join(stale) or 'none'}")


if __name__ == "__main__":
    main()
