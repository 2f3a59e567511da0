"""The tokenizer: text to token ids and back, with the special tokens of a document."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as TextTokenizer
from tokenizers.decoders import DecodeStream

from mmgen.config import Config

BOS, EOS, PAD, BOI, EOI = SPECIAL = ("<|bos|>", "<|eos|>", "<|pad|>", "<|boi|>", "<|eoi|>")
Grid = tuple[int, int]


def size_token(grid: Grid) -> str:
    """The text of the token after BOI, which names the patch grid (rows, columns)."""
    return f"<|{grid[0]}x{grid[1]}|>"


@dataclass(frozen=True)
class Roles:
    """Texts of the tokens that begin, end and pad documents. The defaults are those of a tokenizer trained here."""

    begin: str | None = BOS
    """The token at the start of a document; None if documents begin with their first segment."""
    end: str = EOS
    pad: str = PAD
    stops: tuple[str, ...] = ()
    """Further tokens at which generated text ends, such as the end of a turn."""
    described: dict[str, Any] | None = None
    """The `tokenizer_config.json` of a pretrained tokenizer, whose special tokens may be part of a text."""

    @classmethod
    def of_folder(cls, folder: Path, text: TextTokenizer) -> Roles:
        """The roles in the files of a pretrained tokenizer; the defaults if the folder has none.

        A document begins with BOS only if the tokenizer itself begins texts with it. PAD may be EOS.
        """
        described = _json(folder / "tokenizer_config.json")
        end = _text(described.get("eos_token"))
        if end is None or _text(described.get("bos_token")) == BOS:
            return cls()
        template = folder / "chat_template.jinja"
        if template.is_file() and not described.get("chat_template"):
            described = {**described, "chat_template": template.read_text(encoding="utf-8")}
        begin = _text(described.get("bos_token"))
        first = text.encode("a", add_special_tokens=True).ids[:1]
        if begin is None or first != [text.token_to_id(begin)]:
            begin = None
        stops = described.get(STOPS)
        if stops is None:
            known = _json(folder / "generation_config.json").get("eos_token_id") or []
            stops = [text.id_to_token(number) for number in (known if isinstance(known, list) else [known])]
        found = tuple(token for token in stops if token is not None and token != end)
        return cls(begin, end, _text(described.get("pad_token")) or end, found, {**described, STOPS: [*found]})


STOPS = "mmgen_stops"
"""The key of `Roles.stops` in a tokenizer_config.json that mmgen writes."""


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    return found if isinstance(found, dict) else {}


def _text(token: object) -> str | None:
    """The text of a token in a tokenizer_config.json, where it may be an object."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


class Tokenizer:
    """A tokenizer of the `tokenizers` library with BOI, EOI and one size token per declared patch grid.

    A tokenizer that was trained here also gets BOS, EOS and PAD; a pretrained one keeps its own. Text never becomes a
    token that mmgen added: `encode("<|boi|>")` returns the ids of its letters. The special tokens of a pretrained
    tokenizer may be part of a text, as in transformers.
    """

    def __init__(self, text: TextTokenizer, grids: Sequence[Grid], roles: Roles = Roles()) -> None:
        self._text, self.roles = text, roles
        sizes = [size_token(grid) for grid in grids]
        own = (*SPECIAL, *sizes) if roles.described is None else (BOI, EOI, *sizes)
        known = text.get_vocab_size(with_added_tokens=True)
        text.add_special_tokens([AddedToken(name, special=True) for name in own])
        self.added = len(self) - known
        """Number of tokens that were new to the tokenizer; they are its last ones."""
        text.encode_special_tokens = roles.described is None
        self._own = re.compile("|".join(map(re.escape, own)))
        self.bos = None if roles.begin is None else self._id(roles.begin)
        self.eos, self.pad, self.boi, self.eoi = (self._id(name) for name in (roles.end, roles.pad, BOI, EOI))
        self.start = [] if self.bos is None else [self.bos]
        """The tokens at the start of a document: BOS, or none."""
        self.framing = len(self.start) + 1
        """Number of positions that the start and the end of a document take."""
        self.stops = frozenset({self.eos, *map(self._id, roles.stops)})
        """Tokens at which a generated document ends: EOS, and ends of turns."""
        self.size: dict[Grid, int] = {grid: self._id(name) for grid, name in zip(grids, sizes, strict=True)}
        self.grid = {token: grid for grid, token in self.size.items()}
        self.names = own
        self.special = frozenset((*self.start, *self.stops, self.pad, self.boi, self.eoi, *self.grid))

    @classmethod
    def of(cls, config: Config) -> Tokenizer:
        """The tokenizer of a configuration. It raises the errors of `load`."""
        return cls.load(config.data.tokenizer, config.model.patcher.grids)

    @classmethod
    def load(cls, path: str | Path, grids: Sequence[Grid], own_roles: bool = True) -> Tokenizer:
        """Read a `tokenizer.json`, and the `tokenizer_config.json` of a pretrained tokenizer from the same folder.

        Without `own_roles`, that file is ignored, as runs of earlier versions did.

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
            text = TextTokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises a bare Exception
            raise ValueError(f"{path} is not a tokenizer.json of the tokenizers library: {error}") from None
        return cls(text, grids, Roles.of_folder(Path(path).parent, text) if own_roles else Roles())

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that identify this tokenizer. Equal tokenizers have equal fingerprints."""
        return hashlib.sha256(self._text.to_str().encode()).hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Tokenizer):
            return False
        roles = (self.start, self.stops, self.pad) == (other.start, other.stops, other.pad)
        return roles and self._text.to_str() == other._text.to_str()

    __hash__ = None  # type: ignore[assignment]

    def _id(self, name: str) -> int:
        token = self._text.token_to_id(name)
        if token is None:
            raise ValueError(f"the tokenizer has no token '{name}', which its tokenizer_config.json names: correct it")
        return int(token)

    def __len__(self) -> int:
        return int(self._text.get_vocab_size(with_added_tokens=True))

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every token, special ones included, as the tokenizer stores its text, to its id."""
        return dict(self._text.get_vocab(with_added_tokens=True))

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without tokens at its start and end."""
        return [token for part in self._parts(text) for token in self._text.encode(part, add_special_tokens=False).ids]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, in parallel threads."""
        if self.roles.described is not None and any(map(self._own.search, texts)):
            return [self.encode(text) for text in texts]
        return [list(encoded.ids) for encoded in self._text.encode_batch(list(texts), add_special_tokens=False)]

    def _parts(self, text: str) -> Iterator[str]:
        """The text in parts in which no token that mmgen added is read; one part if special tokens are not read."""
        at = 0
        if self.roles.described is not None:
            for match in self._own.finditer(text):
                yield text[at : match.start() + 1]
                at = match.start() + 1
        yield text[at:]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens."""
        return str(self._text.decode([token for token in ids if token not in self.special]))

    def speaker(self) -> Callable[[int], str]:
        """A function that takes one id per call and returns the text that the id completes, which may be empty."""
        stream = DecodeStream(skip_special_tokens=True)
        return lambda token: stream.step(self._text, token) or ""

    def save(self, path: str | Path) -> list[Path]:
        """Write a `tokenizer.json`, and the `tokenizer_config.json` of a pretrained one; returns their paths.

        `load` reads the same ids.
        """
        written = [Path(path)]
        self._text.save(str(path))
        if self.roles.described is not None:
            written.append(Path(path).with_name("tokenizer_config.json"))
            text = json.dumps(self.roles.described, indent=1, ensure_ascii=False)
            written[-1].write_text(text, encoding="utf-8")
        return written
