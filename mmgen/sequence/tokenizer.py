"""The tokenizer: text to token ids and back, with the special tokens of a document."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import AddedToken
from tokenizers import Tokenizer as TextTokenizer
from tokenizers.decoders import DecodeStream

from mmgen.config import Config

BOS, EOS, PAD, BOI, EOI = SPECIAL = ("<|bos|>", "<|eos|>", "<|pad|>", "<|boi|>", "<|eoi|>")
Grid = tuple[int, int]


def size_token(grid: Grid) -> str:
    """The text of the token after BOI, which names the patch grid (rows, columns)."""
    return f"<|{grid[0]}x{grid[1]}|>"


class Tokenizer:
    """A tokenizer of the `tokenizers` library with BOS, EOS, PAD, BOI, EOI and one size token per declared patch grid.

    Text never becomes a special token: `encode("<|boi|>")` returns the ids of its letters.
    """

    def __init__(self, text: TextTokenizer, grids: Sequence[Grid]) -> None:
        self._text = text
        text.add_special_tokens(
            [AddedToken(name, special=True) for name in (*SPECIAL, *(size_token(grid) for grid in grids))]
        )
        text.encode_special_tokens = True
        self.bos, self.eos, self.pad, self.boi, self.eoi = (self._id(name) for name in SPECIAL)
        self.size: dict[Grid, int] = {(rows, columns): self._id(size_token((rows, columns))) for rows, columns in grids}
        self.grid = {token: grid for grid, token in self.size.items()}
        self.names = (*SPECIAL, *(size_token(grid) for grid in grids))
        self.special = frozenset((self.bos, self.eos, self.pad, self.boi, self.eoi, *self.grid))

    @classmethod
    def of(cls, config: Config) -> Tokenizer:
        """The tokenizer of a configuration. It raises the errors of `load`."""
        return cls.load(config.data.tokenizer, config.model.patcher.grids)

    @classmethod
    def load(cls, path: str | Path, grids: Sequence[Grid]) -> Tokenizer:
        """Read a `tokenizer.json`.

        Raises:
            FileNotFoundError: there is no file at `path`; the message names the command that makes one.
            ValueError: the file is not a tokenizer.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"no tokenizer at {path}: set data.tokenizer, or train one with "
                f"`python -m data_prep.tokenizer --out {path} SHARD...` (paths are relative to this folder; `make "
                "data` makes the data of the demo)"
            )
        try:
            return cls(TextTokenizer.from_file(str(path)), grids)
        except Exception as error:  # tokenizers raises a bare Exception
            raise ValueError(f"{path} is not a tokenizer.json of the tokenizers library: {error}") from None

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that identify this tokenizer. Equal tokenizers have equal fingerprints."""
        return hashlib.sha256(self._text.to_str().encode()).hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self._text.to_str() == other._text.to_str()

    __hash__ = None  # type: ignore[assignment]

    def _id(self, name: str) -> int:
        token = self._text.token_to_id(name)
        assert token is not None, name
        return int(token)

    def __len__(self) -> int:
        return int(self._text.get_vocab_size(with_added_tokens=True))

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every token, special ones included, as the tokenizer stores its text, to its id."""
        return dict(self._text.get_vocab(with_added_tokens=True))

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without special tokens."""
        return list(self._text.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, in parallel threads."""
        return [list(encoded.ids) for encoded in self._text.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens."""
        return str(self._text.decode([token for token in ids if token not in self.special]))

    def speaker(self) -> Callable[[int], str]:
        """A function that takes one id per call and returns the text that the id completes, which may be empty."""
        stream = DecodeStream(skip_special_tokens=True)
        return lambda token: stream.step(self._text, token) or ""

    def save(self, path: str | Path) -> None:
        """Write a `tokenizer.json`. `load` reads it back with the same ids."""
        self._text.save(str(path))
