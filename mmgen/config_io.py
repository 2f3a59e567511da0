"""Settings from a YAML file and from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from mmgen.config import Config, nearest


def load(path: str | Path) -> Config:
    """Read a YAML file into a `Config`.

    Raises:
        ValueError: the file cannot be read or is not YAML, or a key or value is wrong; the message names the
            file, the key and, for an unknown key, the nearest valid one.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds {type(raw).__name__}, not a mapping of sections such as 'train:'")
    return _validated(raw, f"{path}: ")


def override(config: Config, changes: dict[str, Any]) -> Config:
    """A copy of `config` in which the nested fields of `changes` are replaced; raises ValueError as `load` does."""
    return _validated(_merge(config.model_dump(), changes), "")


def _merge(old: Any, new: Any) -> Any:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return {**old, **{key: _merge(old.get(key), value) for key, value in new.items()}}


def _validated(raw: dict[str, Any], source: str) -> Config:
    try:
        config = Config.model_validate(raw)
        config.check()
    except ValidationError as error:
        raise ValueError("\n".join(source + explain(item) for item in error.errors())) from None
    except ValueError as error:
        raise ValueError(source + str(error)) from None
    return config


def explain(error: Any) -> str:
    """One pydantic error as a sentence that names the key and, where it is unknown, the nearest key."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] != "extra_forbidden":
        return f"{key}: {error['msg']} (got {error['input']!r})" if key else str(error["msg"])
    near = nearest(key, field_names())
    return f"unknown key '{key}'" + (f", did you mean '{near}'?" if near else "")


def field_names(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Dotted names of every setting."""
    names = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        names.append(prefix + name)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            names += field_names(kind, f"{prefix}{name}.")
    return names
