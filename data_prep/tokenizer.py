"""Train a byte-level BPE on the captions of shards: `python -m data_prep.tokenizer --out FILE SHARD...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import cyclopts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mmgen.data.shards.samples import read


def main(
    *shards: str,
    out: Annotated[Path, cyclopts.Parameter(help="tokenizer.json to write.")] = Path("tokenizer.json"),
    vocabulary: Annotated[int, cyclopts.Parameter(help="Most tokens, the 256 bytes included.")] = 512,
) -> None:
    """Train a byte-level BPE tokenizer on captions; any text can be encoded with it."""
    tokenizer = Tokenizer(models.BPE())
    # A prefix space makes a word one token wherever it stands.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((sample.caption for sample in read(shards, bad=[])), trainer)
    out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out))
    print(f"{tokenizer.get_vocab_size()} tokens in {out}")


if __name__ == "__main__":
    cyclopts.run(main)
