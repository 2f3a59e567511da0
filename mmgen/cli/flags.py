"""Parameters that commands share, and how settings become flags.

A command takes `config: Settings`. For the command line its type is replaced by a twin of `Config` in which every
field is a flag. The twin has the fields and their types, but not the checks between fields: those hold for the whole
configuration, after the flags have been put on top of the YAML file.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from functools import cache, wraps
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from cyclopts import Parameter
from pydantic import BaseModel, BeforeValidator, create_model
from pydantic.fields import FieldInfo

from mmgen.config import FLAT, OBJECTIVE_SETTINGS, Config, ObjectiveConfig, TimeConfig
from mmgen.config_io import section_of


@dataclass(frozen=True)
class Uses:
    """The sections of settings that a command's help shows; the others can be set as well."""

    sections: tuple[str, ...] = tuple(Config.model_fields)


Choices = tuple[tuple[str, tuple[str, ...]], ...]
"""Settings with the names that each may have."""
Settings = Annotated[Config, Uses()]
RunSettings = Annotated[Config, Uses(("run", "sample"))]
"""Settings of a command on a trained run: the model and its objective are the run's own."""
DataSettings = Annotated[Config, Uses(("run", "data", "model", "objective"))]
Json = Annotated[bool, Parameter(name="--json", help="Print one JSON document and nothing else.", negative="")]
Folder = Annotated[Path, Parameter(help="Folder for the images.")]
Rounds = Annotated[int, Parameter(help="Interleaved repetitions.")]


class Overrides(BaseModel):
    """Base of the twins of sections."""

    model_config = Config.model_config


def with_flags(command: Callable[..., int], choices: Choices = ()) -> Callable[..., int]:
    """The command with a flag for every setting in place of `config`; a command without `config` as it is.

    `choices` are what help lists.
    """
    hints = get_type_hints(command, include_extras=True)
    if "config" not in hints:
        return command
    (uses,) = (item for item in get_args(hints["config"]) if isinstance(item, Uses))
    flags = twin(Config, uses.sections, choices)
    hints["config"] = Annotated[flags, Parameter(name="*")]
    signature = inspect.signature(command)
    parameters = [
        parameter.replace(annotation=hints[name], default=flags() if name == "config" else parameter.default)
        for name, parameter in signature.parameters.items()
    ]

    @wraps(command)
    def flagged(*args: object, **named: object) -> int:
        return command(*args, **named)

    flagged.__annotations__ = hints
    flagged.__dict__["__signature__"] = signature.replace(parameters=parameters)
    return flagged


@cache
def twin(model: type[BaseModel], shown: tuple[str, ...], choices: Choices, prefix: str = "") -> type[Overrides]:
    """A class with the fields of a section and of those inside it, and without their checks."""
    fields: dict[str, Any] = {}
    for name, field in [*model.model_fields.items(), *_earlier(model)]:
        own = copy(field)
        kind: object = field.annotation
        if section := section_of(kind):
            kind = twin(section, shown, choices, f"{prefix}{name}.")
            own.default = kind()
        elif get_origin(kind) is list:
            own.metadata = [*field.metadata, BeforeValidator(_whole_list)]
        elif names := dict(choices).get(prefix + name):
            own.metadata = [*field.metadata, Parameter(choices=names)]
        if name not in model.model_fields:
            own.metadata = [*own.metadata, Parameter(show=False)]
        if not prefix:
            own.metadata = [*own.metadata, Parameter(show=name in shown, group=f"Settings of {name}")]
        own.annotation = kind  # type: ignore[assignment]
        fields[name] = (kind, own)
    return create_model(model.__name__, __base__=Overrides, __doc__=model.__doc__, **fields)


def _earlier(model: type[BaseModel]) -> Iterator[tuple[str, FieldInfo]]:
    """Fields under the names that they had in earlier versions."""
    if model is ObjectiveConfig:
        for name, section in FLAT.items():
            yield name, OBJECTIVE_SETTINGS[section].model_fields[name]
    elif model is TimeConfig:
        yield "sampler", TimeConfig.model_fields["distribution"]


def _whole_list(value: object) -> object:
    """`[[40, 40], [20, 40]]`, a list of lists as YAML writes it, is read as one element: take the lists out of it."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
        inner = value[0]
        return inner if inner and all(isinstance(item, list) for item in inner) else value
    return value
