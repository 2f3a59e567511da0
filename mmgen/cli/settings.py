"""`mmgen settings`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

from cyclopts import Parameter

from mmgen.cli.flags import Json
from mmgen.cli.show import print_json
from mmgen.config import nearest
from mmgen.config_io import field_names
from mmgen.config_io import settings as every_setting


def settings(
    *names: Annotated[str, Parameter(help="Settings or sections such as `sample` or `train.lr`; by default all.")],
    as_json: Json = False,
) -> int:
    """List every setting: its type, default, choices and meaning."""
    known = field_names()
    for name in names:
        if name not in known:
            near = nearest(name, known)
            raise ValueError(f"no setting or section '{name}'" + (f", did you mean '{near}'?" if near else ""))
    found = [item for item in every_setting() if not names or f"{item.name}.".startswith(tuple(f"{n}." for n in names))]
    if as_json:
        print_json([asdict(item) for item in found])
        return 0
    for item in found:
        print(f"{item.name}: {item.type} = {json.dumps(item.default)}")
        print(f"    {item.description}" + (f" One of: {', '.join(item.choices)}." if item.choices else ""))
    return 0
