"""Documents, labels and the attention rule, compared with brute force and with masks of transformers."""

from __future__ import annotations

from dataclasses import fields
from itertools import count, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from transformers.masking_utils import and_masks, blockwise_overlay, causal_mask_function, or_masks

from mmgen.flow.philox import keyed_normal
from mmgen.sequence.attention import Sites, dense_visible, flex_rule, visible
from mmgen.sequence.batch import IGNORE, Batch
from mmgen.sequence.document import Block, ImageSegment, TextSegment, Writer
from mmgen.sequence.tokenizer import Tokenizer
from tests.conftest import GRIDS, packed, text_tokenizer

TOK = Tokenizer(text_tokenizer(), GRIDS)
ONE = Tokenizer(text_tokenizer(), GRIDS[:1])
P = 3


def block(n: int, **kind: bool) -> Block:
    return Block(np.arange(n), {"t": np.zeros(n, np.float32)}, **kind)


def image(grid: tuple[int, int], *kinds: dict[str, bool]) -> ImageSegment:
    n = grid[0] * grid[1]
    return ImageSegment(np.zeros((n, P), np.float32), grid, [block(n, **kind) for kind in kinds or ({},)])


def pack(rows: list, length: int = 40, tokenizer: Tokenizer = TOK) -> Batch:
    strips = [
        [doc if isinstance(doc, int) else Writer(tokenizer, "shared").document(doc) for doc in row] for row in rows
    ]
    return packed(strips, length, tokenizer, block(0), P)


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


def literal_rule(batch: Batch) -> torch.Tensor:
    """The attention rule, written literally for one pair at a time."""
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
def test_every_mask_equals_the_rule(packed: list) -> None:
    batch = pack(packed, 64)
    expected = literal_rule(batch)
    assert torch.equal(dense_visible(batch.sites), expected)
    B, S = batch.ids_BS.shape
    flex = create_mask(flex_rule(batch.sites), B, None, S, S, device="cpu")
    assert torch.equal(flex[:, 0], expected)


@settings(max_examples=8, deadline=None)
@given(rows)
def test_block_mask_holds_exactly_the_visible_pairs(packed: list) -> None:
    """In the BlockMask for CUDA, every visible pair is in a block that is computed."""
    batch = pack(packed, 64)
    B, S = batch.ids_BS.shape
    blocks = create_block_mask(flex_rule(batch.sites), B, None, S, S, device="cpu", BLOCK_SIZE=16)
    kept = blocks.to_dense()[:, 0].bool().repeat_interleave(16, 1).repeat_interleave(16, 2)
    expected = literal_rule(batch)
    assert not (expected & ~kept).any()
    per_block = expected.view(B, S // 16, 16, S // 16, 16).any(4).any(2)
    assert torch.equal(blocks.to_dense()[:, 0].bool(), per_block), "no block without a visible pair is computed"


def test_the_rule_equals_the_mask_of_transformers() -> None:
    """For one document with bidirectional images, it equals `causal or same block` of transformers."""
    batch = pack([[[TextSegment([1, 2]), image((2, 2)), TextSegment([3]), image((3, 2)), TextSegment([4])]]], 30)
    S = int((batch.document_BS[0] >= 0).sum())
    theirs = or_masks(causal_mask_function, blockwise_overlay(batch.block_BS))
    where = torch.arange(S)
    b = torch.zeros(1, dtype=torch.long)
    expected = theirs(b.view(1, 1), b.view(1, 1), where[:, None], where[None, :])
    assert torch.equal(dense_visible(batch.sites)[0, :S, :S], expected.view(S, S))
    broken = and_masks(causal_mask_function)(b, b, where[:, None], where[None, :])
    assert not torch.equal(dense_visible(batch.sites)[0, :S, :S], broken), "a causal mask must differ"


def test_the_layout_of_documents_in_a_row() -> None:
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


def random_image(rng: np.random.Generator, grid: tuple[int, int], kinds: list[tuple[bool, bool]]) -> ImageSegment:
    """Blocks in random orders, each with its own draws; random patches of the first block are learned."""
    n = grid[0] * grid[1]
    blocks = [
        Block(
            rng.permutation(n), {"t": rng.random(n, dtype=np.float32), "u": rng.random((n, 2), dtype=np.float32)},
            both, noised, rng.random(n) < 0.5 if i == 0 else bool(rng.integers(2)), int(rng.integers(2**63)),
        )
        for i, (both, noised) in enumerate(kinds)
    ]  # fmt: skip
    return ImageSegment(rng.random((n, P), dtype=np.float32), grid, blocks)


def walked(rows: list, length: int) -> dict[str, list]:
    """Every field of a batch, computed one position at a time."""
    t = TOK
    found: dict[str, list] = {f.name.split("_")[0]: [] for f in fields(Batch) if f.name != "draws"}
    found |= {"t": [], "u": [], "label_at": [], "loss_at": [], "size_at": []}
    images = 0
    for b, row in enumerate(rows):
        line: list[tuple] = []  # id, position, document, block, bidirectional, noised
        unlearned: set[int] = set()
        blocks = 0
        for d, document in enumerate(row):
            if isinstance(document, int):
                line += [(t.pad, None, -1, -1, False, False)] * document
                continue
            position = 0

            def token(i: int, d: int = d, line: list[tuple] = line) -> None:
                nonlocal position
                line.append((i, position, d, -1, False, False))
                position += 1

            token(t.bos)
            for segment in document:
                if isinstance(segment, TextSegment):
                    for i in segment.ids:
                        token(i)
                    continue
                token(t.boi)
                found["size_at"].append(b * length + len(line))
                first = int(segment.blocks[-1].order_N[0])
                found["first"].append([first // segment.grid[1], first % segment.grid[1]])
                token(t.size[segment.grid])
                for copy in segment.blocks:
                    learned = np.broadcast_to(copy.loss, len(copy.order_N))
                    for index, patch in enumerate(copy.order_N.tolist()):
                        cell = [patch // segment.grid[1], patch % segment.grid[1]]
                        if learned[index]:
                            found["loss_at"].append(len(found["at"]))
                            noise = keyed_normal(torch.tensor([copy.key]), torch.tensor([cell]), 2, P)
                            found["eps"].append(noise[0].tolist())
                        found["at"].append(b * length + len(line))
                        found["x"].append(segment.x_NP[patch].tolist())
                        found["image"].append(images)
                        found["cell"].append(cell)
                        found["t"].append(float(copy.draws["t"][index]))
                        found["u"].append(copy.draws["u"][index].tolist())
                        line.append((t.pad, position, d, blocks, copy.bidirectional, copy.noised))
                    found["grid"].append([*segment.grid])
                    images, blocks = images + 1, blocks + 1
                position += 1
                token(t.eoi)
            last = document[-1]
            if isinstance(last, ImageSegment) and last.blocks[-1].noised:
                unlearned.add(len(line))  # EOS after an image that it cannot see
            token(t.eos)
        line += [(t.pad, None, -1, -1, False, False)] * (length - len(line))
        spare = count()
        line = [(i, next(spare) if p is None else p, *rest) for i, p, *rest in line]
        for name, values in zip(
            ("ids", "position", "document", "block", "bidirectional", "noised"), zip(*line, strict=True), strict=True
        ):
            found[name].append([*values])
        labels = [IGNORE] * length
        for i, (here, there) in enumerate(pairwise(line)):
            if (
                here[2] == there[2] >= 0
                and here[3] < 0
                and there[3] < 0
                and there[0] != t.eoi
                and i + 1 not in unlearned
            ):
                labels[i] = there[0]
                found["label_at"].append(b * length + i)
        found["label"].append(labels)
    return found


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_every_field_of_a_batch(seed: int) -> None:
    rng = np.random.default_rng(seed)

    def segment() -> TextSegment | ImageSegment:
        if rng.random() < 0.4:
            return TextSegment(rng.integers(0, 256, rng.integers(1, 4)).tolist())
        kinds = [(bool(rng.integers(2)), bool(rng.integers(2))) for _ in range(rng.integers(1, 3))]
        return random_image(rng, GRIDS[rng.integers(2)], kinds)

    def document() -> list | int:
        return int(rng.integers(1, 5)) if rng.random() < 0.2 else [segment() for _ in range(rng.integers(1, 4))]

    rows = [[document() for _ in range(rng.integers(0, 4))] for _ in range(rng.integers(1, 4))]
    nothing = Block(np.arange(0), {"t": np.zeros(0, np.float32), "u": np.zeros((0, 2), np.float32)})
    strips = [[doc if isinstance(doc, int) else Writer(TOK, "shared").document(doc) for doc in row] for row in rows]
    batch, expected = packed(strips, 130, TOK, nothing, P, noise_draws=2), walked(rows, 130)
    for f in fields(Batch):
        if f.name in ("draws", "copies"):
            continue
        value = getattr(batch, f.name)
        name = f.name.rsplit("_", 1)[0]
        assert value.tolist() == expected[name], f.name
        kind = {"bidirectional_BS": torch.bool, "noised_BS": torch.bool}
        kind |= dict.fromkeys(("x_IP", "eps_JKP"), torch.float32)
        assert value.dtype == kind.get(f.name, torch.int64), f.name
    assert batch.cell_I2.shape[1:] == batch.first_M2.shape[1:] == (2,)
    learned = set(batch.image_I[batch.loss_at_J].tolist())
    for number, copy in enumerate(batch.copies):
        cells = batch.cell_I2[batch.image_I == number]
        assert copy == (tuple((cells.amax(0) + 1).tolist()), number in learned)
    assert batch.x_IP.shape[1] == P
    for name, draw in batch.draws.items():
        assert draw.tolist() == expected[name]
        assert draw.dtype == torch.float32


def test_all_fields_of_a_batch_move() -> None:
    """All fields move to another device, patches and draws to another type, and the first batch stays unchanged."""
    batch = pack([[[TextSegment([5]), image((2, 2))]]], 16)
    moved, wide = batch.to("meta"), batch.to("cpu", torch.float64)
    for f in fields(Batch):
        if f.name in ("draws", "copies"):
            continue
        old, far, new = (getattr(b, f.name) for b in (batch, moved, wide))
        assert (far.device.type, far.dtype, far.shape) == ("meta", old.dtype, old.shape)
        assert new.dtype == (torch.float64 if old.is_floating_point() else old.dtype)
        assert torch.equal(old, new.to(old.dtype))
    assert batch.draws.keys() == moved.draws.keys() == wide.draws.keys()
    assert batch.copies == moved.copies == wide.copies == [((2, 2), True)]
    assert (moved.draws["t"].device.type, moved.draws["t"].dtype) == ("meta", torch.float32)
    assert wide.draws["t"].dtype == torch.float64
    assert torch.equal(batch.draws["t"], wide.draws["t"].float())


def test_labels() -> None:
    """EOI is never a target, the size token only with several sizes, and no target crosses documents."""
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
    assert pack([[[TextSegment([1, 2, 3, 4])]]], 6).document_BS.tolist() == [[0] * 6], "a row may be full"
    with pytest.raises(ValueError, match=r"do not fit a row of 6 \(data.row_length\)"):
        pack([[[TextSegment([1, 2, 3, 4, 5])]]], 6)


def test_an_undeclared_grid_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^patch grid 5x4 is not one of the declared grids \(2x2, 3x2\): add its image"
    ):
        Writer(TOK, "shared").open_image((5, 4))


def test_user_text_is_never_a_special_token() -> None:
    ids = TOK.encode("<|boi|> and <|eos|>")
    assert not set(ids) & TOK.special
    assert TOK.decode(ids) == "<|boi|> and <|eos|>"


def test_padding_attends_only_to_padding() -> None:
    batch = pack([[[TextSegment([5])]]], 8)
    seen = dense_visible(batch.sites)[0]
    assert not seen[3:, :3].any()
    assert seen.diagonal().all(), "a query without a key would make softmax NaN"


def test_visible_broadcasts() -> None:
    one = Sites(*(torch.tensor(v) for v in (3, 0, -1, False, False)))
    other = Sites(*(torch.tensor(v) for v in (2, 0, -1, False, False)))
    assert bool(visible(one, other))
    assert not bool(visible(other, one))
