"""Many requests over one backbone: one call per tick, whatever mode or solver step each request is in.

Suffixes: R requests, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from mmgen.generate.drawing import Drawings
from mmgen.generate.exchange import Answer, Chosen, Draw, Feed, Serving, Wish
from mmgen.generate.lanes import Lanes, LaneShape
from mmgen.generate.parts import Setup
from mmgen.generate.tokens import TokenChooser


@dataclass(frozen=True)
class Budget:
    """What the requests of a batch may take, the largest of each; it bounds the cache."""

    guided: bool
    """Images are drawn with classifier-free guidance, so every request has a second lane."""
    tokens: int
    images: int
    previews: bool = False
    """Clean estimates of images being drawn are wanted."""


class Schedule:
    """What each request waits for, and the tick that answers all of them."""

    def __init__(self, setup: Setup, servings: Sequence[Serving], budget: Budget) -> None:
        self.servings = servings
        self.feeds: dict[int, Feed] = {}
        self.draws: dict[int, Draw] = {}
        for r, serving in enumerate(servings):
            self._wish(r, next(serving))
        image = max(grid[0] * grid[1] for grid in setup.tokenizer.size) + 3
        prefix = max((len(feed.strip) for feed in self.feeds.values()), default=0)
        # One image more than the budget: the widest feed is padding on the lanes that wait for less.
        capacity = 2 * prefix + budget.tokens + (2 + budget.images) * image
        self.lanes = Lanes(setup, LaneShape(len(servings), budget.guided, capacity))
        self.drawings = Drawings(setup, self.lanes, budget.previews)
        self.chooser = TokenChooser(setup.model, setup.sample)

    @property
    def busy(self) -> bool:
        """Some request still waits for an answer."""
        return bool(self.feeds or self.drawings.canvases)

    def previews(self) -> Iterator[tuple[int, Image.Image]]:
        """(request, clean estimate) of each image being drawn, where the budget asks for previews."""
        return self.drawings.previews()

    def tick(self) -> None:
        """One backbone call that answers everything pending, then the start of images that requests now wish for."""
        feeds, self.feeds = self.feeds, {}
        hidden = self.lanes.forward({r: feed.strip for r, feed in feeds.items()}, self.drawings.calls)
        for r, drawn in self.drawings.advance(hidden):
            self._answer(r, drawn)
        if feeds:
            last_RD = torch.stack([hidden[r][len(feed.strip) - 1] for r, feed in feeds.items()])
            tokens = self.chooser.choose(last_RD, list(feeds.values()))
            for r, token, hidden_D in zip(feeds, tokens, last_RD, strict=True):
                self._answer(r, Chosen(token, hidden_D))
        draws, self.draws = self.draws, {}
        for kind in dict.fromkeys(draw.kind for draw in draws.values()):
            self.drawings.open(kind[0], {r: draw for r, draw in draws.items() if draw.kind == kind})

    def _wish(self, r: int, wish: Wish) -> None:
        if isinstance(wish, Feed):
            self.feeds[r] = wish
        else:
            self.draws[r] = wish

    def _answer(self, r: int, answer: Answer) -> None:
        try:
            self._wish(r, self.servings[r].send(answer))
        except StopIteration:
            return
