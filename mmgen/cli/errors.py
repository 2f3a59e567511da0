"""Error messages: each names the cause and what to do, and contains no text of a library."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from cyclopts.exceptions import (
    CoercionError,
    CycloptsError,
    MissingArgumentError,
    RepeatArgumentError,
    UnknownCommandError,
    UnknownOptionError,
    UnusedCliTokensError,
)
from cyclopts.exceptions import ValidationError as InvalidError
from pydantic import ValidationError

from mmgen.config import nearest
from mmgen.config_io import example, explain_all, type_name

NOUNS = {"int": "a whole number", "float": "a number", "bool": "true or false", "Path": "a path"}
"""Types of options in words."""


def sentence(error: Exception, program: str = "mmgen") -> str:
    """The message of an error, for the user of a command of `program`."""
    if isinstance(error, ValidationError):
        return "\n".join(explain_all(error.errors()))
    if isinstance(error, CycloptsError):
        return _usage(error, program)
    if isinstance(error, OSError) and error.errno is not None:
        return _system(error)
    return re.sub(r"\[Errno \d+\] ", "", str(error)) or type(error).__name__


def _usage(error: CycloptsError, program: str) -> str:
    """The message of a wrong command, option or value on the command line."""
    if isinstance(error.__cause__, ValidationError):
        return sentence(error.__cause__)
    command = " ".join(error.command_chain or ())
    more = f"`{program} {command} --help`" if command else f"`{program} --help`"
    if isinstance(error, UnknownCommandError):
        typed = (error.unused_tokens or [""])[0]
        names = [name for name in error.app or () if not name.startswith("-")]
        full = f"{command} {typed}".strip()
        if typed.startswith("-"):
            return f"unknown option {typed}: see {more}"
        if typed == "help":
            return "unknown command 'help': see `mmgen --help`"
        suggestion = _suggest(typed, names)
        listed = f" (one of: {', '.join(names)})" if names[1:] or not suggestion else ""
        return f"unknown command '{full}'{suggestion}{listed}"
    if isinstance(error, UnknownOptionError):
        typed = error.token.keyword or error.token.value
        flags = {name for argument in error.argument_collection if argument.parse for name in argument.names}
        options = [flag[2:] for flag in sorted({*flags, "--config"}, key=lambda flag: "-" in flag[2:])]
        if command == "settings":
            return f"unknown option {typed}: write `mmgen settings {typed.lstrip('-')}`, without hyphens"
        near = nearest(typed.lstrip("-"), options)
        hint = f", did you mean --{near}?" if near else f": {more} lists options"
        takes_settings = any(flag.startswith("--run.") for flag in flags)
        return f"unknown option {typed}{hint}" + (
            ", and `mmgen settings` lists settings" if takes_settings and not near else ""
        )
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        if not error.keyword:
            return f"{_name(error)} is missing: see {more}"
        count, repeats = error.argument.token_count()
        if count > 1 and not repeats:
            return f"{error.keyword} needs {count} values, one after the other and without brackets"
        if count > 1:
            return f"{error.keyword} needs a list in quotes{example(error.keyword.removeprefix('--'))}"
        return f"{error.keyword} needs a value: see {more}"
    if isinstance(error, CoercionError) and error.token is not None:
        noun = NOUNS.get(type_name(error.target_type), type_name(error.target_type))
        return f"{_name(error)}: '{error.token.value}' is not {noun}"
    if isinstance(error, InvalidError):
        value = error.argument.tokens[0].value if error.argument and error.argument.tokens else error.value
        return f"{_name(error)} {error.exception_message} (got {value})"
    if isinstance(error, UnusedCliTokensError):
        typed = " ".join(error.unused_tokens or ())
        hint = f": see {more}"
        if typed.endswith((".yaml", ".yml")):
            hint = f", did you mean --config {typed}?"
        elif all(word.endswith((".tar", ".tgz", ".gz", ".zst")) for word in typed.split()):
            hint = ': the shell expanded a pattern of shards: put it in quotes, such as "data/train-*.tar"'
        elif typed in ("true", "false"):
            hint = f": write --NAME for true and --no-NAME for false, as in --train.no-compile (see {more})"
        elif "=" in typed and "." in typed.split("=")[0]:
            hint = f", did you mean --{typed.replace('=', ' ', 1)}?"
        return f"unexpected argument '{typed}'{hint}"
    if isinstance(error, RepeatArgumentError):
        return f"{error.token.keyword} is given more than once: keep one of them"
    return f"the command line cannot be read: see {more}"


def _name(error: CycloptsError) -> str:
    """The name of a wrong option as it was typed; a positional argument in capitals, as in help."""
    tokens = [*(error.argument.tokens if error.argument else []), getattr(error, "token", None)]
    typed = next((token.keyword for token in tokens if token and token.keyword), None)
    if typed or error.argument is None:
        return typed or "the argument"
    is_option = error.argument.index is None
    return error.argument.name if is_option else error.argument.name.lstrip("-").upper()


def _suggest(typed: str, names: list[str]) -> str:
    near = nearest(typed, names)
    return f", did you mean '{near}'?" if near else ""


def _system(error: OSError) -> str:
    """The message of an error of the operating system, with the path."""
    path = error.filename2 or error.filename
    where = f"{os.fsdecode(path)}" if isinstance(path, str | bytes | Path) else ""
    reasons = {
        errno.ENOENT: "does not exist: correct the path, or make it first",
        errno.EEXIST: "is a file where a folder is needed: choose another path",
        errno.ENOTDIR: "has a file where a folder is needed: choose another path",
        errno.EISDIR: "is a folder where a file is needed: choose another path",
        errno.EACCES: "cannot be opened, as you have no permission: change it with chmod, or choose another path",
        errno.EPERM: "cannot be opened, as you have no permission: change it with chmod, or choose another path",
        errno.EROFS: "is on a file system that cannot be written: choose another path",
        errno.ENOSPC: "cannot be written, as the disk is full: free some space, or choose another path",
    }
    reason = reasons.get(error.errno or 0)
    if where:
        return f"{where} {reason}" if reason else f"{where}: {error.strerror}"
    return error.strerror or str(error)
