"""Reading settings from a YAML file and from overrides, with error messages that name the key and the fix.

`mmgen.config` imports no registry, so a setting that names an entry of a registry is a plain string there. `REGISTRIES`
holds the names that each such setting may have. `load` and `override` check them, and `settings` lists them.
"""

from __future__ import annotations

import json
import re
import sys
import types
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, to_jsonable_python

from mmgen.config import CAPTIONS, FLAT, OBJECTIVE_SETTINGS, RENAMED, AddedSectionError, Config, choose, nearest


def _entries(place: str) -> Callable[[], Collection[str]]:
    """A function that imports a registry, named as `MODULE:NAME`."""
    module, _, name = place.partition(":")

    def entries() -> Collection[str]:
        found: Collection[str] = getattr(import_module(module), name)
        return found

    return entries


def _solvers() -> Collection[str]:
    from mmgen.flow import SOLVERS

    return [name for name, kind in SOLVERS.items() if kind.from_noise]


def _tasks() -> Collection[str]:
    from mmgen.evaluate.tasks import TASKS

    return [CAPTIONS, *TASKS]


REGISTRIES: dict[str, Callable[[], Collection[str]]] = {
    "model.patcher.kind": _entries("mmgen.image.latent:PATCHERS"),
    "model.patcher.projection": _entries("mmgen.objective.layers:PROJECTIONS"),
    "objective.kind": _entries("mmgen.objective:OBJECTIVES"),
    "objective.path": _entries("mmgen.flow:PATHS"),
    "objective.weight": _entries("mmgen.flow:WEIGHTS"),
    "objective.time.distribution": _entries("mmgen.flow:TIMES"),
    "sample.solver": _solvers,
    "eval.task": _tasks,
    "eval.features": _entries("mmgen.evaluate.extractors:EXTRACTORS"),
}
"""Dotted name of a setting to the names that it may have. Registries are imported on demand, as they import torch."""


@dataclass(frozen=True)
class Setting:
    """One setting, as `mmgen settings` prints it."""

    name: str
    type: str
    default: object
    """The default, in the form of YAML."""
    choices: tuple[str, ...]
    """Every name that the setting may have; empty for a setting that is not a name. An optional one also takes null."""
    description: str


def load(path: str | Path) -> Config:
    """Read a YAML file into a `Config`.

    Raises:
        ValueError: the file cannot be read, is not YAML, or has a wrong key or value. The message names the file, the
            key and, for an unknown key or name, the nearest valid one.
    """
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        holds = "is empty" if raw is None else f"holds {_shortened(raw)}"
        raise ValueError(f"{path} {holds}, not a mapping of sections such as 'train: {{steps: 1000}}'")
    try:
        notes = [*old_keys(raw)]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for note in notes:
        print(f"{path}: {note}", file=sys.stderr, flush=True)
    return _validated(raw, f"{path}: ")


class _Loader(yaml.SafeLoader):
    """The safe loader of PyYAML, which refuses a key that is given twice instead of keeping the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[object, int] = {}
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            name, line = key.value, key.start_mark.line + 1
            if isinstance(name, str) and name in lines:
                raise ValueError(f"the key '{name}' is given twice (lines {lines[name]} and {line}): keep one")
            lines[str(name)] = line
        return super().construct_mapping(node, deep)


YAML_PROBLEMS = {
    r"'\\t'": "a tab in the indentation: use spaces",
    "mapping values are not allowed": "put quotes around a value that contains ': ', or correct the indentation",
    r"expected ',' or|<stream end>|found unexpected end of stream": "a bracket, brace or quote is not closed",
    "could not determine a constructor": "a tag that begins with '!': remove it",
    "undefined alias": "a value that begins with '*': put quotes around it",
    "expected a single document": "'---' begins a second document: keep one",
    "special characters are not allowed": "a control character: remove it",
}
"""Texts of PyYAML's errors, as regular expressions, and what is wrong in plain words."""


def read_yaml(path: str | Path) -> Any:
    """The contents of a YAML file.

    Raises:
        ValueError: the file cannot be read, is not YAML, or has a key twice. The message names the file and the line.
    """
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: correct the path, which is relative to this folder") from None
    except IsADirectoryError:
        inside = Path(path) / "config.yaml"
        raise ValueError(f"{path} is a folder: name {inside if inside.exists() else 'a YAML file'}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a YAML file: it is not text in UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        found = (plain for text, plain in YAML_PROBLEMS.items() if re.search(text, str(error)))
        wrong = next(found, "it is not valid YAML there: check indentation, colons and quotes")
        raise ValueError(f"{path}{line}: {wrong}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def old_keys(raw: Mapping[str, object]) -> Iterator[str]:
    """Yield a note for each kind of key of an earlier version that `raw` uses. Such keys are still read.

    Raises:
        ValueError: a setting has a value under both its old and its new key.
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
            "model.patcher.vae.fingerprint, mean and std of an earlier version were ignored: "
            "they are now kept with the model and in its checkpoints"
        )


def override(config: Config, changes: Mapping[str, object]) -> Config:
    """A copy of `config` with the nested fields of `changes` replaced. It raises ValueError as `load` does."""
    return _validated(merged(config.model_dump(), changes), "")


def merged(old: Mapping[str, object], new: Mapping[str, object]) -> dict[str, object]:
    """The entries of `old`, updated with those of `new`. Nested mappings are merged in the same way."""
    both = dict(old)
    for key, value in new.items():
        before = both.get(key)
        both[key] = merged(before, value) if isinstance(before, Mapping) and isinstance(value, Mapping) else value
    return both


def _validated(raw: object, source: str) -> Config:
    try:
        check_names(raw)  # first, because other checks may depend on a name
        check_numbers(raw)
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise ValueError("\n".join(source + line for line in explain_all(error.errors()))) from None
    except ValueError as error:
        raise ValueError(source + str(error)) from None
    return config


def check_names(raw: object) -> None:
    """Raise ValueError where a setting names no entry of its registry. The message lists the names and the nearest."""
    for setting, names in REGISTRIES.items():
        for key in (setting, *(old for old, new in RENAMED.items() if new == setting)):
            chosen = _at(raw, key)
            if isinstance(chosen, str):
                choose(dict.fromkeys(names()), chosen, setting)


def check_numbers(raw: object, model: type[BaseModel] = Config, prefix: str = "") -> None:
    """Raise ValueError where a number is expected and true or false is given, which pydantic reads as 1 or 0.

    In YAML, `yes`, `no`, `on` and `off` are also true and false.
    """
    for name, field in model.model_fields.items():
        value = raw.get(name) if isinstance(raw, Mapping) else None
        if section := section_of(field.annotation):
            check_numbers(value, section, f"{prefix}{name}.")
        elif (
            isinstance(value, bool)
            and {int, float} & {*_kinds(field.annotation)}
            and bool not in _kinds(field.annotation)
        ):
            expected = expectation(field.annotation, field.metadata)
            raise ValueError(f"{prefix}{name} must be {expected}{_example(field)} (got {str(value).lower()})")


def _kinds(kind: object) -> Iterator[object]:
    """A type and all types inside it."""
    yield kind
    for inner in get_args(kind):
        yield from _kinds(inner)


def _at(raw: object, key: str) -> object:
    """The value of a dotted key in nested mappings; None where there is none."""
    for name in key.split("."):
        raw = raw.get(name) if isinstance(raw, Mapping) else None
    return raw


def explain_all(errors: Iterable[ErrorDetails]) -> list[str]:
    """Each error of pydantic as a sentence, one for a value even if several of its parts are wrong."""
    first: dict[object, str] = {}
    for error in errors:
        line = explain(error)
        location = tuple(part for part in error["loc"] if isinstance(part, str))
        key, field = _field(".".join(location), Config)
        if field is not None and section_of(field.annotation) is None:
            location = (key,)  # of a value of several types, each type that it does not have is an error
        first.setdefault(location or line, line)
    return [*dict.fromkeys(first.values())]


def explain(error: ErrorDetails, model: type[BaseModel] = Config, prefix: str = "") -> str:
    """One pydantic error as a sentence that names the key, the wrong value and what to write instead.

    `model` is the validated class, and `prefix` the dotted name of the section that it describes.
    """
    if error["type"] == "value_error":  # raised by a section's `check`, which names the keys itself
        raised = error["ctx"]["error"]
        if not isinstance(raised, AddedSectionError):
            return str(raised)
        added, inside = OBJECTIVE_SETTINGS[raised.name], f"objective.{raised.name}."
        return "\n".join(explain(item, added, inside) for item in raised.error.errors())
    written = ".".join(map(str, error["loc"]))
    if error["type"] in ("extra_forbidden", "invalid_key"):
        near = nearest(written, field_names(model))
        return f"unknown key '{prefix}{written}'" + (f", did you mean '{prefix}{near}'?" if near else "")
    key, field = _field(written, model)
    if field is None:
        return f"{prefix}{written} is wrong: {error['msg']} (got {_shortened(error['input'])})"
    names = registered(prefix + key)
    expected = f"one of {', '.join(names)}" if names else expectation(field.annotation, field.metadata)
    if error["type"] == "missing" and key == written:
        return f"{prefix}{key} is missing: it must be {expected}"
    example = "" if names else _example(field)
    indices = [part for part in error["loc"] if isinstance(part, int)]
    at = f" at {prefix}{'.'.join(map(str, [key, *indices]))}" if indices else ""
    return f"{prefix}{key} must be {expected}{example} (got {_shortened(error['input'])}{at})"


def _field(written: str, model: type[BaseModel]) -> tuple[str, FieldInfo | None]:
    """The setting that a dotted location is about, under its present name, and its field; None where there is none.

    Parts that follow the name of a setting, such as the index in a list, are left out.
    """
    moved = {f"objective.{name}": f"objective.{section}.{name}" for name, section in FLAT.items()} | RENAMED
    for old, new in moved.items():
        if f"{written}.".startswith(f"{old}."):
            written = new + written.removeprefix(old)
    names: list[str] = []
    field, inside = None, model
    for part in written.split("."):
        if part not in inside.model_fields:
            break
        field = inside.model_fields[part]
        names.append(part)
        inside = section_of(field.annotation) or BaseModel
    return ".".join(names), field


def expectation(kind: object, metadata: Iterable[object] = ()) -> str:
    """What a value of a type must be, in words: `a whole number above 0`, `one of none, cpu, nvme or null`."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        bounds = [bound for item in inner[1:] for bound in (item.metadata if isinstance(item, FieldInfo) else [item])]
        return expectation(inner[0], bounds)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin in (Union, types.UnionType):
        return " or ".join(expectation(item) for item in inner)
    if origin is list or (origin is tuple and Ellipsis in inner):
        return f"a list, each item {expectation(inner[0])}"
    if origin is tuple:
        return f"a list [{', '.join(expectation(item) for item in inner)}]"
    if section := section_of(kind):
        keys = list(section.model_fields)
        shown = f"the keys {', '.join(keys)}" if len(keys) < 7 else f"keys such as {', '.join(keys[:3])}"
        return f"a mapping with {shown}"
    if kind in (int, float):
        return ("a whole number" if kind is int else "a number") + _bounds(metadata)
    words: dict[object, str] = {bool: "true or false", str: "text", Path: "a path", types.NoneType: "null"}
    return words.get(kind) or ("a mapping" if origin is dict else "any value")


def _bounds(metadata: Iterable[object]) -> str:
    limits: dict[str, object] = {}
    for name, item in ((name, item) for item in metadata for name in ("gt", "ge", "lt", "le")):
        if getattr(item, name, None) is not None:
            limits[name] = getattr(item, name)
    if limits.keys() == {"ge", "le"}:
        return f" from {limits['ge']} to {limits['le']}"
    words = {"gt": "above {}", "ge": "of {} or more", "lt": "below {}", "le": "of {} or less"}
    joined = " and ".join(word.format(limits[name]) for name, word in words.items() if name in limits)
    return joined and f" {joined}"


def _example(field: FieldInfo) -> str:
    """The default of a setting as an example of what to write; none for names, sections and empty values."""
    default = to_jsonable_python(field.default, fallback=str)
    if default in (None, [], {}, "") or isinstance(default, bool | dict) or [*_literals(field.annotation)]:
        return ""
    return f", such as {json.dumps(default)}"


def example(name: str) -> str:
    """The text `, such as --NAME "VALUE"` for a setting, with its default; empty for an option that is no setting."""
    field = _field(name, Config)[1]
    shown = field and _example(field).removeprefix(", such as ")
    return f", such as --{name} '{shown}'" if shown else ""


def _shortened(value: object, length: int = 80) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."


def field_names(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Dotted names of all settings and sections of a model."""
    names = []
    for name, field in model.model_fields.items():
        names.append(prefix + name)
        if section := section_of(field.annotation):
            names += field_names(section, f"{prefix}{name}.")
    return names


def section_of(annotation: object) -> type[BaseModel] | None:
    """The class of a field that is a section; None for a field that is a value."""
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def settings(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[Setting]:
    """Every setting, in the order of the configuration file, with the choices from its registry or its type."""
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
    """The names in the registry of a setting; empty for a setting without a registry."""
    return tuple(REGISTRIES[setting]()) if setting in REGISTRIES else ()


def _literals(kind: object) -> Iterator[str]:
    if get_origin(kind) is Literal:
        yield from map(str, get_args(kind))
    else:
        for inner in get_args(kind):
            yield from _literals(inner)


def type_name(kind: object) -> str:
    """A type as text: `int`, `list[str]`, `str | null`. A choice among names is `str`."""
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
