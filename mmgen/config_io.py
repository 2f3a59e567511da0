"""Settings from a YAML file and from the command line; names of registries are checked here.

`mmgen.config` knows no registry, so a setting that names an entry of one is a plain string there. `REGISTRIES` says
which names each of them may have. `load` and `override` check them, and `settings` lists them.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from mmgen.config import FLAT, RENAMED, Config, choose, nearest


def _projections() -> Collection[str]:
    from mmgen.objective.layers import PROJECTIONS

    return PROJECTIONS


def _objectives() -> Collection[str]:
    from mmgen.objective import OBJECTIVES

    return OBJECTIVES


def _paths() -> Collection[str]:
    from mmgen.flow import PATHS

    return PATHS


def _weights() -> Collection[str]:
    from mmgen.flow import WEIGHTS

    return WEIGHTS


def _times() -> Collection[str]:
    from mmgen.flow import TIMES

    return TIMES


def _solvers() -> Collection[str]:
    from mmgen.flow import SOLVERS

    return [name for name, kind in SOLVERS.items() if kind.from_noise]


def _tasks() -> Collection[str]:
    from mmgen.evaluate.tasks import TASKS

    return TASKS


def _patchers() -> Collection[str]:
    from mmgen.image.latent import PATCHERS

    return PATCHERS


REGISTRIES: dict[str, Callable[[], Collection[str]]] = {
    "model.patcher.kind": _patchers,
    "model.patcher.projection": _projections,
    "objective.kind": _objectives,
    "objective.path": _paths,
    "objective.weight": _weights,
    "objective.time.distribution": _times,
    "sample.solver": _solvers,
    "eval.task": _tasks,
}
"""Dotted name of a setting to the names it may have. Registries are imported when asked: they need torch."""


@dataclass(frozen=True)
class Setting:
    """One setting, as `mmgen settings` prints it."""

    name: str
    type: str
    default: object
    """As YAML has it."""
    choices: tuple[str, ...]
    """Every value that it may have, where these are names; a setting that may be empty also takes null."""
    description: str


def load(path: str | Path) -> Config:
    """Read a YAML file into a `Config`.

    Raises:
        ValueError: the file cannot be read or is not YAML, or a key or value is wrong; the message names the
            file, the key and, for an unknown key or name, the nearest valid one.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds {type(raw).__name__}, not a mapping of sections such as 'train:'")
    try:
        notes = [*old_keys(raw)]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for note in notes:
        print(f"{path}: {note}", file=sys.stderr, flush=True)
    return _validated(raw, f"{path}: ")


def old_keys(raw: Mapping[str, object]) -> Iterator[str]:
    """A note for each kind of key that earlier versions used and that is still read.

    Raises:
        ValueError: a setting is given under its old and its new key.
    """
    objective = raw.get("objective")
    flat = [name for name in FLAT if isinstance(objective, Mapping) and name in objective]
    for name in flat:
        section = objective.get(FLAT[name]) if isinstance(objective, Mapping) else None
        if isinstance(section, Mapping) and name in section:
            new = f"objective.{FLAT[name]}.{name}"
            raise ValueError(f"objective.{name} and {new} are the same setting: keep {new}")
    if flat:
        moved = ", ".join(f"objective.{name} is now objective.{FLAT[name]}.{name}" for name in flat)
        yield f"keys of an earlier version were read: {moved}"
    for old, new in RENAMED.items():
        if _at(raw, old) is None:
            continue
        if _at(raw, new) is not None:
            raise ValueError(f"{old} and {new} are the same setting: keep {new}")
        yield f"a key of an earlier version was read: {old} is now {new}"
    model = raw.get("model")
    patcher = model.get("patcher") if isinstance(model, Mapping) else None
    vae = patcher.get("vae") if isinstance(patcher, Mapping) else None
    if isinstance(vae, Mapping) and "fingerprint" in vae:
        yield (
            "model.patcher.vae.fingerprint, mean and std of an earlier version were left out: "
            "they are now kept with the model and in its checkpoints"
        )


def override(config: Config, changes: Mapping[str, object]) -> Config:
    """A copy of `config` in which the nested fields of `changes` are replaced; raises ValueError as `load` does."""
    return _validated(merged(config.model_dump(), changes), "")


def merged(old: Mapping[str, object], new: Mapping[str, object]) -> dict[str, object]:
    """A mapping with the entries of `new` in place of those of `old`; mappings inside are merged too."""
    both = dict(old)
    for key, value in new.items():
        before = both.get(key)
        both[key] = merged(before, value) if isinstance(before, Mapping) and isinstance(value, Mapping) else value
    return both


def _validated(raw: object, source: str) -> Config:
    try:
        check_names(raw)  # before other checks, which may rest on a name
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise ValueError("\n".join(source + explain(item) for item in error.errors())) from None
    except ValueError as error:
        raise ValueError(source + str(error)) from None
    return config


def check_names(raw: object) -> None:
    """Raise ValueError where a setting names no entry of its registry, with the nearest name and all of them."""
    for setting, names in REGISTRIES.items():
        for key in (setting, *(old for old, new in RENAMED.items() if new == setting)):
            chosen = _at(raw, key)
            if isinstance(chosen, str):
                choose(dict.fromkeys(names()), chosen, setting)


def _at(raw: object, key: str) -> object:
    """The value of a dotted key in nested mappings; None where there is none."""
    for name in key.split("."):
        raw = raw.get(name) if isinstance(raw, Mapping) else None
    return raw


def explain(error: ErrorDetails) -> str:
    """One pydantic error as a sentence that names the key and, where it is unknown, the nearest key."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "value_error":  # from a section's `check`, which names the keys itself
        return str(error["ctx"]["error"])
    if error["type"] != "extra_forbidden":
        return f"{key}: {error['msg']} (got {error['input']!r})" if key else str(error["msg"])
    near = nearest(key, field_names())
    return f"unknown key '{key}'" + (f", did you mean '{near}'?" if near else "")


def field_names(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Dotted names of every setting and section."""
    names = []
    for name, field in model.model_fields.items():
        names.append(prefix + name)
        if section := section_of(field.annotation):
            names += field_names(section, f"{prefix}{name}.")
    return names


def section_of(annotation: object) -> type[BaseModel] | None:
    """The class of settings that a field holds; None where the field is a value."""
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def settings(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[Setting]:
    """Every setting in the order of the configuration file, with the choices that its registry or its type gives."""
    defaults = model().model_dump(mode="json")
    for name, field in model.model_fields.items():
        dotted, kind = prefix + name, field.annotation
        if section := section_of(kind):
            yield from settings(section, f"{dotted}.")
            continue
        choices = registered(dotted) or tuple(_literals(kind))
        description = " ".join((field.description or "").split())
        yield Setting(dotted, type_name(kind), defaults[name], choices, description)


def registered(setting: str) -> tuple[str, ...]:
    """The names of a setting's registry; none for a setting without one."""
    return tuple(REGISTRIES[setting]()) if setting in REGISTRIES else ()


def _literals(kind: object) -> Iterator[str]:
    if get_origin(kind) is Literal:
        yield from map(str, get_args(kind))
    else:
        for inner in get_args(kind):
            yield from _literals(inner)


def type_name(kind: object) -> str:
    """A type as people write it: `int`, `list[str]`, `str | None`; a choice among names is `str`."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return type_name(inner[0])
    if origin is Literal:
        return "str"
    if origin in (Union, types.UnionType):
        return " | ".join(type_name(item) for item in inner)
    if origin is not None:
        return f"{origin.__name__}[{', '.join(type_name(item) for item in inner)}]"
    if section_of(kind):
        return "dict"
    names: dict[object, str] = {types.NoneType: "null", Any: "any", Ellipsis: "..."}
    return names.get(kind) or str(getattr(kind, "__name__", kind))
