"""From the words of a command line to a command with its settings, and from errors to exit codes."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import cyclopts
from cyclopts import App, Parameter
from pydantic import ValidationError

from mmgen import __version__
from mmgen.cli.commands import COMMANDS, GROUPS
from mmgen.cli.flags import Choices, Overrides, with_flags
from mmgen.cli.show import log
from mmgen.config import Config
from mmgen.config_io import REGISTRIES, explain, load, override, registered

USAGE = 2
"""Exit code of an error in what the user gave."""
HELP = ("--help", "-h")
CONFIG_HELP = "YAML file of settings, each of which is a flag too: `mmgen settings` lists them."


def main() -> None:
    """Entry point: run the command of the command line and exit with its code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _choose_accelerator()
    try:
        code = launch(sys.argv[1:])
    except (cyclopts.CycloptsError, ValidationError) as error:
        wrong = error if isinstance(error, ValidationError) else error.__cause__
        explained = isinstance(wrong, ValidationError) and "\n".join(explain(item) for item in wrong.errors())
        code = complain(explained or str(error))
    except (FloatingPointError, ChildProcessError) as error:
        code = complain(str(error), 1)
    except (ValueError, OSError, ImportError) as error:
        code = complain(str(error))
    sys.exit(code or 0)


def launch(words: Sequence[str]) -> int:
    """Read the YAML file, put the overrides on top, and run the command; returns its exit code."""
    wants_help = any(word in HELP for word in words) and _names_command(words)
    app = build(tuple((name, registered(name)) for name in REGISTRIES) if wants_help else ())

    @app.meta.default
    def with_settings(
        *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
        config: Annotated[Path | None, Parameter(help=CONFIG_HELP)] = None,
    ) -> int:
        base = Config() if config is None else load(config)
        command, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
        if "config" in inspect.signature(command).parameters:
            given = bound.arguments.get("config")
            changes = given.model_dump(exclude_unset=True) if isinstance(given, Overrides) else {}
            bound.arguments["config"] = override(base, changes)
        return int(command(*bound.args, **bound.kwargs) or 0)

    return int(app.meta(words, exit_on_error=False, print_error=False, result_action="return_value") or 0)


def build(choices: Choices = ()) -> App:
    """The command-line program; help of settings lists `choices`, which are registries' and need torch."""
    app = App(name="mmgen", version=__version__, help="Train and use one transformer over text and images.")
    groups = {name: App(name=name, help=text) for name, text in GROUPS.items()}
    for group in groups.values():
        app.command(group)
    for words, command in COMMANDS.items():
        *parents, name = words.split()
        place = groups[parents[0]] if parents else app
        place.command(with_flags(command, choices), name=name)
    return app


def _names_command(words: Sequence[str]) -> bool:
    line = f" {' '.join(words)} "
    return any(f" {name} " in line for name in COMMANDS)


def complain(message: str, code: int = USAGE) -> int:
    """Print an error for people and return the exit code."""
    log(f"mmgen: error: {message}")
    return code


def _choose_accelerator() -> None:
    # DeepSpeed, which accelerate imports, warns at every start without a GPU unless an accelerator is chosen.
    if not Path("/dev/nvidiactl").exists() and sys.platform == "linux":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
