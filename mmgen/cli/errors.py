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
from mmgen.config_io import explain, type_name

NOUNS = {"int": "a whole number", "float": "a number", "bool": "true or false", "Path": "a path"}
"""Types of options in words."""


def sentence(error: Exception) -> str:
    """The message of an error, for the user of a command."""
    if isinstance(error, ValidationError):
        return "\n".join(dict.fromkeys(explain(item) for item in error.errors()))
    if isinstance(error, CycloptsError):
        return _usage(error)
    if isinstance(error, OSError) and error.errno is not None:
        return _system(error)
    return re.sub(r"\[Errno \d+\] ", "", str(error)) or type(error).__name__


def _usage(error: CycloptsError) -> str:
    """The message of a wrong command, option or value on the command line."""
    if isinstance(error.__cause__, ValidationError):
        return sentence(error.__cause__)
    command = " ".join(error.command_chain or ())
    more = f"`mmgen {command} --help`" if command else "`mmgen --help`"
    if isinstance(error, UnknownCommandError):
        typed = (error.unused_tokens or [""])[0]
        names = [name for name in error.app or () if not name.startswith("-")]
        full = f"{command} {typed}".strip()
        return f"unknown command '{full}'{_suggest(typed, names)} (one of: {', '.join(names)})"
    if isinstance(error, UnknownOptionError):
        typed = error.token.keyword or error.token.value
        flags = {name for argument in error.argument_collection if argument.parse for name in argument.names}
        options = [flag[2:] for flag in sorted({*flags, "--config"}, key=lambda flag: "-" in flag[2:])]
        near = nearest(typed.lstrip("-"), options)
        hint = f", did you mean --{near}?" if near else f": {more} lists options, and `mmgen settings` lists settings"
        return f"unknown option {typed}{hint}"
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        if not error.keyword:
            return f"{_name(error)} is missing: see {more}"
        count = error.argument.token_count()[0]
        return f"{error.keyword} needs {'a value' if count == 1 else f'{count} values'}: see {more}"
    if isinstance(error, CoercionError) and error.token is not None:
        noun = NOUNS.get(type_name(error.target_type), type_name(error.target_type))
        return f"{_name(error)}: '{error.token.value}' is not {noun}"
    if isinstance(error, InvalidError):
        value = error.argument.tokens[0].value if error.argument and error.argument.tokens else error.value
        return f"{_name(error)} {error.exception_message} (got {value})"
    if isinstance(error, UnusedCliTokensError):
        typed = " ".join(error.unused_tokens or ())
        return f"unexpected argument '{typed}': see {more}"
    if isinstance(error, RepeatArgumentError):
        return f"{error.token.keyword} is given more than once: keep one of them"
    error.verbose = False
    return str(error)


def _name(error: CycloptsError) -> str:
    """The name of a wrong option as it was typed; a positional argument in capitals, as in help."""
    tokens = [*(error.argument.tokens if error.argument else []), getattr(error, "token", None)]
    typed = next((token.keyword for token in tokens if token and token.keyword), None)
    return typed or (error.argument.name.lstrip("-").upper() if error.argument else "the argument")


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
