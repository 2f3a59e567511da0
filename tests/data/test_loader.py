"""Order, random draws and the loader: the same steps for any number of processes and workers, also with bad input."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from mmgen.config import Config
from mmgen.config_io import override
from mmgen.data.documents import Share, Step
from mmgen.data.loader import Corpus, steps
from mmgen.data.order import Position, chances, epoch_order, keyed, pack
from mmgen.data.shards.samples import BadRecord, BadSample, expand, read
from mmgen.data.streams import training_corpus
from mmgen.flow.philox import keyed_normal
from mmgen.sequence.batch import RawBatch
from mmgen.sequence.tokenizer import Tokenizer
from tests.conftest import pairs, picture, png, tiny, write_tar


def corpus_of(config: Config) -> Corpus:
    return Corpus(config.data.train, Tokenizer.of(config), config)


def parts(step: Step) -> list[torch.Tensor]:
    batch = step.micro[0]
    return [
        batch.ids_BS,
        batch.patches_UP,
        batch.source_I,
        batch.noise_key_C,
        *(batch.draws[name] for name in sorted(batch.draws)),
        batch.label_BS,
    ]


def same(a: Step, b: Step) -> bool:
    return all(torch.equal(x, y) for x, y in zip(parts(a), parts(b), strict=True))


def test_workers_and_resume_change_nothing(config: Config) -> None:
    corpus = corpus_of(config)
    plain = list(steps(corpus, 0, 9, Position()))
    for workers in (1, 2):
        other = Corpus(config.data.train, corpus.tokenizer, override(config, {"data": {"workers": workers}}))
        assert all(same(a, b) for a, b in zip(plain, steps(other, 0, 9, Position()), strict=True))
    for at in (1, 4, 7):
        rest = list(steps(corpus, at, 9, plain[at - 1].after))
        assert all(same(a, b) for a, b in zip(plain[at:], rest, strict=True))
    wrong = list(steps(corpus, 4, 9, plain[4].after))
    assert not same(plain[4], wrong[0]), "an off-by-one resume must change the steps"


def test_the_first_step_equals_that_of_a_run(config: Config) -> None:
    corpus = corpus_of(override(config, {"data": {"workers": 1}}))
    for rank, world in ((0, 1), (1, 2)):
        (expected,) = steps(corpus, 0, 1, Position(), Share(rank, world))
        first = corpus.first_step(Share(rank, world))
        assert same(first, expected)
        assert first.images > 0


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_share_one_global_step(config: Config, world: int) -> None:
    """Rank r has rows r, r + W, ...; all ranks together have the step of a single process, including its noise."""
    config = override(config, {"train": {"batch_rows": 5}})
    corpus = corpus_of(config)
    source = corpus.plan.rows(Position())
    rows, after = zip(*(next(source) for _ in range(5)), strict=True)
    whole = corpus.step(7, rows, after[-1]).micro[0]
    for rank in range(world):
        mine = corpus.step(7, rows, after[-1], Share(rank, world)).micro[0]
        expected = list(range(rank, 5, world))
        assert torch.equal(mine.ids_BS[: len(expected)], whole.ids_BS[expected])
        for place, row in enumerate(expected):
            assert torch.equal(eps_of(mine, place), eps_of(whole, row))
        assert (mine.document_BS[len(expected) :] == -1).all(), "missing rows are empty rows"


def eps_of(batch: RawBatch, row: int) -> torch.Tensor:
    here = batch.at_I // batch.ids_BS.shape[1] == row
    noise = keyed_normal(batch.noise_key_C[batch.image_I[here]], batch.cell_I2[here], batch.noise_draws, 12)
    return torch.cat([noise.flatten(), batch.draws["t"][here].flatten()])


def test_micro_steps_are_a_cut_of_the_step(config: Config) -> None:
    whole = next(steps(corpus_of(config), 0, 1, Position())).micro
    cut = next(steps(corpus_of(override(config, {"train": {"micro_rows": 1}})), 0, 1, Position())).micro
    assert len(whole) == 1
    assert len(cut) == 4
    assert torch.equal(torch.cat([batch.ids_BS for batch in cut]), whole[0].ids_BS)
    assert torch.equal(torch.cat([batch.noise_key_C for batch in cut]), whole[0].noise_key_C)


def test_an_epoch_holds_each_sample_once(config: Config) -> None:
    corpus = corpus_of(config)
    for epoch in (0, 1):
        seen = Counter(document.index for row in corpus.plan.epoch_rows(epoch) for document in row)
        assert seen == Counter(range(40))
    assert not np.array_equal(epoch_order(40, 3, 0), epoch_order(40, 3, 1))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=60))
def test_packing(lengths: list[int]) -> None:
    rows = pack(lengths, 20)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 20 for row in rows)
    assert len(rows) <= max(1, 2 * -(-sum(lengths) // 20)), "best fit uses less than twice the optimum"


def test_forms_have_their_shares(config: Config) -> None:
    corpus = corpus_of(config)
    forms = Counter(corpus.form(epoch, index) for epoch in range(200) for index in range(40))
    total = sum(forms.values())
    assert abs(forms["image first"] / total - 0.2) < 0.02
    assert abs(forms["caption dropped"] / total - 0.08) < 0.01
    assert corpus.form(3, 5) == corpus.form(3, 5)


def test_randomness_is_keyed() -> None:
    assert keyed(1, "a").random() == keyed(1, "a").random()
    assert keyed(1, "a").random() != keyed(1, "b").random()
    assert keyed("ab", "c").random() != keyed("a", "bc").random()
    draws = np.array([chances(i, "x") for i in range(4000)])
    assert np.abs(draws.mean(0) - 0.5).max() < 0.02
    assert np.abs(np.corrcoef(draws.T)[0, 1]) < 0.05


def test_capped_time_only_where_text_follows(config: Config) -> None:
    """A document without its caption has no text, and the unconditional branch must see every t."""
    config = override(config, {"objective": {"time": {"stratified": False}}})
    corpus = corpus_of(config)
    seen: dict[str, list[float]] = {}
    for epoch in range(12):
        for row in corpus.plan.epoch_rows(epoch):
            for document in row:
                strip = corpus.write(document, None)
                seen.setdefault(corpus.form(epoch, document.index), []).append(
                    float(strip.blocks[0].block.draws["t"][0])
                )
    assert min(seen["image first"]) >= 0.5
    assert min(seen["caption first"]) < 0.1
    assert min(seen["caption dropped"]) < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("streams", [0, 2])
@pytest.mark.parametrize("distribution", ["uniform", "logit_normal"])
def test_times_of_the_images_of_a_document_are_independent(tmp_path: Path, distribution: str, streams: int) -> None:
    """Otherwise a model hardly ever sees a clean first image with a noisy second one, as sampling needs it."""
    rng = np.random.default_rng(0)
    pages: dict[str, bytes] = {}
    for i in range(40):
        listed = [{"image": "a.png"}, {"text": "then"}, {"image": "b.png"}]
        pages[f"{i:02d}.json"] = json.dumps(listed).encode()
        pages |= {f"{i:02d}.{name}.png": png(picture(rng)) for name in "ab"}
    shards = [str(write_tar(tmp_path / f"pages-{i}.tar", pages)) for i in range(2)]
    config = tiny(
        tmp_path, data={"train": shards, "row_length": 40, "streams": streams}, train={"batch_rows": 20},
        objective={"transfusion": {"context": "noisy"}, "time": {"distribution": distribution, "stratified": True}},
    )  # fmt: skip
    corpus = training_corpus(config, Tokenizer.of(config))
    both: list[list[float]] = []
    for step in steps(corpus, 0, 40, corpus.start):
        batch = step.micro[0]
        times: list[float] = []
        for number in range(len(batch.noise_key_C)):
            here = int(torch.nonzero(batch.image_I == number)[0])
            times.append(float(batch.draws["t"][here]))
        both += [times[i : i + 2] for i in range(0, len(times), 2)]
        if distribution == "uniform":
            even = np.diff(np.sort([*times, min(times) + 1]))
            assert even.max() < (1.01 if streams == 0 else 2.01) / len(times), "still stratified over the step"
    first, second = np.array(both).T
    assert len(first) > 700
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.12
    shuffled = np.random.default_rng(1).permutation(second)
    assert abs(np.median(np.abs(first - second)) - np.median(np.abs(first - shuffled))) < 0.03


def test_a_shard_of_the_webdataset_writer(config: Config, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with (tmp_path / "theirs.tar").open("wb") as file, webdataset.TarWriter(file) as sink:
        sink.write({"__key__": "a", "jpg": np.asarray(picture(rng)), "txt": "a jpeg"})
        sink.write({"__key__": "b", "png": np.asarray(picture(rng)), "json": {"caption": "a png"}, "cls": 3})
        sink.write({"__key__": "c", "txt": "only text"})
    corpus = corpus_of(override(config, {"data": {"train": [str(tmp_path / "theirs.tar")]}}))
    assert [sample.caption for sample in corpus.samples] == ["a jpeg", "a png", "only text"]
    assert [corpus.has_image(i) for i in range(3)] == [True, True, False]
    assert next(steps(corpus, 0, 1, Position())).images > 0


def test_pinning_makes_a_new_step(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is immutable; torch's loader uses the return value of `pin_memory`."""
    step = corpus_of(config).first_step()
    kept = list(step.micro)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)  # this works without a GPU
    pinned = step.pin_memory()
    assert list(map(id, step.micro)) == list(map(id, kept))
    assert not {id(batch) for batch in pinned.micro} & {id(batch) for batch in kept}
    assert same(step, pinned)
    assert replace(pinned, micro=step.micro) == step
    with pytest.raises(FrozenInstanceError):
        step.images = 0  # type: ignore[misc]


def test_a_corrupt_image_leaves_its_slot_empty(config: Config, tmp_path: Path) -> None:
    """The rest of the step is unchanged, and the bad sample is reported with its reason."""
    one = override(config, {"model": {"patcher": {"image_sizes": [[4, 4]]}}})
    good = pairs(12)
    bad = {**good, "0005.png": good["0005.png"][:60]}
    both = []
    for name, members in (("good", good), ("bad", bad)):
        folder = tmp_path / name
        folder.mkdir()
        shard = write_tar(folder / "train.tar", members)
        both.append(list(steps(corpus_of(override(one, {"data": {"train": [str(shard)]}})), 0, 3, Position())))
    reasons = [item for step in both[1] for item in step.bad]
    assert reasons
    assert reasons[0].key == "0005"
    assert "image cannot be decoded" in reasons[0].reason
    for whole, holed in zip(*both, strict=True):
        a, b = whole.micro[0], holed.micro[0]
        kept = b.document_BS >= 0
        assert torch.equal(a.ids_BS[kept], b.ids_BS[kept])
        if holed.bad:
            assert kept.sum() < (a.document_BS >= 0).sum()


def test_bad_groups_are_listed(tmp_path: Path) -> None:
    members = {
        "a.json": b"{not json",
        "b.cls": b"3",
        "c.txt": b"\xff\xfe",
        "d.json": b'{"caption": 7}',
        "e.txt": b"fine",
    }
    shard = write_tar(tmp_path / "s.tar", members)
    bad: list[BadRecord] = []
    assert [sample.key for sample in read([str(shard)], bad)] == ["e"]
    assert [item.key for item in bad] == ["a", "b", "c", "d"]
    with pytest.raises(BadSample):
        list(read([str(shard)]))


def test_missing_and_truncated_shards_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no-such\.tar does not exist"):
        expand([str(tmp_path / "no-such.tar")])
    with pytest.raises(ValueError, match="no shards are given"):
        expand([])
    whole = write_tar(tmp_path / "cut.tar", pairs(3)).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:1300])
    with pytest.raises(ValueError, match=r"cut\.tar cannot be read to its end"):
        list(read([str(tmp_path / "cut.tar")]))


def test_a_caption_longer_than_a_row(config: Config, tmp_path: Path) -> None:
    members = {**pairs(3), "0001.json": json.dumps({"caption": "long " * 20}).encode()}
    long = override(config, {"data": {"train": [str(write_tar(tmp_path / "long.tar", members))]}})
    with pytest.raises(ValueError, match=r"sample long\.tar/0001 needs \d+ positions, but data\.row_length is 48"):
        corpus_of(long)
    corpus = corpus_of(override(long, {"data": {"overlong": "truncate"}}))
    assert max(corpus.length(0, i) for i in range(3)) <= 48


def test_images_of_other_sizes_are_fitted(config: Config, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    members = {"a.png": png(picture(rng, (40, 40))), "a.txt": b"x", "b.png": png(picture(rng, (90, 60))), "b.txt": b"y"}
    corpus = corpus_of(override(config, {"data": {"train": [str(write_tar(tmp_path / "big.tar", members))]}}))
    assert [corpus.dataset.grids_of(i) for i in range(2)] == [[(2, 2)], [(3, 2)]]
