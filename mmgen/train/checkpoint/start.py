"""Starts a new run from the weights of another one, for `train.init_from`.

Parameters are taken over by name and size. Rows of the vocabulary are taken over by the text of their token, so that
a new tokenizer, or new image sizes, keep what is known of every token that both have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mmgen.model import MMGenConfig
from mmgen.sequence.tokenizer import Tokenizer
from mmgen.train.checkpoint.fragments import Store
from mmgen.train.checkpoint.read import latest, read_trainer, settings_of
from mmgen.train.engine import Engine
from mmgen.train.optimizer import EMA

SHOWN = 8
"""Names of tokens and parameters that a line lists."""


@dataclass(frozen=True)
class Reused:
    """What a new run took over."""

    folder: Path
    step: int
    weights: str
    """Kind of weights: `ema`, or `weight` if there is no EMA."""
    taken: int
    """Number of parameters that are taken over."""
    fresh: Sequence[str]
    """Parameters that start fresh."""
    new_tokens: Sequence[str] = ()
    """Tokens whose rows start at the mean, if a vocabulary was taken over in part."""

    def lines(self) -> Iterator[str]:
        """What is reused, resized and fresh, as lines for people."""
        yield (
            f"weights from {self.folder} (step {self.step}, {self.weights}): "
            f"{self.taken} of {self.taken + len(self.fresh)} parameters are reused"
        )
        if self.new_tokens:
            yield (
                f"the vocabulary is reused by the text of its tokens; {len(self.new_tokens)} new ones start at the "
                f"mean: {listed(self.new_tokens)}"
            )
        if self.fresh:
            yield f"these start fresh, because the checkpoint has none of that name and size: {listed(self.fresh)}"


def listed(names: Sequence[str]) -> str:
    """The first names, and the number of the others."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


@torch.no_grad()
def start_from(folder: Path, engine: Engine, tokenizer: Tokenizer) -> Reused:
    """Copy the weights of a checkpoint into a new run.

    The EMA is taken, or plain weights if there is none.

    Raises:
        ValueError: the folder is not a checkpoint, is damaged, or has no parameter of this model.
    """
    state, store = read_trainer(folder), Store(folder)
    kind = EMA if EMA in store.kinds() else "weight"
    before = Tokenizer.load(folder / "tokenizer.json", settings_of(folder).model.patcher.grids)
    rows = same_tokens(before.vocabulary, tokenizer.vocabulary)
    names = vocabulary_parameters(engine)
    width = engine.model.get_input_embeddings().embedding_dim
    sizes = {name: max(store.numel(kind, name), store.numel("weight", name)) for name in store.names("weight")}
    stored_rows = MMGenConfig.from_pretrained(folder).backbone["vocab_size"]
    remap = all(sizes.get(name) == stored_rows * width for name in names) and (
        any(row != number for number, row in enumerate(rows)) or len(before) != len(tokenizer)
    )
    fresh = [
        name
        for name, p in engine.model.named_parameters()
        if sizes.get(name) != getattr(p, "ds_numel", p.numel()) and not (remap and name in names and name in sizes)
    ]
    every = len(list(engine.model.parameters()))
    if len(fresh) == every:
        raise ValueError(f"train.init_from {folder} has no parameter with the name and size of one of this model's")
    for fragment in engine.fragments:
        if fragment.name in fresh:
            continue
        chosen = kind if store.numel(kind, fragment.name) else "weight"
        if remap and fragment.name in names:
            values = table_part(store, chosen, fragment.name, width, rows, (fragment.start, fragment.numel))
        else:
            values = store.read(chosen, fragment.name, fragment.start, fragment.numel)
        fragment.of(fragment.flat).copy_(values)
    engine.refresh()
    texts = {number: text for text, number in tokenizer.vocabulary.items()}
    new = [texts[number] for number, row in enumerate(rows) if row < 0] if remap else []
    return Reused(folder, state.step, kind, every - len(fresh), fresh, new)


def checkpoint_of(folder: Path) -> Path:
    """The folder itself, or the newest checkpoint of a run folder."""
    inside = latest(folder) if not (folder / "manifest.json").exists() else None
    return inside or folder


def same_tokens(before: dict[str, int], now: dict[str, int]) -> list[int]:
    """For each id of the new vocabulary, the id of the token with the same text in the old one, or -1."""
    rows = [-1] * len(now)
    for text, number in now.items():
        rows[number] = before.get(text, -1)
    return rows


def vocabulary_parameters(engine: Engine) -> set[str]:
    """Names of the parameters that have one row per token."""
    model = engine.model
    output = model.backbone.get_output_embeddings()
    tables = {id(model.get_input_embeddings().weight)} | ({id(output.weight)} if output is not None else set())
    return {name for name, p in model.named_parameters() if id(p) in tables}


def table_part(store: Store, kind: str, name: str, width: int, rows: Sequence[int], part: tuple[int, int]) -> Tensor:
    """Elements [start, start + numel) of a new table of rows, flattened.

    Row n is row `rows[n]` of the stored table. Rows that it lacks are its mean.
    """
    start, numel = part
    stored = store.numel(kind, name) // width
    first, last = start // width, -(-(start + numel) // width)
    # Rows past the tokens exist in pretrained vocabularies, and keep their number.
    wanted = [rows[n] if n < len(rows) else n for n in range(first, last)]
    wanted = [row if row < stored else -1 for row in wanted]
    table = torch.empty(last - first, width)
    if -1 in wanted:
        table[:] = store.read(kind, name, 0, stored * width).view(stored, width).mean(0)
    at = 0
    while at < len(wanted):  # neighbouring rows are read together
        end = at + 1
        while wanted[at] >= 0 and end < len(wanted) and wanted[end] == wanted[end - 1] + 1:
            end += 1
        if wanted[at] >= 0:
            table[at:end] = store.read(kind, name, wanted[at] * width, (end - at) * width).view(end - at, width)
        at = end
    return table.flatten()[start - first * width :][:numel]
