"""The order of documents is a function of seed and content, for any reader and any size."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mmgen.config import Config, SourceConfig
from mmgen.config_io import override
from mmgen.data.documents import Share, Step
from mmgen.data.loader import Corpus, steps
from mmgen.data.order import (
    Cursor,
    Cursors,
    Mixture,
    Plan,
    Position,
    chances,
    epoch_order,
    keyed,
    mix,
    pack,
    permuted,
    smooth,
    uniform,
)
from mmgen.data.shards.samples import worst_shards
from mmgen.data.tools.check import FAULTS, CheckOptions, check, greedy_fill
from mmgen.sequence.tokenizer import Tokenizer
from tests.conftest import pairs, write_tar


def words(config: Config) -> Tokenizer:
    return Tokenizer.of(config)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 9))
def test_a_permutation_contains_each_number_once(count: int, seed: int) -> None:
    found = permuted(np.arange(count), count, seed)
    assert sorted(found.tolist()) == list(range(count))
    some = np.arange(0, count, 7)
    assert (permuted(some, count, seed) == found[some]).all(), "each value is computed independently"


def test_the_order_never_changes() -> None:
    """A checkpoint of an earlier version resumes in the same order with the same noise, so these numbers are fixed."""
    assert keyed(1, "a").random(2).tolist() == [0.09143962623932189, 0.9591230913944044]
    assert chances(1, "a") == (0.2454896402740172, 0.7807259098497251)
    assert uniform(np.array([0, 1, 2**63], np.uint64), "u").tolist() == [
        0.9781408763195766, 0.29581443070050006, 0.64939090228913,
    ]  # fmt: skip
    assert permuted(np.arange(20), 20, 3, "x").tolist() == [
        9, 13, 1, 16, 2, 10, 17, 4, 19, 8, 3, 7, 15, 0, 5, 6, 14, 18, 11, 12,
    ]  # fmt: skip
    assert permuted(np.arange(5), 10**8, 3).tolist() == [67337627, 37641385, 86148140, 35072467, 2773367]
    assert epoch_order(20, 7, 2, block=4).tolist() == [
        9, 10, 11, 12, 5, 6, 7, 8, 13, 14, 15, 16, 1, 2, 3, 4, 17, 18, 19, 0,
    ]  # fmt: skip
    epochs, indices = Mixture([5, 9], [1, 3], 7, 2).documents(3, 18)
    assert epochs.tolist() == [0] * 9 + [1, 0, 1, 1, 1, 0]
    assert indices.tolist() == [11, 12, 2, 13, 5, 8, 4, 9, 10, 6, 0, 7, 8, 9, 3]
    rows = Plan(Mixture([12], [1.0], 5, 2), 6, 200, lambda e, i: (np.full(len(i), 100), 0 * i, 0 * i)).rows(Position())
    assert [[document.index for document in next(rows)[0]] for _ in range(9)] == [
        [3, 11], [0, 5], [4, 6], [10, 2], [9, 8], [7, 1], [8, 4], [0, 9], [1, 5],
    ]  # fmt: skip


@pytest.mark.broad
def test_a_permutation_looks_random() -> None:
    """Inputs and outputs are independent, and every output is equally likely (chi square, p above 1e-4)."""
    images = np.stack([permuted(np.arange(10), 10, seed) for seed in range(1000)])
    table = np.stack([np.bincount(images[:, place], minlength=10) for place in range(10)])
    assert stats.chi2.sf(((table - 100) ** 2 / 100).sum(), 81) > 1e-4
    pairs_seen = np.bincount(images[:, 0] * 10 + images[:, 1], minlength=100)
    off = pairs_seen[[i for i in range(100) if i // 10 != i % 10]]
    assert stats.chisquare(off).pvalue > 1e-4
    large = permuted(np.arange(5000), 10**8, 1)
    assert stats.kstest(large / 10**8, "uniform").pvalue > 1e-4


def test_uniform_numbers_are_uniform_and_independent() -> None:
    keys = np.arange(20_000, dtype=np.uint64)
    a, b, c = uniform(keys, 1, "a", 0), uniform(keys, 1, "b", 0), uniform(keys, 1, "a", 1)
    for draws in (a, b, c):
        assert stats.kstest(draws, "uniform").pvalue > 1e-4
    assert np.abs(np.corrcoef([a, b, c, np.roll(a, 1)]) - np.eye(4)).max() < 0.03
    assert (uniform(keys[5:6], 1, "a", 0) == a[5]).all()
    # Reference values of SplitMix64's finaliser (seed 0 advanced by the golden gamma once and twice).
    gamma = 0x9E3779B97F4A7C15
    state = np.array([gamma, 2 * gamma % 2**64], dtype=np.uint64)
    assert mix(state).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


@pytest.mark.parametrize("block", [1, 4, 16, 64])
@pytest.mark.parametrize("count", [1, 5, 40, 1000])
def test_an_epoch_holds_every_document_also_in_parts(count: int, block: int) -> None:
    whole = epoch_order(count, 3, 2, block=block)
    assert sorted(whole.tolist()) == list(range(count))
    cut = [epoch_order(count, 3, 2, range(a, min(a + 7, count)), block) for a in range(0, count, 7)]
    assert np.concatenate(cut).tolist() == whole.tolist()
    if count == 1000:
        other = epoch_order(count, 3, 3, block=block)
        assert (other != whole).mean() > 0.9
        neighbours = (np.diff(whole) % count == 1).mean()
        assert abs(neighbours - (block - 1) / block) < 0.06, "only blocks stay together"


def lengths_of(epochs: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A simulated index of any size: the length depends on the number alone."""
    length = 10 + (mix(indices.astype(np.uint64)) % np.uint64(60)).astype(np.int64)
    return length, np.ones_like(length), np.zeros_like(length)


@pytest.mark.broad
def test_resume_costs_the_same_anywhere() -> None:
    """In an index of 10^8 samples, rows at any position take the same time and little memory."""
    import tracemalloc

    plan = Plan(Mixture([10**8], [1.0], 0, 16), 1024, 640, lengths_of)
    tracemalloc.start()
    spent = {}
    for at in (10, 10**4, 10**7):
        begin = Position(0, at // 1024, 0)
        times = []
        for _ in range(5):
            began = time.process_time()
            next(plan.rows(begin))
            times.append(time.process_time() - began)
        spent[at] = min(times)
    assert tracemalloc.get_traced_memory()[1] < 32 * 2**20
    tracemalloc.stop()
    assert max(spent.values()) < 3 * min(spent.values())


def test_fill_is_98_percent_where_rows_are_long() -> None:
    plan = Plan(Mixture([200_000], [1.0], 0, 16), 4096, 16 * 40, lengths_of)
    source, positions, rows = plan.rows(Position()), 0, 600
    for _ in range(rows):
        row, _ = next(source)
        positions += sum(document.length for document in row)
        assert sum(document.length for document in row) <= 640
    fill = positions / (rows * 640)
    assert fill >= 0.98
    length, *_ = lengths_of(np.zeros(4096), np.arange(4096))
    assert fill > greedy_fill(length.tolist(), 640) > float(length.mean() / length.max()) * 0.5


def test_best_fit_takes_the_longest_first() -> None:
    assert pack([5, 4, 3, 2, 6], 10) == [[4, 1], [0, 2, 3]]
    assert pack([], 10) == []
    assert pack([10, 10, 1], 10) == [[0], [1], [2]]
    assert pack([3, 3, 3, 3], 6) == [[0, 1], [2, 3]]
    assert pack([6, 7, 3, 4], 10) == [[1, 2], [0, 3]]


def test_rows_stream_across_windows_and_epochs() -> None:
    plan = Plan(Mixture([10], [1.0], 0), 4, 200, lambda e, i: (np.full(len(i), 100), 0 * i, 0 * i))
    source = plan.rows(Position())
    found = [next(source) for _ in range(12)]
    assert [after for _, after in found][:6] == [
        Position(0, 0, 1), Position(0, 0, 2), Position(0, 1, 1), Position(0, 1, 2), Position(0, 2, 1),
        Position(1, 0, 1),
    ]  # fmt: skip
    assert sorted(d.index for row, _ in found[:5] for d in row) == list(range(10))
    assert [d.epoch for row, _ in found for d in row] == [0] * 10 + [1] * 10 + [2] * 4
    for at in range(11):
        rest = plan.rows(found[at][1])
        assert [next(rest) for _ in range(11 - at)] == found[at + 1 :]
    assert [len(list(plan.epoch_rows(epoch))) for epoch in (0, 1)] == [5, 5]


def test_positions_survive_a_checkpoint() -> None:
    assert Position(1, 2, 3).as_dict() == {"epoch": 1, "window": 2, "row": 3}
    one, two = Cursors({4: Cursor(1, 2, 3, 4, 5, 6)}), Cursors({0: Cursor(6)})
    both = Cursors.union([one, two])
    assert both.as_dict() == {"streams": [[0, 6, 0, 0, 0, 0, 0], [4, 1, 2, 3, 4, 5, 6]]}
    assert Cursors.of(both.as_dict()) == both
    assert both.of_stream(4) == Cursor(1, 2, 3, 4, 5, 6)
    assert both.of_stream(3) == Cursor(), "a stream that was not read is at its beginning"


@pytest.mark.broad
@pytest.mark.parametrize("weights", [[1, 1], [3, 1], [5, 2, 1], [0.01, 1]])
def test_mixtures_keep_their_proportions(weights: list[float]) -> None:
    counts = [40, 700, 90][: len(weights)]
    mixture = Mixture(counts, weights, 0, 4)
    epochs, indices = mixture.documents(0, 30_000)
    bounds = np.cumsum([0, *counts])
    share = np.histogram(indices, bounds)[0] / 30_000
    assert np.abs(share - np.array(weights) / sum(weights)).max() < 0.01
    for first, last in ((0, 5), (777, 1500), (16_380, 16_400), (29_000, 30_000)):
        part = mixture.documents(first, last)
        assert (part[0] == epochs[first:last]).all()
        assert (part[1] == indices[first:last]).all()
    for source, count in enumerate(counts):
        mine = (indices >= bounds[source]) & (indices < bounds[source + 1])
        for epoch in range(int(epochs[mine].max())):
            assert sorted(indices[mine & (epochs == epoch)].tolist()) == list(
                range(bounds[source], bounds[source] + count)
            )
    window = smooth(weights, 1 << 14)[:400]
    assert np.abs(np.bincount(window, minlength=len(weights)) / 400 - np.array(weights) / sum(weights)).max() < 0.02


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([3, 1], [0, 0, 1, 0, 0, 0, 1, 0]),
        ([1, 1, 1], [0, 1, 2, 0, 1, 2, 0, 1]),
        ([0.01, 1], [1, 1, 0, 1, 1, 1]),
        ([5, 2, 1], [0, 1, 0, 0, 0, 1, 2, 0, 0, 1, 0]),
    ],
)
def test_sources_are_spread_evenly(weights: list[float], expected: list[int]) -> None:
    """Counts are by largest remainder, at least one each; each prefix is within one of its share."""
    dealt = smooth(weights, len(expected))
    assert dealt.tolist() == expected
    assert dealt.dtype == np.int64


@pytest.mark.broad
def test_sources_with_weights_train(config: Config, tmp_path: Path) -> None:
    shards = [str(write_tar(tmp_path / f"{name}.tar", pairs(20, i))) for i, name in enumerate("ab")]
    sources = [SourceConfig(shards=[shards[0]], weight=3), SourceConfig(shards=[shards[1]])]
    mixed = override(config, {"data": {"train": [source.model_dump() for source in sources]}})
    corpus = Corpus(mixed.data.train, words(mixed), mixed)
    seen = Counter(
        document.index // 20 for epoch in range(20) for row in corpus.plan.epoch_rows(epoch) for document in row
    )
    assert abs(seen[0] / sum(seen.values()) - 0.75) < 0.01


def tensors(step: Step) -> list[torch.Tensor]:
    batches = step.micro
    return [
        torch.cat([getattr(batch, name) for batch in batches])
        for name in ("ids_BS", "patches_UP", "label_BS", "document_BS")
    ]


@pytest.mark.broad
@pytest.mark.parametrize("world", [2, 3, 4])
def test_any_world_resumes_any_other(config: Config, world: int) -> None:
    """Steps 0 to 2 on one process, the rest on `world`: together they are the run of one process."""
    config = override(config, {"train": {"batch_rows": 6}, "data": {"block": 4}})
    corpus = Corpus(config.data.train, words(config), config)
    whole = list(steps(corpus, 0, 6, Position()))
    for at in (1, 3, 5):
        shares = [list(steps(corpus, at, 6, whole[at - 1].after, Share(rank, world))) for rank in range(world)]
        for number, step in enumerate(whole[at:]):
            for rank in range(world):
                part = shares[rank][number]
                rows = list(range(rank, 6, world))
                assert torch.equal(part.micro[0].ids_BS[: len(rows)], step.micro[0].ids_BS[rows])
                assert part.after == step.after
            keys = sorted(torch.cat([s[number].micro[0].noise_key_C for s in shares]).tolist())
            assert keys == sorted(step.micro[0].noise_key_C.tolist())


@pytest.mark.broad
def test_prefetch_depth_changes_nothing(config: Config) -> None:
    two = override(config, {"data": {"workers": 2}})
    corpus = Corpus(two.data.train, words(two), two)
    ahead = list(steps(corpus, 0, 5, Position()))
    alone = [next(steps(corpus, n, n + 1, ahead[n - 1].after if n else Position())) for n in range(5)]
    assert all(
        torch.equal(x, y)
        for a, b in zip(ahead, alone, strict=True)
        for x, y in zip(tensors(a), tensors(b), strict=True)
    )


@pytest.mark.broad
@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_every_fault_of_the_order_is_detected(config: Config, fault: str | None) -> None:
    report = check(config.data.train, words(config), config, CheckOptions(inject=fault, world=2)).as_dict()
    wrong = {
        None: set(), "per_rank_seed": {"same_for_any_world"}, "dropped_carry": {"coverage_exact"},
        "off_by_one": {"same_after_resume"}, "duplicated_shard": set(),
    }[fault]  # fmt: skip
    assert report["holds"] == (fault is None)
    assert {name for name, value in report.items() if value is False} - {"holds"} == wrong
    assert report["duplicates"] == (40 if fault == "duplicated_shard" else 0)
    assert report["samples"] == (80 if fault == "duplicated_shard" else 40)


@pytest.mark.broad
def test_the_check_counts_bad_samples(config: Config, tmp_path: Path) -> None:
    members = pairs(8)
    members["0003.png"] = members["0003.png"][:60]  # the header is intact
    members["0005.json"] = b"{"
    shard = str(write_tar(tmp_path / "bad.tar", members))
    (tmp_path / "copy.tar").write_bytes((tmp_path / "bad.tar").read_bytes())
    lines: list[str] = []
    report = check([shard], words(config), config, CheckOptions(lines.append))
    assert (report.samples, len(report.bad_samples), report.holds) == (7, 2, False)
    assert {item.key for item in report.bad_samples} == {"0003", "0005"}
    assert str(tmp_path / "copy.tar") in report.unused_shards
    assert report.totals.text_tokens == sum(len(f"picture {i}") for i in range(8) if i != 5)
    assert report.totals.patches == sum(4 if i % 3 else 6 for i in range(8) if i != 5)
    assert lines
    both = check([shard, str(tmp_path / "copy.tar")], words(config), config, CheckOptions(decode=False))
    assert both.duplicate_shards == [str(tmp_path / "copy.tar")]


def test_worst_shards(tmp_path: Path) -> None:
    lines = ['{"shard": "a.tar"}'] * 2 + ['{"shard": "b.tar"}'] * 5
    (tmp_path / "q.jsonl").write_text("\n".join(lines) + "\n")
    assert worst_shards(tmp_path / "q.jsonl") == "b.tar: 5, a.tar: 2"
