"""The tokens that may come next in a generated document."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mmgen.generate.request import Request
from mmgen.sequence.tokenizer import Tokenizer


class Grammar:
    """Sets of allowed tokens as boolean vectors [V] over the vocabulary."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int) -> None:
        ids = np.arange(vocabulary)
        self.words_V: NDArray[np.bool_] = (ids < len(tokenizer)) & ~np.isin(ids, list(tokenizer.special))
        """Text tokens: all tokens that are not special."""
        self.text_V: NDArray[np.bool_] = self.words_V | np.isin(ids, list(tokenizer.stops))
        """Text tokens, and EOS or the end of a turn."""
        self.free_V: NDArray[np.bool_] = self.text_V | (ids == tokenizer.boi)
        """Text tokens, EOS and BOI."""
        self.sizes_V: NDArray[np.bool_] = np.isin(ids, list(tokenizer.grid))
        """Size tokens."""

    def allowed(self, request: Request, more_images: bool, words: int) -> NDArray[np.bool_]:
        """Return the tokens [V] that may come next in a request.

        `more_images` is whether the budget of images allows another one; `words` counts the text tokens since the
        last image.
        """
        if request.mode == "auto" and more_images:
            return self.free_V
        # Training documents with a dropped caption end right after the image, so the model may predict EOS there.
        # In mode `text` the result must have some text: EOS is not allowed as the first token.
        return self.words_V if request.mode == "text" and not words else self.text_V
