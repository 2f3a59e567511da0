"""The program `mmgen`: parses the command line, runs the command, and turns errors into messages and exit codes."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Annotated

import cyclopts
import docstring_parser
from cyclopts import App, Parameter

from mmgen import __version__
from mmgen.cli.commands import COMMANDS, GROUPS
from mmgen.cli.errors import sentence
from mmgen.cli.flags import Overrides, with_flags
from mmgen.cli.help import GROUP, OVERVIEW, Columns, closing, parts
from mmgen.cli.prep import asks_for_script, run_script
from mmgen.cli.pulse import pulse
from mmgen.cli.run import holds_model
from mmgen.cli.show import log
from mmgen.config import Config
from mmgen.config_io import load, override

USAGE = 2
"""Exit code of a wrong command line, setting or file."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as in shells. `mmgen train` saves a checkpoint and ends with 75 instead."""


def main() -> None:
    """Run the command of the command line and exit with its code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _choose_accelerator()
    words = [word for word in sys.argv[1:2] if not word.startswith("-")]
    script = asks_for_script(sys.argv[1:])  # it has a pulse of its own
    try:
        with nullcontext() if script else pulse(" ".join(["mmgen", *words])):
            code = launch(sys.argv[1:])
            sys.stdout.flush()
    except KeyboardInterrupt:
        code = print_error("interrupted", INTERRUPTED)
    except BrokenPipeError:  # as in `mmgen settings | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except (FloatingPointError, ChildProcessError) as error:
        code = print_error(str(error), 1)
    except (cyclopts.CycloptsError, ValueError, OSError, ImportError) as error:
        code = print_error(sentence(error))
    sys.exit(code or 0)


def launch(words: Sequence[str]) -> int:
    """Run a command with the settings of its YAML file and its flags; returns its exit code.

    Raises:
        CycloptsError: the command or an option is unknown.
        ValueError: a setting is wrong.
    """
    if asks_for_script(words):
        return run_script(words[1:])
    app = build()

    @app.meta.default
    def with_settings(
        *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
        config: Annotated[Path | None, Parameter(show=False)] = None,
    ) -> int:
        base = Config() if config is None else load(config)
        command, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
        if "config" in inspect.signature(command).parameters:
            given = bound.arguments.get("config")
            changes = given.model_dump(exclude_unset=True) if isinstance(given, Overrides) else {}
            if folder := _take_model(bound):
                if "dir" in changes.get("run", {}):
                    raise ValueError(f"the model {folder} and --run.dir are both given: leave one of them out")
                from mmgen.train.checkpoint.trained import stored_settings  # it imports torch

                base = override(stored_settings(folder) if config is None else base, {"run": {"dir": folder}})
            bound.arguments["config"] = override(base, changes)
        if "config_file" in inspect.signature(command).parameters:
            bound.arguments["config_file"] = config
        return int(command(*bound.args, **bound.kwargs) or 0)

    return int(app.meta(words, exit_on_error=False, print_error=False, result_action="return_value") or 0)


def _take_model(bound: inspect.BoundArguments) -> Path | None:
    """Take the folder of a trained model out of the arguments: `--run`, or a first argument that is such a folder."""
    named: Path | None = bound.arguments.pop("run", None)
    words = [
        name
        for name, parameter in bound.signature.parameters.items()
        if parameter.kind is parameter.VAR_POSITIONAL and "run" in bound.signature.parameters
    ]
    given = bound.arguments.get(words[0], ()) if words else ()
    if named is None and given:
        first = Path(given[0])
        if holds_model(first):
            named, bound.arguments[words[0]] = first, given[1:]
        elif given[1:] and _looks_like_a_folder(first):
            raise ValueError(f"the folder {first} does not exist: correct the path of the trained model")
    return named


def _looks_like_a_folder(path: Path) -> bool:
    """Whether a word that names nothing is rather a mistyped folder than a caption or a picture."""
    text = str(path)
    return os.sep in text and not re.search(r"\s", text) and not path.suffix and not path.exists()


# cyclopts reads the source of a class and of its bases for every section of settings, and of pydantic's base each time.
docstring_parser.parse_from_object = cache(docstring_parser.parse_from_object)


def build() -> App:
    """The command-line program with all commands, in the order of `COMMANDS`."""
    app = App(
        name="mmgen",
        version=__version__,
        help="Train and use one transformer over text and images.",
        help_format="plaintext",
        help_formatter=Columns(),
        help_epilogue=OVERVIEW,
        group_parameters="Options",
    )
    for flag in ("--help", "--version"):
        app[flag].show = False
    groups: dict[str, App] = {}
    for order, (words, command) in enumerate(COMMANDS.items()):
        *parents, name = words.split()
        for parent in set(parents) - set(groups):
            groups[parent] = App(name=parent, help=GROUPS[parent], help_epilogue=GROUP.format(parent), sort_key=order)
            app.command(groups[parent])
        parent_app = groups[parents[0]] if parents else app
        description, _ = parts(command)
        parent_app.command(
            with_flags(command), name=name, help=description, help_epilogue=closing(command), sort_key=order
        )
    return app


def print_error(message: str, code: int = USAGE) -> int:
    """Print an error message on standard error and return the exit code."""
    log(f"mmgen: error: {message}")
    return code


def _choose_accelerator() -> None:
    # DeepSpeed, which accelerate imports, warns at every start without a GPU unless an accelerator is chosen.
    if not Path("/dev/nvidiactl").exists() and sys.platform == "linux":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
