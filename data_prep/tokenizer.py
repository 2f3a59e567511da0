"""Train a byte-level BPE on the captions of shards: `python -m data_prep.tokenizer --out FILE SHARD...`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import cyclopts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_prep import log, run, writable
from mmgen.data.progress import Progress
from mmgen.data.shards.samples import BadRecord, read
from mmgen.data.tools.findings import folded_bad

BYTES = 256


def main(
    *shards: Annotated[str, cyclopts.Parameter(help="Shards; their captions and texts are read.")],
    out: Annotated[Path, cyclopts.Parameter(help="tokenizer.json to write.")] = Path("tokenizer.json"),
    vocabulary: Annotated[int, cyclopts.Parameter(help="Largest number of tokens, including 256 for bytes.")] = 512,
) -> None:
    """Train a byte-level BPE tokenizer on captions; it encodes any text."""
    if not shards:
        raise ValueError("no shards are given: name the .tar files whose captions the tokenizer is trained on")
    if vocabulary < BYTES:
        raise ValueError(f"--vocabulary is {vocabulary}, but the bytes alone are {BYTES} tokens: raise it")
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder: name a file, such as {out / 'tokenizer.json'}")
    bad: list[BadRecord] = []
    with Progress("training the tokenizer", "samples read", quiet=True) as progress:
        tokenizer = trained((sample.caption for sample in progress.each(read(shards, bad))), vocabulary)
    for line in folded_bad(bad):
        log(line)
    if not progress.done:
        raise ValueError("the shards hold no usable sample: `mmgen data check` lists the reasons")
    writable(out.parent)
    tokenizer.save(str(out))
    print(f"{tokenizer.get_vocab_size()} tokens in {out}")


def trained(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE tokenizer of at most `vocabulary` tokens, trained on texts."""
    tokenizer = Tokenizer(models.BPE())
    # A prefix space makes a word the same token at the start of a text and after a space.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


if __name__ == "__main__":
    run(main)
