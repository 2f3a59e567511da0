"""The FLOPs of a step: against torch's counter, against masks that are written out, and with errors put in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmgen.config import Config
from mmgen.config_io import override
from mmgen.data.documents import Share
from mmgen.data.loader import Corpus
from mmgen.image.patch import Patches
from mmgen.model import MMGenConfig, MMGenModel, build_model
from mmgen.objective import layers
from mmgen.sequence.attention import dense_visible
from mmgen.sequence.batch import RawBatch, RowFormat, collate
from mmgen.sequence.document import Block, Strip, Writer
from mmgen.sequence.tokenizer import Tokenizer
from mmgen.train import flops
from mmgen.train.flops import Arithmetic, attended_pairs
from tests.conftest import pairs, picture, png, ready, tiny, write_tar

OBJECTIVES = {
    "capped": {},
    "clean_copy": {"transfusion": {"context": "clean_copy"}},
    "masked": {"kind": "mar", "mar": {"order": "masked", "draws_per_patch": 3}},
    "raster": {"kind": "mar", "mar": {"order": "raster", "head": {"depth": 1}}},
    "regression": {"kind": "mar", "mar": {"order": "random", "head": {"kind": "mse"}}},
}


def counted_by_torch(model: MMGenModel, corpus: Corpus, raw: RawBatch) -> int:
    """What torch counts for a training step whose attention is two products over all pairs of positions of a row."""
    batch = ready(corpus, raw)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        losses = model(batch)
        (losses.text + losses.image).backward()
    return counter.get_total_flops()


def dense(raw: RawBatch) -> int:
    """Number of all pairs of positions in the same row."""
    return raw.ids_BS.shape[0] * raw.ids_BS.shape[1] ** 2


def brute(raw: RawBatch) -> int:
    """Number of visible pairs, from the whole mask."""
    real = (raw.document_BS >= 0).unsqueeze(-1)
    return int((dense_visible(raw.sites) & real).sum())


def one_block(corpus: Corpus, rows: int, side: int) -> RawBatch:
    """Rows that are one bidirectional block from end to end, so every position attends to every other one."""
    n = side * side
    draws = {
        name: np.full((n, *array.shape[1:]), 0.5, np.float32)
        for name, array in corpus.layout.context((1, 1)).draws.items()
    }
    block = Block(np.arange(n), draws, bidirectional=True)
    strips = []
    for _ in range(rows):
        writer = Writer(corpus.tokenizer, "shared")
        writer.patches(np.zeros((n, corpus.patcher.settings.pixel_length), np.uint8), (side, side), [block])
        strips.append([writer.take()])
    return collate(
        strips, RowFormat(n, corpus.tokenizer, block_of(0, draws), corpus.patcher.sent, corpus.layout.noise_draws)
    )


def block_of(n: int, draws: dict[str, np.ndarray]) -> Block:
    return Block(np.arange(n), {name: array[:n] for name, array in draws.items()})


@pytest.fixture
def images_first(tmp_path: Path) -> Config:
    """Captions after most images, so that later positions read a clean copy."""
    shard = write_tar(tmp_path / "train-000.tar", pairs(40))
    return tiny(tmp_path, data={"train": [str(shard)], "image_first": 0.7})


def parts(config: Config) -> tuple[MMGenModel, Corpus]:
    tokenizer = Tokenizer.of(config)
    return build_model(config, len(tokenizer)), Corpus(config.data.train, tokenizer, config)


def excess(config: Config) -> tuple[int, int]:
    """What torch counts beyond our number on packed rows, and what padding and hidden pairs would explain."""
    return excess_of(*parts(config))


def excess_of(model: MMGenModel, corpus: Corpus) -> tuple[int, int]:
    (raw,) = corpus.first_step().micro
    counter = Arithmetic(model)
    padding = raw.ids_BS.numel() - int((raw.document_BS >= 0).sum())
    sizes = model.backbone.config
    per_pair = 12 * sizes.num_hidden_layers * sizes.num_attention_heads * sizes.head_dim
    explained = 6 * counter.body * padding + per_pair * (dense(raw) - brute(raw))
    return counted_by_torch(model, corpus, raw) - int(counter.of([raw])), explained


@pytest.mark.parametrize("name", ["capped", "masked"])
def test_where_every_pair_is_visible_the_count_is_that_of_torch(config: Config, name: str) -> None:
    model, corpus = parts(override(config, {"objective": OBJECTIVES[name]}))
    raw = one_block(corpus, rows=3, side=5)
    assert attended_pairs(raw) == dense(raw) == 3 * 25**2
    assert Arithmetic(model).of([raw]) == counted_by_torch(model, corpus, raw)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("projection", ["linear", "bottleneck"])
def test_on_packed_rows_torch_counts_padding_and_hidden_pairs_too(
    images_first: Config, name: str, projection: str
) -> None:
    changes = {"objective": OBJECTIVES[name], "model": {"patcher": {"projection": projection}}}
    found, explained = excess(override(images_first, changes))
    assert explained > 0
    assert found == explained


@pytest.mark.parametrize(
    "backbone",
    [
        {"model_type": "gpt2"},
        {"model_type": "llama", "extra": {"attention_bias": True, "head_dim": 24}},
        {"model_type": "mistral", "extra": {"sliding_window": "null"}},
    ],
    ids=str,
)
def test_other_decoders(images_first: Config, backbone: dict) -> None:
    found, explained = excess(override(images_first, {"model": {"backbone": backbone, "positions": "raster"}}))
    assert found == explained


class MixingEntry(layers.PatchEntry):
    """An entry that builds maps of each image from the values of the indices, as a convolutional one does."""

    def __init__(self, settings, width: int) -> None:
        super().__init__()
        self.width, self.first = width, nn.Conv2d(settings.patch_length, 8, 3, padding=1)
        self.last = nn.Linear(8, width)

    def enter(self, x_IP: Tensor, t_I: Tensor, cells) -> tuple[Tensor, Tensor | None]:
        values = x_IP.new_zeros(len(x_IP), 8)
        for image in cells.image_I.unique().tolist():
            at = (cells.image_I == image).nonzero().squeeze(1)
            rows, columns = (cells.cell_I2[at].max(0).values + 1).tolist()
            map_1PHW = x_IP[at].T.reshape(1, -1, rows, columns)
            values = values.index_add(0, at, self.first(map_1PHW).flatten(2)[0].T)
        return self.last(values), None


class Mixing(layers.LinearProjection):
    def entry(self) -> layers.PatchEntry:
        return MixingEntry(self.settings, self.width)


def test_a_new_projection_is_counted_without_a_change(images_first: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if it convolves, and if it reads the sizes of the images from the indices of the batch."""
    monkeypatch.setitem(layers.PROJECTIONS, "mixing", Mixing)
    found, explained = excess(override(images_first, {"model": {"patcher": {"projection": "mixing"}}}))
    assert found == explained


@pytest.mark.parametrize("name", layers.PROJECTIONS)
@pytest.mark.parametrize("objective", ["capped", "clean_copy", "masked"])
def test_every_projection_is_counted(images_first: Config, name: str, objective: str) -> None:
    """Up to the one patch of zeros that convolutions compute where there is no image."""
    if objective == "masked" and name == "unet":
        pytest.skip("MAR refuses skip connections")
    settings = {"objective": OBJECTIVES[objective], "model": {"patcher": {"projection": name}}}
    found, explained = excess(override(images_first, settings))
    assert found == pytest.approx(explained, rel=0.01)


def test_each_draw_of_the_head_counts(images_first: Config) -> None:
    """Each further draw is one pass of every learned patch through the head, without the projection of the state."""
    totals = []
    for draws in (1, 2, 5):
        objective = {"kind": "mar", "mar": {"draws_per_patch": draws, "head": {"depth": 2, "width": 16}}}
        model, corpus = parts(override(images_first, {"objective": objective}))
        (raw,) = corpus.first_step().micro
        totals.append(Arithmetic(model).of([raw]))
    head = model.objective.head
    weights = sum(p.numel() for name, p in head.named_parameters() if p.dim() > 1 and not name.startswith("state."))
    first = head.enter.weight.numel() + head.time.mlp[0].weight.numel()  # their inputs need no gradient
    per_draw = len(raw.loss_at_J) * (6 * weights - 2 * first)
    assert totals[1] - totals[0] == per_draw
    assert totals[2] - totals[1] == 3 * per_draw


HAND = """
1.............
11............
111...........
1111..........
111111........
111111........
1111..11......
1111..11......
1111..111.....
1111..1111....
..............
...........11.
...........11.
...........111
"""
"""BOS a BOI size, a noisy copy of two patches, a clean one, EOI EOS; an empty slot; two patches and EOS, by the rule."""


def hand_built(tokenizer: Tokenizer) -> RawBatch:
    """The row of `HAND`."""
    draws = {"t": np.ones(2, np.float32)}
    noisy, clean = Block(np.arange(2), draws, noised=True), Block(np.arange(2), draws, loss=False)

    def written(*parts: str) -> Strip:
        writer = Writer(tokenizer, "shared")
        for part in parts:
            if part in ("noisy", "clean"):
                if part == "clean" and "noisy" in parts:
                    continue
                blocks = [noisy, clean] if "noisy" in parts else [clean]
                writer.patches(np.zeros((2, 12), np.uint8), (1, 2), blocks)
            else:
                writer.tokens([1])
        return writer.take()

    row = [written("BOS", "a", "BOI", "size", "noisy", "clean", "EOI", "EOS"), 1, written("clean", "EOS")]
    return collate([row], RowFormat(16, tokenizer, block_of(0, draws), Patches(12, np.uint8)))


def test_the_pairs_of_a_mask_written_out(config: Config) -> None:
    raw = hand_built(Tokenizer.of(config))
    lines = HAND.split()
    seen = dense_visible(raw.sites)[0]
    assert [
        "".join("1" if seen[q, k] and raw.document_BS[0, q] >= 0 else "." for k in range(14)) for q in range(14)
    ] == lines
    assert attended_pairs(raw) == HAND.count("1")


def random_row(rng: np.random.Generator, tokenizer: Tokenizer) -> list[Strip | int]:
    """Documents of text and of images in all kinds of copies, and empty slots."""
    row: list[Strip | int] = []
    for _ in range(rng.integers(1, 4)):
        if rng.random() < 0.2:
            row.append(int(rng.integers(1, 4)))
            continue
        writer = Writer(tokenizer, "shared")
        for _ in range(rng.integers(1, 4)):
            writer.tokens([1] * int(rng.integers(0, 4)))
            n, both, copies = int(rng.integers(1, 5)), bool(rng.random() < 0.6), int(rng.integers(1, 3))
            draws = {"t": np.ones(n, np.float32)}
            blocks = [Block(np.arange(n), draws, both, noised=copies == 2), Block(np.arange(n), draws, both)][:copies]
            if rng.random() < 0.8:
                writer.patches(np.zeros((n, 12), np.uint8), (1, n), blocks)
        writer.tokens([1])
        row.append(writer.take())
    return row


def random_batch(seed: int, tokenizer: Tokenizer) -> RawBatch:
    rng = np.random.default_rng(seed)
    rows = [random_row(rng, tokenizer) for _ in range(rng.integers(1, 4))]
    return collate(rows, RowFormat(120, tokenizer, block_of(0, {"t": np.ones(1, np.float32)}), Patches(12, np.uint8)))


def wrong_pairs(count: Callable[[RawBatch], int], tokenizer: Tokenizer) -> int:
    """For how many of 60 random batches a count differs from the sum of the mask."""
    return sum(count(raw) != brute(raw) for raw in (random_batch(seed, tokenizer) for seed in range(60)))


def test_pairs_equal_the_sum_of_the_mask(config: Config) -> None:
    assert wrong_pairs(attended_pairs, Tokenizer.of(config)) == 0


def causal(raw: RawBatch) -> int:
    n = (raw.document_BS >= 0).sum(1)
    return int((n * (n + 1)).sum()) // 2


def with_foreign_noise(raw: RawBatch) -> int:
    return attended_pairs(replace(raw, noised_BS=torch.zeros_like(raw.noised_BS)))


def without_bidirectional(raw: RawBatch) -> int:
    return attended_pairs(replace(raw, bidirectional_BS=torch.zeros_like(raw.bidirectional_BS)))


FAULTS = {
    "mask ignored": dense, "causal assumed": causal, "foreign noise seen": with_foreign_noise,
    "blocks causal": without_bidirectional, "attention left out": lambda raw: 0,
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_pairs_are_detected(
    config: Config, images_first: Config, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both checks fail with each error: the sum of the mask, and torch's count of a step."""
    assert wrong_pairs(FAULTS[fault], Tokenizer.of(config)) > 30
    monkeypatch.setattr(flops, "attended_pairs", FAULTS[fault])
    found, explained = excess(override(images_first, {"objective": OBJECTIVES["clean_copy"]}))
    assert found != explained


@pytest.mark.parametrize("name", OBJECTIVES)
def test_later_batches_use_the_rates_of_the_first(images_first: Config, name: str) -> None:
    """Batches differ in the shares of learned patches and of grids; those of grids cost up to 0.1 %."""
    model, corpus = parts(override(images_first, {"objective": OBJECTIVES[name]}))
    micro = [step.micro for step in corpus.steps(0, 4, corpus.start, Share())]
    once = Arithmetic(model)
    found = [once.of(batches) for batches in micro]
    assert found == [pytest.approx(Arithmetic(model).of(batches), rel=1e-3) for batches in micro]
    assert len({round(total) for total in found}) > 1
    assert once.of([]) == 0


@pytest.mark.parametrize("untied", [False, True])
def test_the_language_head_counts_at_labels_only(images_first: Config, untied: bool) -> None:
    config = MMGenConfig.of(images_first, len(Tokenizer.of(images_first)))
    config.backbone["tie_word_embeddings"] = not untied
    config.tie_word_embeddings = not untied
    model, (_, corpus) = MMGenModel(config), parts(images_first)
    found, explained = excess_of(model, corpus)
    assert found == explained


def test_of_experts_only_those_of_a_position_count(images_first: Config) -> None:
    def body(chosen: int) -> int:
        extra = {"num_experts": 4, "num_experts_per_tok": chosen, "moe_intermediate_size": 16}
        return Arithmetic(
            parts(override(images_first, {"model": {"backbone": {"model_type": "qwen3_moe", "extra": extra}}}))[0]
        ).body

    assert body(2) - body(1) == 2 * 3 * 16 * 32  # layers, matrices, and their sides
    assert body(4) - body(1) == 3 * (body(2) - body(1))


def ratio(tmp_path: Path, count: Callable[[MMGenModel, Corpus, RawBatch], float]) -> float:
    """`clean_copy` over `capped`: one document per row without padding, an image of 256 patches before 33 letters."""
    rng, members = np.random.default_rng(0), dict[str, bytes]()
    for i in range(8):
        members[f"{i}.png"], members[f"{i}.txt"] = png(picture(rng, (32, 32))), b"%033d" % i
    shard = write_tar(tmp_path / "large.tar", members)
    backbone = {
        "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2,
        "intermediate_size": 320,
    }  # fmt: skip
    found = []
    for context, length in (("capped", 294), ("clean_copy", 550)):
        config = tiny(
            tmp_path,
            data={"train": [str(shard)], "image_first": 1.0, "row_length": length},
            model={"backbone": backbone, "patcher": {"patch_size": 2, "image_sizes": [[32, 32]]}},
            objective={"transfusion": {"context": context}},
        )
        model, corpus = parts(config)
        (raw,) = corpus.first_step().micro
        assert (raw.document_BS == 0).all()
        found.append(count(model, corpus, raw))
    return found[1] / found[0]


def test_the_ratio_of_clean_copy_to_capped_includes_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that compute all pairs need 2.4 times the FLOPs. The real mask hides the noisy copy from the rest: 1.9 times."""

    def ours(model: MMGenModel, corpus: Corpus, raw: RawBatch) -> float:
        return Arithmetic(model).of([raw])

    def from_mask(model: MMGenModel, corpus: Corpus, raw: RawBatch) -> float:
        return counted_by_torch(model, corpus, raw) - 12 * 4 * 128 * (dense(raw) - brute(raw))

    real = ratio(tmp_path, ours)
    assert real == ratio(tmp_path, from_mask) == pytest.approx(1.87, abs=0.01)
    monkeypatch.setattr(flops, "attended_pairs", dense)
    assert ratio(tmp_path, ours) == ratio(tmp_path, counted_by_torch) == pytest.approx(2.36, abs=0.04)
    monkeypatch.setattr(flops, "attended_pairs", lambda raw: 0)
    assert ratio(tmp_path, ours) == pytest.approx(1.87, abs=0.01)
