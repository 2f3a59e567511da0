"""What training drops of a prompt: its text, its images, or both, so that every lane of guidance is trained."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from mmgen.config import Config
from mmgen.config_io import override
from mmgen.data import dataset, documents
from mmgen.data.dataset import (
    ALONE,
    CAPTION_FIRST,
    CAPTION_FIRST_COPIED,
    DROPPED,
    DROPPED_COPIED,
    IMAGE_FIRST,
    IMAGES_DROPPED,
    Measured,
)  # fmt: skip
from mmgen.data.documents import Share
from mmgen.data.loader import Corpus
from mmgen.data.order import Cursors, PlannedDocument, Position
from mmgen.data.streams import StreamCorpus
from mmgen.sequence.batch import RawBatch
from tests.conftest import tiny, write_tar
from tests.data.test_learn import COPIES, VARIANTS, Walk, check_given, check_losses, learning, members, opened, words

Segments = list[tuple[str | int, bool]]
MORE: dict[str, Segments] = {
    "edit": [(4, False), ("make it red", False), (6, True)],
    "mixed": [("a", True), (4, True), ("b", False), (4, False), ("c", True), (6, True), ("d", False)],
    "given last": [("a", True), (6, True), ("b", True), (4, False)],
    "pictures": [(4, False), (6, True)],
    "plain": [("one", True), (4, True), ("two", True)],
    "answer": [("what is it", False), (4, False), ("a cat", True)],
}


def dropping(tmp_path: Path, variant: str = "capped", **data: object) -> Config:
    shard = write_tar(tmp_path / "drops.tar", {f"{name}": content for name, content in members(MORE).items()})
    return tiny(
        tmp_path, objective=VARIANTS[variant],
        data={"train": [str(shard)], "val": [str(shard)], "row_length": 96, **data},
    )  # fmt: skip


def plain(form: int) -> int:
    """The form, whether or not the last image has a clean copy."""
    return {CAPTION_FIRST_COPIED: CAPTION_FIRST, DROPPED_COPIED: DROPPED}.get(form, form)


def kept(segments: Segments, form: int) -> Segments:
    """The segments that a form keeps, from the definition of the settings."""
    form = plain(form)
    learned = [i for i, (content, learn) in enumerate(segments) if isinstance(content, int) and learn]
    images = [i for i, (content, _) in enumerate(segments) if isinstance(content, int)]
    texts = [i for i in range(len(segments)) if i not in images]
    chosen = {
        DROPPED: images, IMAGES_DROPPED: sorted([*texts, *learned[-1:]]), ALONE: learned[-1:],
    }.get(form, range(len(segments)))  # fmt: skip
    return [segments[i] for i in chosen]


def expected_form(segments: Segments, kind: str) -> int:
    images = [learn for content, learn in segments if isinstance(content, int)]
    if not any(images):
        return 0
    one, no_text = len(images) == 1, all(isinstance(content, int) for content, _ in segments)
    if kind == "prompt":
        return DROPPED if one else ALONE
    if kind == "caption" or no_text:
        return DROPPED
    return 0 if one else IMAGES_DROPPED


def walk_of(corpus: Corpus, document: PlannedDocument, variant: str) -> Walk:
    walk = Walk(corpus, COPIES[variant])
    walk.document(kept(MORE[corpus.name(document)[1]], document.form), document.form)
    return walk


def check_row(batch: RawBatch, walk: Walk, variant: str, bidirectional: bool) -> None:
    n = len(walk.ids)
    assert batch.ids_BS[0, :n].tolist() == walk.ids
    assert (batch.document_BS[0, n:] == -1).all()
    assert batch.label_BS[0].tolist() == walk.labels(96)
    check_losses(batch, walk, variant)
    check_given(batch, walk, bidirectional)


def check_all(tmp_path: Path, variant: str, kind: str) -> None:
    """Every position of every document in the form that this kind of drop gives it."""
    corpus = opened(dropping(tmp_path, variant, **{"caption_drop": 0.0, f"{kind}_drop": 1.0}))
    seen = 0
    for row in corpus.plan.epoch_rows(0):
        for document in row:
            name = corpus.name(document)[1]
            assert plain(document.form) == expected_form(MORE[name], kind), name
            walk = walk_of(corpus, document, variant)
            assert document.length == len(walk.ids), name
            assert document.images == len(walk.learned_images), name
            batch = corpus.step(0, [[document]], Position()).micro[0]
            check_row(batch, walk, variant, corpus.layout.bidirectional)
            seen += 1
    assert seen == len(MORE)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["caption", "image", "prompt"])
def test_every_position_of_every_form(tmp_path: Path, variant: str, kind: str) -> None:
    check_all(tmp_path, variant, kind)


def test_streams_drop_the_same(tmp_path: Path) -> None:
    config = dropping(tmp_path, image_drop=0.3, prompt_drop=0.3, caption_drop=0.3, streams=1, window=4)
    corpus = StreamCorpus(config.data.train, words(config), config)
    steps = list(corpus.steps(0, 12, Cursors(), Share()))
    assert sum(step.documents for step in steps) > 40
    assert not any(step.bad for step in steps), "every document has its planned length"


def test_shares_of_the_drops(tmp_path: Path) -> None:
    """Each kind has its share of the documents that it can change; captioned images that are turned keep all."""
    corpus = opened(learning(tmp_path, caption_drop=0.1, image_drop=0.2, prompt_drop=0.3, image_first=0.25))
    forms: dict[str, Counter[int]] = {}
    epochs = 600
    for epoch in range(epochs):
        for row in corpus.plan.epoch_rows(epoch):
            for document in row:
                name = corpus.name(document)[1].split("-", 1)[1]
                forms.setdefault("pair" if name.isdigit() else name, Counter())[plain(document.form)] += 1

    def shares(name: str) -> dict[int, float]:
        return {form: count / sum(forms[name].values()) for form, count in forms[name].items()}

    several = {0: 0.4, DROPPED: 0.1, IMAGES_DROPPED: 0.2, ALONE: 0.3}
    for name, expected in {
        "edit": several, "mixed": several, "plain": {0: 0.6, DROPPED: 0.4}, "answer": {0: 1.0}, "two": {0: 1.0},
        "pair": {IMAGE_FIRST: 0.25, CAPTION_FIRST: 0.45, DROPPED: 0.3},
    }.items():  # fmt: skip
        assert shares(name).keys() == expected.keys(), name
        for form, share in expected.items():
            assert abs(shares(name)[form] - share) < 0.05, (name, form)


def test_new_kinds_leave_the_dropped_captions_where_they_were(tmp_path: Path) -> None:
    """The same documents lose their text with and without the new drops."""
    forms = []
    for more in ({}, {"image_drop": 0.2, "prompt_drop": 0.3}):
        corpus = opened(learning(tmp_path, caption_drop=0.3, **more))
        found = {}
        for epoch in range(40):
            for row in corpus.plan.epoch_rows(epoch):
                found |= {(epoch, document.index): plain(document.form) for document in row}
        forms.append(found)
    before, after = forms
    assert {key for key, form in before.items() if form == DROPPED} <= {
        k for k, form in after.items() if form == DROPPED
    }
    assert {key for key, form in before.items() if form == IMAGE_FIRST} == {
        k for k, form in after.items() if form == IMAGE_FIRST
    }


def test_shares_above_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"add up to 1\.1: lower them"):
        override(dropping(tmp_path), {"data": {"caption_drop": 0.5, "image_drop": 0.3, "prompt_drop": 0.3}})


# --- faults that the tests above must find -------------------------------------------------------------------


def _keeps_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first image is kept instead of the last learned one."""
    write = Corpus.segments

    def reversed_images(self: Corpus, planned: PlannedDocument) -> documents.Decoded:
        decoded = write(self, planned)
        if planned.form not in dataset.ONE_IMAGE:
            return decoded
        return documents.Decoded(decoded.shard, decoded.key, decoded.segments[::-1])

    monkeypatch.setattr(Corpus, "segments", reversed_images)


def _keeps_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (dataset, documents):
        monkeypatch.setattr(module, "NO_TEXT", (DROPPED, DROPPED_COPIED))


def _keeps_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "ONE_IMAGE", (IMAGES_DROPPED,))


def _plans_all_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "ONE_IMAGE", ())


def _confuses_the_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    forms = Measured.forms
    swapped = {ALONE: IMAGES_DROPPED, IMAGES_DROPPED: ALONE}

    def confused(self, epochs, facts):
        made = forms(self, epochs, facts)
        for i, form in enumerate(made.tolist()):
            made[i] = swapped.get(form, form)
        return made

    monkeypatch.setattr(Measured, "forms", confused)


@pytest.mark.parametrize(
    "fault", [_keeps_the_first, _keeps_the_text, _keeps_the_images, _plans_all_images, _confuses_the_kinds]
)
def test_a_wrong_drop_is_found(tmp_path: Path, fault: object, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)  # type: ignore[operator]
    with pytest.raises((AssertionError, IndexError, StopIteration)):
        check_all(tmp_path, "clean_copy", "prompt")
