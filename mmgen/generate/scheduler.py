"""The scheduler: one call of the backbone per tick for all requests, whatever mode or solver step each one is in.

Suffixes: R requests, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from mmgen.generate.drawing import Drawings
from mmgen.generate.exchange import Action, Chosen, Draw, Feed, Outcome, RequestCoroutine
from mmgen.generate.lanes import Lanes, LaneShape
from mmgen.generate.parts import Setup
from mmgen.generate.tokens import TokenChooser


@dataclass(frozen=True)
class Budget:
    """The largest budgets among the requests of a batch; they determine the capacity of the cache."""

    guidance: int
    """Number of lanes of guidance that every request has in addition to its own."""
    negative: int
    """Tokens of a negative prompt."""
    tokens: int
    images: int
    previews: bool = False
    """Whether to report estimates of the clean image while it is drawn."""


class Schedule:
    """Runs the coroutines of all requests; each tick advances every one of them by one backbone call."""

    def __init__(self, setup: Setup, coroutines: Sequence[RequestCoroutine], budget: Budget) -> None:
        self.coroutines = coroutines
        self.feeds: dict[int, Feed] = {}
        self.draws: dict[int, Draw] = {}
        for r in range(len(coroutines)):
            self._resume(r, None)
        image = max(grid[0] * grid[1] for grid in setup.tokenizer.size) + 3 + setup.model.objective.layout.lead
        prefix = max((len(feed.strip) for feed in self.feeds.values()), default=0) + budget.negative
        # A call is as wide as its widest strip or image, and narrower lanes are padded to it. The padding needs slots
        # at the end of a lane, so the capacity holds a second prefix and further images.
        capacity = 2 * prefix + budget.tokens + (2 + budget.images) * image
        self.lanes = Lanes(setup, LaneShape(len(coroutines), budget.guidance, capacity))
        self.drawings = Drawings(setup, self.lanes, budget.previews)
        self.chooser = TokenChooser(setup.model, setup.sample)

    @property
    def busy(self) -> bool:
        """Whether some request is not finished."""
        return bool(self.feeds or self.drawings.canvases)

    def previews(self) -> Iterator[tuple[int, Image.Image]]:
        """Yield (request, estimate of the clean image) for each image being drawn, if the budget asks for previews."""
        return self.drawings.previews()

    def tick(self) -> None:
        """Call the backbone once for everything that is pending, then start the images that requests ask for next."""
        feeds, self.feeds = self.feeds, {}
        hidden = self.lanes.forward({r: feed.strip for r, feed in feeds.items()}, self.drawings.calls)
        for r, drawn in self.drawings.advance(hidden):
            self._resume(r, drawn)
        if feeds:
            last_RD = torch.stack([hidden[r][len(feed.strip) - 1] for r, feed in feeds.items()])
            tokens = self.chooser.choose(last_RD, list(feeds.values()))
            for r, token, hidden_D in zip(feeds, tokens, last_RD, strict=True):
                self._resume(r, Chosen(token, hidden_D))
        draws, self.draws = self.draws, {}
        for kind in dict.fromkeys(draw.kind for draw in draws.values()):
            self.drawings.open(kind[0], {r: draw for r, draw in draws.items() if draw.kind == kind})

    def _enqueue(self, r: int, action: Action) -> None:
        if isinstance(action, Feed):
            self.feeds[r] = action
        else:
            self.draws[r] = action

    def _resume(self, r: int, outcome: Outcome | None) -> None:
        """Send a coroutine its outcome, None at its start, and take its next action. It may end, also at once."""
        try:
            self._enqueue(r, self.coroutines[r].send(outcome))
        except StopIteration:
            return
