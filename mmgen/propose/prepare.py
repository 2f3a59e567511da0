"""Prepares a run on a user's own pictures: shards, tokenizer and a settings file; `mmgen init` is its command."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from mmgen.config import Config, choose
from mmgen.config_io import override
from mmgen.data.progress import Progress, to_stderr
from mmgen.data.shards.samples import BadSample, read
from mmgen.propose.file import as_settings, as_yaml
from mmgen.propose.look import KEEP, Look
from mmgen.propose.measure import measure
from mmgen.propose.settings import (
    SIZES,
    Choice,
    Machine,
    Names,
    Proposal,
    propose,
    schedule,
    steps_for,
    vocabulary,
)

LOOKED_AT = 2_000
"""Largest number of samples that are looked at."""
FEWEST = 100
"""Fewest samples with which a run is prepared."""


@dataclass(frozen=True)
class HeldOut:
    """How many samples a split gets that training does not read."""

    share: float
    least: int
    most: int

    def of(self, count: int) -> float:
        """Its share of `count` samples."""
        return max(min(self.share, self.most / count), self.least / count)


# A hash draws the splits: with an expected 25, fewer than the 10 that scores need are very unlikely.
VALIDATION, TEST = HeldOut(0.05, 15, 500), HeldOut(0.1, 25, 1_000)


@dataclass(frozen=True)
class Inputs:
    """Where the pictures are; exactly one is given."""

    images: Path | None = None
    table: Path | None = None
    shards: tuple[str, ...] = ()
    image: str = "image"
    """Column of images in the table."""
    caption: str = "caption"
    """Column of captions in the table."""
    captionless: bool = False
    """Whether pictures of a folder without a caption are kept."""
    backbone: str | None = None
    """Hub name or folder of a pretrained decoder; None for a new one."""

    def __post_init__(self) -> None:
        given = {"--images": self.images, "--table": self.table, "--shards": self.shards}
        named = [name for name, value in given.items() if value]
        if len(named) != 1:
            which = f"leave out one of {', '.join(named)}" if named else f"give one of {', '.join(given)}"
            raise ValueError(f"mmgen init reads one source of pictures: {which}")

    def open(self, out: Path) -> Any:
        """The source, for `data_prep.shards.write`; `out` is the folder of the shards."""
        if self.images:
            return script("folder").source(self.images, out, self.captionless)
        if self.table:
            return script("table").source(self.table, self.image, self.caption)
        return script("split").source(self.shards)


@dataclass(frozen=True)
class Prepared:
    """What `mmgen init` proposes, and how long it takes."""

    file: Path
    choices: Sequence[Choice]
    head: Sequence[str]
    """Comment lines at the start of the settings file."""
    minutes: float | None = None
    """Estimate of the run; None if it was not measured."""

    @property
    def text(self) -> str:
        """The settings file."""
        return as_yaml(self.choices, self.head)

    def as_dict(self) -> dict[str, Any]:
        """File, estimate and settings, for JSON."""
        return {"file": str(self.file), "minutes": self.minutes, "settings": as_settings(self.choices)}


def prepare(inputs: Inputs, out: Path, minutes: float, size: str | None, dry_run: bool) -> Prepared:
    """Look at the data; unless it is a dry run, write shards, tokenizer and the settings file `out`.

    Raises:
        ValueError: an option is wrong, the settings file exists, or nothing of the data can be used.
        ChildProcessError: training with the proposed settings failed.
    """
    if out.suffix not in (".yaml", ".yml"):
        raise ValueError(f"--out {out} is not a settings file: name a file that ends in .yaml")
    if out.exists() and not dry_run:
        raise ValueError(f"{out} exists: choose another --out, or remove it")
    if minutes <= 0:
        raise ValueError(f"--minutes is {minutes:g}: give more than 0")
    if size is not None:
        choose(SIZES, size, "--size")
    machine = Machine(torch.cuda.is_available(), minutes)
    folder = out.parent / f"{out.stem}-data"
    look = look_at(inputs.open(folder))
    for line in look.lines():
        to_stderr(line)
    if not look.documents:
        raise ValueError(f"nothing of the data can be used: {look.left_out[0] if look.left_out else 'it is empty'}")
    preparation = Preparation(inputs, out, folder, machine, size or machine.size, look)
    with redirect_stdout(sys.stderr):  # the scripts print results of their own
        return preparation.proposed() if dry_run else preparation.written()


@dataclass(frozen=True)
class Preparation:
    """What `mmgen init` does, once it has looked at the data."""

    inputs: Inputs
    out: Path
    folder: Path
    """Folder of shards and tokenizer."""
    machine: Machine
    size: str
    look: Look

    def proposed(self) -> Prepared:
        """The settings, as far as they are known without training; nothing is written."""
        if self.inputs.backbone is not None:
            tokenizer = load_tokenizer(self.inputs.backbone).backend_tokenizer
        else:
            tokenizer = script("tokenizer").trained(self.look.captions, self._vocabulary())
        return Prepared(self.out, [*self._propose(tokenizer).choices, *schedule(1000)], self._head("not measured"))

    def written(self) -> Prepared:
        """Write shards and tokenizer, measure the pace, and write the settings file."""
        self._write_shards()
        if self.inputs.backbone is not None:
            copy_tokenizer(self.inputs.backbone, Path(self.names.tokenizer).parent)
        else:
            script("tokenizer").main(self.names.train, out=Path(self.names.tokenizer), vocabulary=self._vocabulary())
        proposal = self._propose(Tokenizer.from_file(self.names.tokenizer))
        samples = sum(1 for _ in read([self.names.train], bad=[], data=KEEP))
        trial = override(Config(), as_settings([*proposal.choices, *schedule(1000)]))
        pace = measure(trial, self.folder / "trial")
        seconds = pace.seconds_for_steps(self.machine.minutes)
        steps, reason = steps_for(seconds, pace.seconds_per_step, samples, proposal.documents_per_step)
        estimate = pace.minutes(steps)
        settings = [*proposal.choices, Choice("train.steps", steps, reason), *schedule(steps)]
        made = Prepared(self.out, settings, self._head(f"about {estimate:.0f} minutes on this machine"), estimate)
        part = self.out.with_suffix(".part")
        part.write_text(made.text)
        part.replace(self.out)
        to_stderr(f"{self.out}: {steps:,} steps, about {estimate:.1f} minutes on this machine ({reason})")
        return made

    @property
    def names(self) -> Names:
        """Paths of the files of the run."""
        stem = self.folder / self.stem
        return Names(
            run=f"runs/{self.stem}",
            train=f"{stem}-train-*.tar",
            val=f"{stem}-val-*.tar",
            test=f"{stem}-test-*.tar",
            tokenizer=str(self.folder / ("tokenizer" if self.inputs.backbone else "") / "tokenizer.json"),
        )

    @property
    def stem(self) -> str:
        """First part of the names of the shards and their keys."""
        return re.sub(r"[^\w-]+", "-", self.out.stem)

    def _propose(self, tokenizer: Tokenizer) -> Proposal:
        def tokens(text: str) -> int:
            return len(tokenizer.encode(text, add_special_tokens=False).ids)

        return propose(self.look, self.machine, self.size, self.names, tokens, self.inputs.backbone)

    def _vocabulary(self) -> int:
        words, why = vocabulary(self.look.captions)
        to_stderr(f"tokenizer: up to {words:,} tokens, since the captions have {why}")
        return words

    def _write_shards(self) -> None:
        shards = script("shards")
        source = self.inputs.open(self.folder)
        # A table or shards have to be read once to be counted.
        count = source.total or sum(1 for _ in self.inputs.open(self.folder).items)
        if count < FEWEST:
            raise ValueError(f"there are {count} pictures, too few to learn from and to score: give at least {FEWEST}")
        shares = shards.Shares(VALIDATION.of(count), TEST.of(count))
        target = shards.Target(self.folder, self.stem, 1000, source.made, shares)
        shards.write(target, source.items, source.sample, source.total)
        for pattern in (self.names.train, self.names.val, self.names.test):
            if not glob(pattern):
                raise ValueError(f"too few pictures can be used: no shard {pattern} was written. Give more pictures")

    def _head(self, time: str) -> list[str]:
        return [
            f"mmgen train --config {self.out}    ({time})",
            f"Written by `mmgen init --minutes {self.machine.minutes:g}`; `mmgen settings NAME` explains each setting.",
        ]


def look_at(source: Any) -> Look:
    """Look at up to `LOOKED_AT` samples of a source, spread over it where its items are a list."""
    left_out = script("shards").LeftOut
    items = source.items
    if isinstance(items, list):
        items = items[:: max(1, -(-len(items) // LOOKED_AT))]
    look = Look(source.total)
    for item in Progress("looking at the data", "samples", quiet=True).over(islice(items, LOOKED_AT)):
        try:
            look.add(source.sample(item))
        except (left_out, BadSample) as error:
            look.left_out.append(str(error))
    return look


def load_tokenizer(backbone: str) -> Any:
    """The tokenizer of a pretrained decoder, as transformers reads it; raises ValueError."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        found = AutoTokenizer.from_pretrained(backbone)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--backbone {backbone}: its tokenizer cannot be loaded ({str(error).splitlines()[0]}): give the hub name "
            "or the local folder of a decoder of transformers"
        ) from None
    if not isinstance(found, PreTrainedTokenizerFast):
        raise ValueError(f"--backbone {backbone}: its tokenizer has no tokenizer.json, which mmgen needs")
    return found


def copy_tokenizer(backbone: str, folder: Path) -> None:
    """Write the tokenizer of a pretrained decoder, with its special tokens, chat template and ends of turns."""
    from transformers import GenerationConfig

    load_tokenizer(backbone).save_pretrained(folder)
    try:
        GenerationConfig.from_pretrained(backbone).save_pretrained(folder)
    except OSError:
        to_stderr(f"{backbone} has no generation_config.json: generated text ends at EOS alone")


def script(name: str) -> Any:
    """A script of `data_prep`, which is above this package."""
    return importlib.import_module(f"data_prep.{name}")
