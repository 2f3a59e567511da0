"""Pictures before and after an edit, with its instruction: `python -m data_prep.pairs BEFORE AFTER --out data/edits`.

A picture of BEFORE and the one of the same name in AFTER make a document: the picture, the instruction, the result. The
instruction of `a/b.png` is in `a/b.txt`, `a/b.caption` or `a/b.json` (`{"caption": ...}`) of AFTER, else of BEFORE.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import cyclopts

from data_prep import reason, run
from data_prep.folder import CAPTIONS, caption
from data_prep.shards import (
    NAME,
    TEST,
    VAL,
    LeftOut,
    Sample,
    Shares,
    Source,
    Target,
    as_json,
    identity,
    image_member,
    shown,
    walk,
    write,
)
from mmgen.cli.pictures import SUFFIXES


def main(
    before: Annotated[Path, cyclopts.Parameter(help="Folder of the pictures that are edited.")],
    after: Annotated[Path, cyclopts.Parameter(help="Folder of the results, under the same names.")],
    *,
    out: Annotated[Path, cyclopts.Parameter(help="Folder to write.")],
    instruction: Annotated[str | None, cyclopts.Parameter(help="Instruction of pairs without a text file.")] = None,
    learn_both: Annotated[
        bool, cyclopts.Parameter(help="Also learn to draw the first picture and write the instruction.", negative="")
    ] = False,
    name: Annotated[str | None, cyclopts.Parameter(help=NAME)] = None,
    per_shard: Annotated[int, cyclopts.Parameter(help="Pairs per shard.")] = 1000,
    val: Annotated[float, cyclopts.Parameter(help=VAL)] = 0.0,
    test: Annotated[float, cyclopts.Parameter(help=TEST)] = 0.0,
) -> None:
    """Write pairs of pictures with an instruction as interleaved documents; repeat the command to resume."""
    found = source(before, after, out, instruction, learn_both)
    write(Target(out, name, per_shard, found.made, Shares(val, test)), found.items, found.sample, found.total)


def source(before: Path, after: Path, out: Path, instruction: str | None, learn_both: bool) -> Source[Path]:
    """The pictures of `before`; raises ValueError if a folder does not exist."""
    for folder in (before, after):
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder: name the folders of the pictures before and after the edit")
    files = {folder: list(walk(folder, without=out)) for folder in (before, after)}
    pictures = [path for path in files[before] if path.suffix.lower() in SUFFIXES]
    results = {
        path.relative_to(after).with_suffix(""): path for path in files[after] if path.suffix.lower() in SUFFIXES
    }
    texts = {
        path.with_suffix(path.suffix.lower()): path
        for listed in files.values()
        for path in listed
        if path.suffix.lower() in CAPTIONS
    }
    made = {
        "before": identity(files[before], before),
        "files": identity(files[after], after),
        "instruction": instruction,
        "learn_both": learn_both,
    }
    make = partial(sample, before, after, results, texts, instruction, learn_both)
    return Source(pictures, make, made, len(pictures))


def sample(
    before: Path,
    after: Path,
    results: dict[Path, Path],
    texts: dict[Path, Path],
    instruction: str | None,
    learn_both: bool,
    picture: Path,
) -> Sample:
    """The members of a document; raises `LeftOut` for a picture without a result or an instruction."""
    name, item = picture.relative_to(before).with_suffix(""), shown(picture, before)
    result = results.get(name)
    if result is None:
        raise LeftOut(item, f"no picture of the same name in {after}")
    text = caption(result, texts)["caption"] or caption(picture, texts)["caption"]
    text = text or instruction
    if not text:
        raise LeftOut(item, f"no instruction ({', '.join(CAPTIONS)} of the same name, or --instruction)")
    try:
        ((first, given),) = image_member(picture.read_bytes(), item).items()
        ((second, wanted),) = image_member(result.read_bytes(), shown(result, after)).items()
    except OSError as error:
        raise LeftOut(item, reason(error)) from None
    listed = [
        {"image": f"before.{first}", "learn": learn_both},
        {"text": text, "learn": learn_both},
        {"image": f"after.{second}"},
    ]
    return {f"before.{first}": given, f"after.{second}": wanted, "json": as_json(listed)}


if __name__ == "__main__":
    run(main)
