"""Existing shards as training, validation and test shards: `python -m data_prep.split "raw/*.tar" --out data/mine`.

A hash of the pictures (or of the text) decides, so that equal pictures are in one split. Members that mmgen does not
read are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Annotated

import cyclopts

from data_prep import run
from data_prep.shards import NAME, TEST, VAL, LeftOut, Sample, Shares, Source, Target, as_json, write
from mmgen.config import LimitsConfig
from mmgen.data.shards.samples import Group, damage, groups
from mmgen.data.shards.store import expand, stamp, stream
from mmgen.data.shards.tar import Damaged

LIMITS = LimitsConfig()


def main(
    *shards: Annotated[str, cyclopts.Parameter(help="Shards: paths, URLs, brace patterns or globs.")],
    out: Annotated[Path, cyclopts.Parameter(help="Folder to write.")],
    name: Annotated[str | None, cyclopts.Parameter(help=NAME)] = None,
    per_shard: Annotated[int, cyclopts.Parameter(help="Samples for one shard of each split.")] = 1000,
    val: Annotated[float, cyclopts.Parameter(help=VAL)] = 0.05,
    test: Annotated[float, cyclopts.Parameter(help=TEST)] = 0.05,
) -> None:
    """Copy shards into training, validation and test shards; repeat the command to resume."""
    found = source(shards)
    write(Target(out, name, per_shard, found.made, Shares(val, test)), found.items, found.sample)


def source(shards: Sequence[str]) -> Source[tuple[str, Group | Damaged]]:
    """The samples of shards; raises ValueError without shards, and FileNotFoundError if one does not exist."""
    if not shards:
        raise ValueError("no shards are given: name .tar files")
    files = expand(shards)
    made = {"files": sha256("".join(f"{file} {stamp(file)}\n" for file in files).encode()).hexdigest()}
    return Source(samples(files), members, made)


def samples(files: Sequence[str]) -> Iterator[tuple[str, Group | Damaged]]:
    """The samples of shards, each with its shard; the unreadable rest of a damaged shard is one item."""
    for file in files:
        try:
            with stream(file, LIMITS) as opened:
                yield from ((file, group) for group in groups(opened, LIMITS))
        except Damaged as error:
            yield file, error


def members(item: tuple[str, Group | Damaged]) -> Sample:
    """The members of a sample; raises `LeftOut` for a sample that cannot be used and the rest of a damaged shard."""
    file, group = item
    if isinstance(group, Damaged):
        raise LeftOut(file, damage(group))
    if group.reason:
        raise LeftOut(f"{file}: {group.key}", group.reason)
    return without_key(group.key, group.data)


def without_key(key: str, members: Sample) -> Sample:
    """The members with extensions for the names `KEY.EXTENSION` in a list of segments, since they get another key."""
    try:
        listed = json.loads(members.get("json", b"null"))
    except ValueError:
        return members  # the check of the written sample reports it
    if not isinstance(listed, list):
        return members
    for segment in listed:
        if isinstance(segment, dict) and isinstance(segment.get("image"), str):
            segment["image"] = segment["image"].removeprefix(f"{key}.")
    return {**members, "json": as_json(listed)}


if __name__ == "__main__":
    run(main)
