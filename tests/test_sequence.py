"""Documents, labels and the attention rule, against brute force and against transformers' masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from transformers.masking_utils import and_masks, blockwise_overlay, causal_mask_function, or_masks

from mmgen.sequence import (
    IGNORE,
    Batch,
    Block,
    ImageSegment,
    Sites,
    TextSegment,
    Writer,
    collate,
    dense_visible,
    flex_rule,
    visible,
)
from mmgen.tokenizer import Tokenizer
from tests.conftest import GRIDS, text_tokenizer

TOK = Tokenizer(text_tokenizer(), GRIDS)
ONE = Tokenizer(text_tokenizer(), GRIDS[:1])
P = 3


def block(n: int, **kind: bool) -> Block:
    return Block(np.arange(n), {"t": np.zeros(n, np.float32)}, **kind)


def image(grid: tuple[int, int], *kinds: dict[str, bool]) -> ImageSegment:
    n = grid[0] * grid[1]
    return ImageSegment(np.zeros((n, P), np.float32), grid, [block(n, **kind) for kind in kinds or ({},)])


def pack(rows: list, length: int = 40, tokenizer: Tokenizer = TOK) -> Batch:
    strips = [[doc if isinstance(doc, int) else Writer(tokenizer).document(doc) for doc in row] for row in rows]
    return collate(strips, length, tokenizer, block(0), P)


segments = st.one_of(
    st.lists(st.integers(0, 255), min_size=1, max_size=4).map(lambda ids: TextSegment(ids)),
    st.builds(
        lambda grid, both, copy: image(
            grid, *([{"noised": True, "bidirectional": both}] if copy else []), {"bidirectional": both}
        ),
        st.sampled_from(GRIDS), st.booleans(), st.booleans(),
    ),
)  # fmt: skip
rows = st.lists(st.lists(st.lists(segments, min_size=1, max_size=2), max_size=2), min_size=1, max_size=2)


def by_hand(batch: Batch) -> torch.Tensor:
    """The rule of the design, read literally, one pair at a time."""
    B, S = batch.ids_BS.shape
    out = torch.zeros(B, S, S, dtype=torch.bool)
    for b in range(B):
        doc, blk = batch.document_BS[b].tolist(), batch.block_BS[b].tolist()
        both, noised = batch.bidirectional_BS[b].tolist(), batch.noised_BS[b].tolist()
        for q in range(S):
            for k in range(S):
                same_block = blk[q] == blk[k] and blk[q] >= 0
                foreign_noise = noised[k] and not same_block
                seen = k <= q or (same_block and both[q])
                out[b, q, k] = doc[q] == doc[k] and seen and not foreign_noise
    return out


@settings(max_examples=12, deadline=None)
@given(rows)
def test_every_form_of_the_rule_is_the_rule(packed: list) -> None:
    batch = pack(packed, 64)
    expected = by_hand(batch)
    assert torch.equal(dense_visible(batch.sites), expected)
    B, S = batch.ids_BS.shape
    flex = create_mask(flex_rule(batch.sites), B, None, S, S, device="cpu")
    assert torch.equal(flex[:, 0], expected)


@settings(max_examples=8, deadline=None)
@given(rows)
def test_block_mask_holds_exactly_the_visible_pairs(packed: list) -> None:
    """The BlockMask that CUDA gets: every visible pair lies in a block that is kept."""
    batch = pack(packed, 64)
    B, S = batch.ids_BS.shape
    blocks = create_block_mask(flex_rule(batch.sites), B, None, S, S, device="cpu", BLOCK_SIZE=16)
    kept = blocks.to_dense()[:, 0].bool().repeat_interleave(16, 1).repeat_interleave(16, 2)
    expected = by_hand(batch)
    assert not (expected & ~kept).any()
    per_block = expected.view(B, S // 16, 16, S // 16, 16).any(4).any(2)
    assert torch.equal(blocks.to_dense()[:, 0].bool(), per_block), "no block is computed in vain"


def test_the_rule_is_transformers_rule() -> None:
    """One document with bidirectional images: transformers' `causal or same block` says the same."""
    batch = pack([[[TextSegment([1, 2]), image((2, 2)), TextSegment([3]), image((3, 2)), TextSegment([4])]]], 30)
    S = int((batch.document_BS[0] >= 0).sum())
    theirs = or_masks(causal_mask_function, blockwise_overlay(batch.block_BS))
    where = torch.arange(S)
    b = torch.zeros(1, dtype=torch.long)
    expected = theirs(b.view(1, 1), b.view(1, 1), where[:, None], where[None, :])
    assert torch.equal(dense_visible(batch.sites)[0, :S, :S], expected.view(S, S))
    broken = and_masks(causal_mask_function)(b, b, where[:, None], where[None, :])
    assert not torch.equal(dense_visible(batch.sites)[0, :S, :S], broken), "a causal mask must be told apart"


def test_layout_of_the_design() -> None:
    """BOS text BOI size z.. EOI EOS | BOS BOI size z.. EOI text EOS | padding."""
    batch = pack([[[TextSegment([5, 6]), image((2, 2))], [image((2, 2)), TextSegment([7])]]], 26)
    t, size = TOK, TOK.size[(2, 2)]
    first = [t.bos, 5, 6, t.boi, size, *[t.pad] * 4, t.eoi, t.eos]
    second = [t.bos, t.boi, size, *[t.pad] * 4, t.eoi, 7, t.eos]
    assert batch.ids_BS[0].tolist() == first + second + [t.pad] * 5
    assert batch.position_BS[0].tolist() == [
        0,
        1,
        2,
        3,
        4,
        5,
        5,
        5,
        5,
        6,
        7,
        0,
        1,
        2,
        3,
        3,
        3,
        3,
        4,
        5,
        6,
        0,
        1,
        2,
        3,
        4,
    ]
    assert batch.document_BS[0].tolist() == [0] * 11 + [1] * 10 + [-1] * 5
    assert batch.block_BS[0].tolist() == [-1] * 5 + [0] * 4 + [-1] * 5 + [1] * 4 + [-1] * 8
    assert batch.at_I.tolist() == [5, 6, 7, 8, 14, 15, 16, 17]
    assert batch.size_at_M.tolist() == [4, 13]


def test_labels() -> None:
    """EOI is never a target, the size token only where there is a choice, nothing crosses documents."""
    for tokenizer in (TOK, ONE):
        t, size = tokenizer, tokenizer.size[(2, 2)]
        several = tokenizer is TOK
        batch = pack([[[TextSegment([5]), image((2, 2)), TextSegment([9])], [TextSegment([8])]]], 18, tokenizer)
        none = [IGNORE]
        expected = [5, t.boi, size if several else IGNORE, *none, *none * 4, 9, t.eos, *none, 8, t.eos, *none * 5]
        assert batch.label_BS[0].tolist() == expected
        assert batch.label_at_L.tolist() == [i for i, label in enumerate(expected) if label != IGNORE]


def test_empty_slots_move_nothing() -> None:
    whole = pack([[[TextSegment([5])], [TextSegment([6, 7])], [TextSegment([8])]]], 16)
    gap = pack([[[TextSegment([5])], 4, [TextSegment([8])]]], 16)
    keep = torch.ones(16, dtype=torch.bool)
    keep[3:7] = False
    assert torch.equal(whole.ids_BS[0][keep], gap.ids_BS[0][keep])
    assert torch.equal(whole.label_BS[0][keep], gap.label_BS[0][keep])
    assert (gap.label_BS[0][3:7] == IGNORE).all()


def test_a_row_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match=r"do not fit a row of 6 \(data.row_length\)"):
        pack([[[TextSegment([1, 2, 3, 4, 5])]]], 6)


def test_an_undeclared_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="patch grid 5x5 was never declared"):
        Writer(TOK).open_image((5, 5))


def test_user_text_is_never_a_special_token() -> None:
    ids = TOK.encode("<|boi|> and <|eos|>")
    assert not set(ids) & TOK.special
    assert TOK.decode(ids) == "<|boi|> and <|eos|>"


def test_padding_sees_padding_only() -> None:
    batch = pack([[[TextSegment([5])]]], 8)
    seen = dense_visible(batch.sites)[0]
    assert not seen[3:, :3].any()
    assert seen.diagonal().all(), "no query without a key: softmax would be NaN"


def test_visible_broadcasts() -> None:
    one = Sites(*(torch.tensor(v) for v in (3, 0, -1, False, False)))
    other = Sites(*(torch.tensor(v) for v in (2, 0, -1, False, False)))
    assert bool(visible(one, other))
    assert not bool(visible(other, one))
