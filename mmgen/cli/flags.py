"""Parameters that commands share, and how settings become flags.

A command has the parameter `config: Settings`. On the command line, `Config` is replaced by a class with the same
fields, in which every field is a flag. That class has no checks between fields, because these apply to the whole
configuration: the YAML file with the flags on top.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from functools import cache, wraps
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import yaml
from cyclopts import Parameter
from pydantic import BaseModel, BeforeValidator, create_model
from pydantic.fields import FieldInfo

from mmgen.config import FLAT, OBJECTIVE_SETTINGS, Config, ObjectiveConfig, TimeConfig
from mmgen.config_io import section_of


@dataclass(frozen=True)
class Uses:
    """The sections of settings that a command uses, for its help. All other settings are accepted too."""

    sections: tuple[str, ...] = tuple(Config.model_fields)
    trained: bool = False
    """Whether the command works on a trained model, which its first argument or `--run` may name."""

    @classmethod
    def of(cls, command: Callable[..., int]) -> Uses | None:
        """What the type of a command's `config` holds; None for a command without settings."""
        hints = get_type_hints(command, include_extras=True)
        return next((item for item in get_args(hints.get("config")) if isinstance(item, Uses)), None)


def at_least(minimum: int) -> Callable[[object, int], None]:
    """A validator for `Parameter(validator=...)` that refuses smaller values."""

    def check(_type: object, value: int) -> None:
        if value < minimum:
            raise ValueError(f"must be at least {minimum}")

    return check


Settings = Annotated[Config, Uses()]
RunSettings = Annotated[Config, Uses(("run", "sample"), trained=True)]
"""Settings of a command on a trained run; settings of model and objective are stored with the run."""
DataSettings = Annotated[Config, Uses(("run", "data", "model", "objective"))]
ConfigFile = Annotated[Path | None, Parameter(parse=False)]
"""Type of a parameter `config_file`: the file of `--config`, for a command that prints it."""
Json = Annotated[bool, Parameter(name="--json", help="Print the result as one JSON document.", negative="")]
Folder = Annotated[Path, Parameter(help="Folder that the images are written to.")]
Rounds = Annotated[int, Parameter(help="Repetitions; the compared variants take turns in each.", validator=at_least(1))]


RUN = "The trained model: a run folder, a checkpoint or an exported folder."


class Overrides(BaseModel):
    """Base of the classes that `twin` makes."""

    model_config = Config.model_config


def with_flags(command: Callable[..., int]) -> Callable[..., int]:
    """Replace the parameter `config` of a command by a flag for every setting; a command without it is unchanged.

    A command on a trained model also gets the parameter `run`, its first argument if it has no others.
    """
    hints = get_type_hints(command, include_extras=True)
    if "config" not in hints:
        return command
    flags = twin(Config)
    hints["config"] = Annotated[flags, Parameter(name="*")]
    signature = inspect.signature(command)
    parameters = [
        parameter.replace(annotation=hints[name], default=flags() if name == "config" else parameter.default)
        for name, parameter in signature.parameters.items()
    ]

    uses = Uses.of(command)
    if uses is not None and uses.trained:
        hints["run"] = Annotated[Path | None, Parameter(help=RUN)]
        words = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)
        kind = inspect.Parameter.KEYWORD_ONLY if words else inspect.Parameter.POSITIONAL_OR_KEYWORD
        run = inspect.Parameter("run", kind, default=None, annotation=hints["run"])
        parameters = [*parameters[:1], run, *parameters[1:]] if words else [run, *parameters]

    @wraps(command)
    def flagged(*args: object, **named: object) -> int:
        return command(*args, **named)

    flagged.__annotations__ = hints
    flagged.__dict__["__signature__"] = signature.replace(parameters=parameters)
    return flagged


@cache
def twin(model: type[BaseModel]) -> type[Overrides]:
    """A class with the fields of a section and of the sections inside it, without their checks.

    Help shows none of these flags, since there are 300 of them: `mmgen settings` lists and searches them.
    """
    fields: dict[str, Any] = {}
    for name, field in [*model.model_fields.items(), *_earlier(model)]:
        flag = copy(field)
        kind: object = field.annotation
        if section := section_of(kind):
            kind = twin(section)
            flag.default = kind()
        elif get_origin(kind) is list:
            nested = get_origin(get_args(kind)[0]) in (list, tuple)
            flag.metadata = [*field.metadata, BeforeValidator(_whole_list if nested else _plain_list)]
        flag.metadata = [*flag.metadata, Parameter(show=False)]
        flag.annotation = kind  # type: ignore[assignment]
        fields[name] = (kind, flag)
    return create_model(model.__name__, __base__=Overrides, __doc__=model.__doc__, **fields)


def _earlier(model: type[BaseModel]) -> Iterator[tuple[str, FieldInfo]]:
    """Yield the fields that are now in sections of `objective` and were keys of `objective` in earlier versions."""
    if model is ObjectiveConfig:
        for name, section in FLAT.items():
            yield name, OBJECTIVE_SETTINGS[section].model_fields[name]
    elif model is TimeConfig:
        yield "sampler", TimeConfig.model_fields["distribution"]


def _whole_list(value: object) -> object:
    """Unwrap a list such as `[[40, 40], [20, 40]]` or `[]`, which cyclopts reads as a single element."""
    if value == ["null"]:
        return None  # which no list accepts, so that it is an error
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
        inner = value[0]
        return inner if all(isinstance(item, list) for item in inner) else value
    return value


def _plain_list(value: object) -> object:
    """Unwrap a list of plain values in one word, such as `[1, 2]` or `[red, green]`, and refuse null."""
    if isinstance(value, list) and len(value) == 1:
        (only,) = value
        if isinstance(only, str) and only.startswith("[") and only.endswith("]"):
            try:
                only = yaml.safe_load(only)
            except yaml.YAMLError as error:
                raise ValueError(f"is not a list such as [a, b]: {str(error).splitlines()[0]}") from None
        if isinstance(only, list):
            return only
    return _whole_list(value)
