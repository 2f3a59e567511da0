"""The text of `--help`: usage, a command's own options, how to give settings, and one example.

The first line of a command's docstring is its line in the list of commands. A last part that begins with `Example:`
holds one command line that can be copied and run.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from cyclopts.help import DescriptionRenderer, HelpPanel
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

from mmgen.cli.flags import Uses

EXAMPLE = "\n\nExample:\n"
OVERVIEW = "mmgen COMMAND --help: options and an example; each setting is a flag too."
"""The last line of `mmgen --help`."""
GROUP = "mmgen {} COMMAND --help    options and an example of one command"
"""The last line of the help of commands of two words."""
SETTINGS = """\
Settings:
  --config FILE        YAML file of settings
  --SECTION.KEY VALUE  one setting, such as --run.dir FOLDER; overrides the file
  mmgen settings {}    lists them"""


class Columns:
    """Prints help in two plain columns, without boxes, so that the list of commands fits a terminal of 80x24."""

    show_metavar = True

    def __init__(self) -> None:
        self._describe = DescriptionRenderer()

    def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
        """Print one panel: a blank line, its title, then a row per command or option."""
        if not panel.entries:
            return
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column()
        for entry in panel.entries:
            is_command = panel.format == "command"
            names = entry.positive_names if is_command else entry.display_labels_with_metavar
            entry = entry.copy(default=None) if entry.default == "False" else entry
            table.add_row(Text("  " + ", ".join(names)), self._describe(entry))
        _print(console, "", f"{panel.title}:", *_lines(console, table))

    def render_usage(self, console: Console, options: ConsoleOptions, usage: Any) -> None:
        """Print the usage line."""
        if usage:
            _print(console, f"Usage: {usage}".rstrip())

    def render_description(self, console: Console, options: ConsoleOptions, description: Any) -> None:
        """Print a blank line and the description."""
        _print(console, "", *_lines(console, description))


def _lines(console: Console, shown: Any) -> list[str]:
    """The lines of a table or text, wrapped to the terminal, without spaces at their ends."""
    with console.capture() as text:
        console.print(shown)
    return [line.rstrip() for line in text.get().rstrip().splitlines()]


def _print(console: Console, *lines: str) -> None:
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def parts(command: Callable[..., int]) -> tuple[str, str]:
    """The description and the example in a command's docstring; the example is empty if there is none."""
    description, _, example = (inspect.getdoc(command) or "").partition(EXAMPLE)
    return description, textwrap.dedent(example).strip()


def closing(command: Callable[..., int]) -> str:
    """The end of a command's help: how to give and find its settings, and its example."""
    _, example = parts(command)
    sections = used_sections(command)
    blocks = [SETTINGS.format(" ".join(sections))] if sections else []
    if example:
        blocks.append("Example:\n" + textwrap.indent(example, "  "))
    return "\n\n".join(blocks)


def used_sections(command: Callable[..., int]) -> tuple[str, ...]:
    """The sections of settings in the type of a command's `config`; none for a command without settings."""
    uses = Uses.of(command)
    return uses.sections if uses else ()
