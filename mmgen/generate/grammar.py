"""Which tokens may come next in a generated document."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mmgen.generate.request import Request
from mmgen.sequence.tokenizer import Tokenizer


class Grammar:
    """Sets of tokens as boolean vectors over the vocabulary [V]."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int) -> None:
        ids = np.arange(vocabulary)
        self.words_V: NDArray[np.bool_] = (ids < len(tokenizer)) & ~np.isin(ids, list(tokenizer.special))
        self.text_V: NDArray[np.bool_] = self.words_V | (ids == tokenizer.eos)
        """Words, and the end of the document."""
        self.free_V: NDArray[np.bool_] = self.text_V | (ids == tokenizer.boi)
        """Words, the end, and an image."""
        self.sizes_V: NDArray[np.bool_] = np.isin(ids, list(tokenizer.grid))

    def allowed(self, request: Request, more_images: bool, words: int) -> NDArray[np.bool_]:
        """Tokens [V] that may come next in a request, after `words` words since the last image."""
        if request.mode == "auto" and more_images:
            return self.free_V
        # Documents whose caption was dropped end right after the image; asked for text, the model gives some.
        return self.words_V if request.mode == "text" and not words else self.text_V
