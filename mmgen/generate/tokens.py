"""The choice of the next token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from mmgen.config import SampleConfig
from mmgen.generate.exchange import Feed
from mmgen.model import MMGenModel


class TokenChooser:
    """Chooses the allowed token of the largest logit; with Gumbel noise added, that token is a sample."""

    def __init__(self, model: MMGenModel, sample: SampleConfig) -> None:
        self.model, self.sample = model, sample
        self.warpers = _warpers(sample)

    def choose(self, last_RD: Tensor, feeds: Sequence[Feed]) -> list[int]:
        """Return the next token of each request, from the hidden states [R, D] of their last positions."""
        scores_RV = self.model.logits(last_RD).cpu().double()  # one copy per tick; some devices have no float64
        allowed_RV = torch.from_numpy(np.stack([feed.allowed_V for feed in feeds]))
        scores_RV = scores_RV.masked_fill(~allowed_RV, -torch.inf)
        gumbel = [feed.gumbel_V for feed in feeds if feed.gumbel_V is not None]
        if gumbel:
            warped: Tensor = self.warpers(None, scores_RV / self.sample.temperature)  # type: ignore[arg-type]
            scores_RV = warped + torch.from_numpy(np.stack(gumbel))
        chosen: list[int] = scores_RV.argmax(-1).tolist()
        return chosen


def _warpers(sample: SampleConfig) -> LogitsProcessorList:
    """The filters top-k, top-p and min-p of transformers; they use the logits only, not the tokens before."""
    warpers = LogitsProcessorList()
    if sample.top_k:
        warpers.append(TopKLogitsWarper(sample.top_k))
    if sample.top_p < 1:
        warpers.append(TopPLogitsWarper(sample.top_p))
    if sample.min_p > 0:
        warpers.append(MinPLogitsWarper(sample.min_p))
    return warpers
