"""The experiments on documents with several images: their data, their judges and their faults."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mmgen.config import Config
from mmgen.data.streams import training_corpus
from mmgen.generate import Decoder, Request, Result
from mmgen.lab import documents as docs
from mmgen.lab.catalog import EXPERIMENTS, Options, execute, run_all
from mmgen.lab.faults import injected
from mmgen.model import build_model
from mmgen.sequence.attention import dense_visible
from mmgen.sequence.tokenizer import Tokenizer


def results_of(asked: docs.Asked, picture: dict[int, docs.Pixels], text: dict[int, str] | None = None) -> list[Result]:
    """Results that hold the given pictures and texts, by number of the request."""
    return [Result([(text or {}).get(i, ""), docs.picture_of(picture[i])]) for i in range(len(asked.requests))]


def test_pieces_are_what_the_word_asks_for() -> None:
    kinds: dict[str, int] = {}
    for pieces in docs.documents(700, 0):
        if isinstance(pieces[0], str):
            kinds["count"] = kinds.get("count", 0) + 1
            names = [int(p) for p in pieces if isinstance(p, str)]
            assert [(a + 1) % 10 for a in names[:-1]] == names[1:]
            dark = [bool(p.mean() < 127.5) for p in pieces if not isinstance(p, str)]
            assert len(dark) == 3
            assert len(set(dark)) == 1
            continue
        source, word, target = pieces
        assert isinstance(word, str)
        kinds[word] = kinds.get(word, 0) + 1
        assert np.array_equal(docs.MADE[word](source), target)  # type: ignore[arg-type]
    assert kinds == {"count": 200, "copy": 200, "mirror": 100, "invert": 100, "turn": 100}
    train, held_out = docs.parts()
    assert not {p.tobytes() for p in train.pictures} & {p.tobytes() for p in held_out.pictures[:12]}


def test_the_judges_accept_right_answers_and_no_others() -> None:
    held_out = docs.parts()[1]
    shown = held_out.pictures
    copy, edit, count = docs.ask_copy(30), docs.ask_edit(30), docs.ask_continue(40)
    words = [*docs.EDITS]
    exact = {i: docs.EDITS[words[i % 3]](shown[i]) for i in range(30)}
    assert copy.right(results_of(copy, {i: shown[i] for i in range(30)})).all()
    assert edit.right(results_of(edit, exact)).all()
    others = {i: shown[i + 1] for i in range(30)}
    assert copy.right(results_of(copy, others)).mean() == 0
    assert edit.right(results_of(edit, {i: shown[i] for i in range(30)})).mean() <= 0.1
    wrong_word = {i: docs.EDITS[words[(i + 1) % 3]](shown[i]) for i in range(30)}
    assert edit.right(results_of(edit, wrong_word)).mean() <= 0.1
    rng = np.random.default_rng(0)
    noisy = {i: np.clip(exact[i] + rng.normal(0, 12, (8, 8)), 0, 255).astype(np.uint8) for i in exact}
    assert edit.right(results_of(edit, noisy)).mean() >= 0.95
    following = [(i % 10 + 2) % 10 for i in range(40)]
    inverted = [bool(i // 10 % 2) for i in range(40)]
    real = {i: held_out.of(d)[3] for i, d in enumerate(following)}
    styled = {i: 255 - p if inverted[i] else p for i, p in real.items()}
    named = {i: str(d) for i, d in enumerate(following)}
    assert count.right(results_of(count, styled, named)).mean() >= 0.9
    assert count.right(results_of(count, real, named)).mean() <= 0.5, "the style is judged"
    assert count.right(results_of(count, styled, {})).mean() == 0, "the text is judged"
    shifted = {i: styled[(i + 1) % 40] for i in range(40)}
    assert count.right(results_of(count, shifted, named)).mean() <= 0.3, "the digit is judged"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of the experiments, made once for all tests."""
    path = tmp_path_factory.mktemp("lab") / "documents"
    docs.prepare_data(path, 0)
    return path


def corpus_settings(folder: Path, policy: str = "capped") -> Config:
    return docs.settings(policy, folder / policy, 1, 0)


@pytest.mark.parametrize("policy", docs.POLICIES)
def test_every_picture_is_learned(policy: str, folder: Path) -> None:
    config = corpus_settings(folder, policy)
    tokenizer = Tokenizer.of(config)
    step = training_corpus(config, tokenizer, None).first_step()
    assert not step.bad
    assert step.images >= 2 * step.documents, "each document has two pictures or three, and all are learned"


def test_the_fault_shared_t_ties_the_times_of_a_document(folder: Path) -> None:
    config = corpus_settings(folder, "noisy")
    corpus = training_corpus(config, Tokenizer.of(config), None)
    gap = {}
    for fault in (None, "shared_t"):
        with injected(fault):
            drawn = np.array([corpus.quantiles(n, np.arange(2) + 2 * n, 120) for n in range(60)])
        gap[fault] = float(np.median(np.abs((drawn[:, 0] - drawn[:, 1] + 0.5) % 1 - 0.5)))
    assert gap["shared_t"] == pytest.approx(1 / 120)
    assert 0.15 < gap[None] < 0.35, "independent draws are a quarter of a turn apart in the median"


@pytest.mark.parametrize("policy", ["capped", "masked", "raster"])
def test_the_fault_blind_hides_every_image_from_what_follows(policy: str, folder: Path) -> None:
    config = corpus_settings(folder, policy)
    corpus = training_corpus(config, Tokenizer.of(config), None)
    seen = {}
    for fault in (None, "blind"):
        with injected(fault):
            sites = corpus.first_step().micro[0].sites
        visible = dense_visible(sites)
        outside = (sites.block.unsqueeze(2) != sites.block.unsqueeze(1)) & (sites.block.unsqueeze(1) >= 0)
        seen[fault] = int((visible & outside).sum())
    assert seen[None] > 0
    assert seen["blind"] == 0


def test_the_fault_lost_start_takes_the_picture_away(folder: Path) -> None:
    config = corpus_settings(folder)
    tokenizer = Tokenizer.of(config)
    decoder = Decoder(build_model(config, len(tokenizer)).eval(), tokenizer, config.sample)
    pictures = {name: docs.picture_of(docs.parts()[1].pictures[i]) for i, name in enumerate("ab")}
    drawn = {}
    for fault in (None, "lost_start"):
        requests = [Request(["3"], "image", 0, image=picture, strength=0.25) for picture in pictures.values()]
        with injected(fault):
            drawn[fault] = docs.made(decoder.generate(requests))
    assert not np.array_equal(*drawn[None])
    assert np.array_equal(*drawn["lost_start"])


@pytest.mark.slow
def test_models_learn_the_tasks_and_faults_are_detected(tmp_path: Path) -> None:
    """One call trains each model once. Fast models reach their bounds, and models with a fault do not."""
    names = [name for name, experiment in EXPERIMENTS.items() if experiment.shared == "documents"]
    results = {result.name: result for result in run_all(names, 2, Options(fast=True, out=tmp_path))}
    for name, result in results.items():
        assert result.holds, (name, result.bounds)
    assert len(list(tmp_path.glob("*/*/train.log"))) == len(docs.FAST)
    for fault in ("shared_t", "blind"):
        detecting = [name for name in names if fault in EXPERIMENTS[name].faults]
        for result in run_all(detecting, 2, Options(fast=True, out=tmp_path, inject=fault)):
            assert not result.holds, (result.name, fault, result.bounds)
    with injected("lost_start"):  # it acts in decoding only, so the models above serve
        assert not execute("image_start", Options(fast=True, out=tmp_path)).holds
