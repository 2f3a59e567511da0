"""EOS after an image is learned as sampling asks for it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from mmgen.data.dataset import COPIED
from mmgen.sequence.attention import dense_visible
from mmgen.sequence.batch import IGNORE
from tests.data.test_learn import COPIES, VARIANTS, learning, one_row, opened


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_end_after_an_image_is_learned_where_the_image_is_seen(tmp_path: Path, variant: str) -> None:
    """Sampling shows a finished image to EOI, so EOS is learned only with the image in sight, in part of the captions."""
    corpus = opened(learning(tmp_path, variant, caption_drop=0.1, image_first=0.2))
    learned, ends = Counter[str](), Counter[str]()
    for epoch in range(40):
        for row in corpus.plan.epoch_rows(epoch):
            batch = one_row(corpus, row)
            seen, start = dense_visible(batch.sites)[0], 0
            for document in row:
                end = start + document.length
                eoi, start = end - 2, end
                if batch.ids_BS[0, eoi] != corpus.tokenizer.eoi:
                    continue
                kind = "pair" if corpus.name(document)[1].split("-", 1)[1].isdigit() else "interleaved"
                ends[kind] += 1
                if batch.label_BS[0, eoi] != IGNORE:
                    learned[kind] += 1
                    assert (batch.block_BS[0] >= 0)[seen[eoi]].any(), "EOI sees no image"
    assert learned["interleaved"] == ends["interleaved"] > 0
    share = COPIED if COPIES[variant] > 1 else 1.0
    assert learned["pair"] / ends["pair"] == pytest.approx(share, abs=0.09)
