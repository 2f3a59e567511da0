"""Segments with `learn: false` are context and have no loss."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

from mmgen.config import Config
from mmgen.config_io import override
from mmgen.data.dataset import NO_TEXT, SHORT
from mmgen.data.documents import Documents, Share
from mmgen.data.loader import Corpus, steps
from mmgen.data.order import Cursors, PlannedDocument, PlannedRow, Position
from mmgen.data.shards.index import SUFFIX, ensure
from mmgen.data.shards.samples import BadRecord, Picture, Text, read
from mmgen.data.streams import StreamCorpus
from mmgen.data.tools.show import GIVEN, given, show
from mmgen.sequence.attention import dense_visible
from mmgen.sequence.batch import IGNORE, Batch, RawBatch, prepare
from mmgen.sequence.tokenizer import Tokenizer
from tests.conftest import awake, pairs, picture, png, tiny, write_tar

VARIANTS = {
    "noisy": {"kind": "transfusion", "transfusion": {"context": "noisy"}},
    "capped": {"kind": "transfusion", "transfusion": {"context": "capped"}},
    "clean_copy": {"kind": "transfusion", "transfusion": {"context": "clean_copy"}},
    "masked": {"kind": "mar", "mar": {"order": "masked"}},
    "random": {"kind": "mar", "mar": {"order": "random"}},
    "raster": {"kind": "mar", "mar": {"order": "raster"}},
}
COPIES = {"noisy": 1, "capped": 1, "clean_copy": 2, "masked": 2, "random": 1, "raster": 1}
# Each document: texts, and images as their height in pixels, each with its flag.
DOCUMENTS: dict[str, list[tuple[str | int, bool]]] = {
    "edit": [(4, False), ("make it red", False), (6, True)],
    "answer": [("what is it", False), (4, False), ("a cat", True)],
    "mixed": [("a", True), (4, True), ("b", False), (6, False), ("c", True), (4, True), ("d", False)],
    "two": [(6, False), (4, False), ("both", True)],
    "plain": [("one", True), (4, True), ("two", True)],
}


def members(documents: dict[str, list[tuple[str | int, bool]]] = DOCUMENTS) -> dict[str, bytes]:
    """A shard of interleaved documents; a flag is written only where it is false."""
    rng = np.random.default_rng(0)
    found: dict[str, bytes] = {}
    for key, segments in documents.items():
        listed: list[dict[str, object]] = []
        for number, (content, learn) in enumerate(segments):
            flag = {} if learn else {"learn": False}
            if isinstance(content, str):
                listed.append({"text": content, **flag})
            else:
                found[f"{key}.{number}.png"] = png(picture(rng, (content, 4)))
                listed.append({"image": f"{number}.png", **flag})
        found[f"{key}.json"] = json.dumps(listed).encode()
    return found


def learning(tmp: Path, variant: str = "capped", **data: object) -> Config:
    shards = []
    for number in range(2):
        part = {f"{number}-{name}": content for name, content in {**members(), **pairs(3, number)}.items()}
        shards.append(str(write_tar(tmp / f"part-{number}.tar", part)))
    return tiny(
        tmp, objective=VARIANTS[variant],
        data={"train": shards, "val": shards, "row_length": 96, "caption_drop": 0.3, **data},
    )  # fmt: skip


def words(config: Config) -> Tokenizer:
    return Tokenizer.load(config.data.tokenizer, config.model.patcher.grids)


def opened(config: Config) -> Corpus:
    return Corpus(config.data.train, words(config), config)


def test_flags_are_read_and_checked(tmp_path: Path) -> None:
    wrong = {
        "word.json": b'[{"text": "a", "learn": "no"}]', "nothing.json": b'[{"text": "a", "learn": false}]',
        "bare.json": b'["a", {"text": "b", "learn": true}]',
    }  # fmt: skip
    bad: list[BadRecord] = []
    found = {s.key: s for s in read([str(write_tar(tmp_path / "a.tar", {**members(), **wrong}))], bad)}
    assert found["bare"].segments == (Text("a"), Text("b"))
    for key, segments in DOCUMENTS.items():
        assert [segment.learn for segment in found[key].segments] == [learn for _, learn in segments]
        assert [isinstance(segment, Picture) for segment in found[key].segments] == [
            isinstance(content, int) for content, _ in segments
        ]
    reasons = {record.key: record.reason for record in bad}
    assert reasons.keys() == {"word", "nothing"}
    assert "'no', not true or false" in reasons["word"]
    assert "nothing in it is learned" in reasons["nothing"]


def segments_of(corpus: Documents, key: str, form: int) -> list[tuple[str | int, bool]]:
    """The segments of a document in a form, from `DOCUMENTS`."""
    name = key.split("-", 1)[1]
    if name in DOCUMENTS:
        segments = DOCUMENTS[name]
    else:
        segments = [(f"picture {int(name)}", True), (4 if int(name) % 3 else 6, True)]
    images = [i for i, (content, _) in enumerate(segments) if isinstance(content, int)]
    if form in NO_TEXT:
        segments = [segments[i] for i in images]
    return segments[::-1] if form == 2 else segments


class Walk:
    """The expected content of each position of a row, computed from the rules alone."""

    def __init__(self, corpus: Corpus, copies: int) -> None:
        self.tokenizer, self.copies = corpus.tokenizer, copies
        self.ids: list[int] = []
        self.is_patch: list[bool] = []
        self.learned: list[bool] = []
        self.first: list[bool] = []
        self.given_images: list[range] = []
        self.learned_images: list[range] = []
        self.copies_of: dict[int, int] = {}
        """Number of copies of each image, by its last position."""

    def add(self, token: int, learn: bool, patch: bool = False, first: bool = False) -> None:
        self.ids.append(token)
        self.learned.append(learn)
        self.is_patch.append(patch)
        self.first.append(first)

    def document(self, segments: list[tuple[str | int, bool]], form: int) -> None:
        t = self.tokenizer
        self.add(t.bos, True, first=True)
        short = form in SHORT and self.copies > 1
        for content, learn in segments:
            if isinstance(content, str):
                for token in t.encode(content):
                    self.add(token, learn)
                continue
            grid = (content // 2, 2)
            self.add(t.boi, learn)
            self.add(t.size[grid], learn)
            begin = len(self.ids)
            copies = self.copies if learn and not short else 1
            for _ in range(copies * grid[0] * grid[1]):
                self.add(t.pad, False, patch=True)
            self.copies_of[len(self.ids) - 1] = copies
            (self.learned_images if learn else self.given_images).append(range(begin, len(self.ids)))
            self.add(t.eoi, False)
        self.add(t.eos, not (short and segments[-1][1]))

    def labels(self, length: int) -> list[int]:
        found = [IGNORE] * length
        for i in range(len(self.ids) - 1):
            target = self.learned[i + 1] and not self.first[i + 1]
            if target and not self.is_patch[i] and not self.is_patch[i + 1]:
                found[i] = self.ids[i + 1]
        return found


def walked(corpus: Corpus, row: PlannedRow, copies: int) -> Walk:
    walk = Walk(corpus, copies)
    for document in row:
        walk.document(segments_of(corpus, corpus.name(document)[1], document.form), document.form)
    return walk


def one_row(corpus: Corpus, row: PlannedRow) -> RawBatch:
    return corpus.step(0, [row], Position()).micro[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_position_of_every_row(tmp_path: Path, variant: str) -> None:
    """Labels and learned patches are those of learned segments; given images are clean, have one copy and are seen."""
    corpus = opened(learning(tmp_path, variant))
    given_images = 0
    for epoch in range(3):
        for row in corpus.plan.epoch_rows(epoch):
            walk, batch = walked(corpus, row, COPIES[variant]), one_row(corpus, row)
            n = len(walk.ids)
            assert batch.ids_BS[0, :n].tolist() == walk.ids
            assert (batch.document_BS[0, n:] == -1).all()
            assert batch.label_BS[0].tolist() == walk.labels(96)
            assert batch.label_at_L.tolist() == [i for i, label in enumerate(walk.labels(96)) if label != IGNORE]
            assert batch.at_I.tolist() == [i for i, patch in enumerate(walk.is_patch) if patch]
            check_losses(batch, walk, variant)
            check_given(batch, walk, corpus.layout.bidirectional)
            given_images += len(walk.given_images)
    assert given_images > 10


def check_losses(batch: RawBatch, walk: Walk, variant: str) -> None:
    """Learned patches are all of the only or noisy copy of a learned image; masked MAR learns those that it hides."""
    expected = []
    for image in walk.learned_images:
        expected += list(image)[: len(image) // walk.copies_of[image[-1]]]
    at = batch.at_I[batch.loss_at_J].tolist()
    if variant == "masked":
        masked = batch.at_I[batch.draws["masked"] > 0].tolist()
        assert at == masked
        assert set(at) <= set(expected)
        assert all(set(at) & set(image) for image in walk.learned_images), "each has some"
    else:
        assert at == expected


def check_given(batch: RawBatch, walk: Walk, bidirectional: bool) -> None:
    """t = 1 and no noise; later positions of the document see the image, and the image sees earlier positions."""
    seen, document = dense_visible(batch.sites)[0], batch.document_BS[0]
    for image in walk.given_images:
        here = torch.isin(batch.at_I, torch.tensor(list(image)))
        assert (batch.draws["t"][here] == 1).all()
        assert not torch.isin(batch.loss_at_J, torch.nonzero(here).flatten()).any(), "only learned patches have noise"
        assert not batch.noised_BS[0, list(image)].any()
        assert len(batch.block_BS[0, list(image)].unique()) == 1, "one copy"
        last = int((document == document[image[0]]).nonzero()[-1]) + 1
        assert seen[image[-1] + 1 : last, image[0] : image[-1] + 1].all()
        inside = seen[image[0] : image[-1] + 1, image[0] : image[-1] + 1]
        assert torch.equal(inside, torch.ones_like(inside) if bidirectional else torch.ones_like(inside).tril())
        before = (document == document[image[0]]) & (torch.arange(len(document)) < image[0])
        assert torch.equal(seen[image[0]], (before & ~batch.noised_BS[0]) | seen_inside(image, inside, len(document)))
    learned = [place for image in walk.learned_images for place in image]
    drawn = batch.draws["t"][torch.isin(batch.at_I, torch.tensor(learned))]
    assert not learned or (drawn < 1).any(), "learned images have noise"


def seen_inside(image: range, inside: torch.Tensor, length: int) -> torch.Tensor:
    found = torch.zeros(length, dtype=torch.bool)
    found[image[0] : image[-1] + 1] = inside[0]
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_planned_lengths_are_written_lengths(tmp_path: Path, variant: str) -> None:
    """Also for text that is cut to the length of a row, and for streams."""
    longest = {1: 28, 2: 34}[COPIES[variant]]
    config = learning(tmp_path, variant, row_length=longest, overlong="truncate", streams=2, window=8)
    config = override(config, {"train": {"batch_rows": 2}})
    corpus = opened(config)
    cut = 0
    for epoch in range(4):
        for row in corpus.plan.epoch_rows(epoch):
            for document in row:
                assert len(corpus.write(document, None)) == document.length
                cut += document.length == longest
    assert cut
    streams = StreamCorpus(config.data.train, corpus.tokenizer, config)
    index = {corpus.dataset.name(i): i for i in range(len(corpus.samples))}
    for step in steps(streams, 0, 6, Cursors()):
        assert not step.bad
    for stream in range(2):
        source = streams.dataset.rows(stream, Cursors().of_stream(stream))
        for _ in range(8):
            for document in next(source).documents:
                number = index[streams.name(document)]
                planned = [int(column[0]) for column in corpus.dataset.lengths(
                    np.array([document.epoch]), np.array([number]))]  # fmt: skip
                assert planned == [document.length, document.images, document.form]
                mine = streams.write(document, None)
                theirs = corpus.write(PlannedDocument(document.epoch, number, *planned), None)
                assert (mine.ids, mine.learned) == (theirs.ids, theirs.learned)


def tensors(batch: RawBatch) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    batch.fields_as(lambda value: (found.append(value), value)[1])
    return found


@pytest.mark.parametrize("variant", ["clean_copy", "masked", "raster"])
def test_order_workers_and_resumes(tmp_path: Path, variant: str) -> None:
    config = override(learning(tmp_path, variant), {"train": {"batch_rows": 4}})
    corpus = opened(config)
    whole = list(steps(corpus, 0, 5, Position()))
    rest = list(steps(opened(override(config, {"data": {"workers": 2}})), 2, 5, whole[1].after))
    for a, b in zip(whole[2:], rest, strict=True):
        assert a.images == b.images
        assert all(torch.equal(x, y) for x, y in zip(tensors(a.micro[0]), tensors(b.micro[0]), strict=True))
    shares = [next(steps(corpus, 0, 1, Position(), Share(rank, 2))) for rank in range(2)]
    assert sum(share.images for share in shares) == whole[0].images
    assert torch.equal(torch.stack([shares[i % 2].micro[0].ids_BS[i // 2] for i in range(4)]), whole[0].micro[0].ids_BS)


def test_times_are_spread_over_the_learned_images(tmp_path: Path) -> None:
    """A given image takes no stratum; otherwise a given image before each learned one would leave gaps."""
    documents = {f"{i:02d}": [(4, False), (4, True)] for i in range(16)}
    shard = str(write_tar(tmp_path / "edits.tar", members(documents)))
    config = tiny(
        tmp_path, data={"train": [shard], "row_length": 24},
        objective={**VARIANTS["noisy"], "time": {"distribution": "uniform", "stratified": True}}, train={"batch_rows": 8},
    )  # fmt: skip
    for step in steps(opened(config), 0, 4, Position()):
        batch = step.micro[0]
        assert step.images == step.documents == 8
        learned = batch.loss_at_J
        times = np.sort([float(batch.draws["t"][learned][batch.image_I[learned] == n][0])
                         for n in batch.image_I[learned].unique()])  # fmt: skip
        np.testing.assert_allclose(np.diff([*times, times[0] + 1]), 1 / 8, atol=1e-5)


def test_a_flag_that_is_true_changes_nothing(tmp_path: Path) -> None:
    documents = {"one": [("a", True), (4, True), ("b", True)], "two": [(6, True), ("c", True)]}
    plain = members(documents)
    flagged = dict(plain)
    for key in documents:
        listed = [{**item, "learn": True} for item in json.loads(plain[f"{key}.json"])]
        flagged[f"{key}.json"] = json.dumps(listed).encode()
    found = []
    for name, content in (("plain", plain), ("flagged", flagged)):
        (tmp_path / name).mkdir()
        shard = write_tar(tmp_path / name / "s.tar", content)
        found.append(list(steps(opened(tiny(tmp_path, data={"train": [str(shard)]})), 0, 3, Position())))
    for a, b in zip(*found, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(tensors(a.micro[0]), tensors(b.micro[0]), strict=True))


@pytest.mark.parametrize("variant", ["noisy", "clean_copy", "masked", "raster"])
def test_the_loss_covers_the_learned_part_alone(tmp_path: Path, variant: str) -> None:
    """The text loss is the sum over learned tokens; given text does not change the image loss."""
    config = learning(tmp_path, variant)
    corpus = opened(config)
    model, tokenizer = awake(config)
    row = next(row for row in corpus.plan.epoch_rows(0) if walked(corpus, row, COPIES[variant]).given_images)
    walk = walked(corpus, row, COPIES[variant])
    raw = one_row(corpus, row)
    batch = prepare(raw, corpus.patcher, dtype=torch.float64)
    losses = model(batch)
    expected = expected_text_loss(model, batch, walk)
    torch.testing.assert_close(losses.text, expected)
    assert losses.text_count == sum(label != IGNORE for label in walk.labels(96))
    (tmp_path / "text").mkdir()
    both = []
    for learn in (True, False):
        shard = write_tar(tmp_path / "text" / "t.tar", members({"a": [("a red", learn), (4, True), ("b", True)]}))
        alone = opened(override(config, {"data": {"train": [str(shard)], "caption_drop": 0.0}}))
        batch = prepare(next(steps(alone, 0, 1, Position())).micro[0], alone.patcher, dtype=torch.float64)
        both.append(model(batch))
    assert torch.equal(both[0].image_J, both[1].image_J)
    assert both[1].text < both[0].text
    documents = int((batch.ids_BS == tokenizer.bos).sum())
    assert both[0].text_count - both[1].text_count == documents * len(tokenizer.encode("a red"))


def expected_text_loss(model: torch.nn.Module, batch: Batch, walk: Walk) -> torch.Tensor:
    from mmgen.backbone import attention_mask

    inputs, _ = model.embed(batch)
    hidden = model.hidden(inputs, batch.position_BS, attention_mask(batch.sites), batch.modality)
    chances = model.logits(hidden[0]).log_softmax(-1)
    total = torch.zeros((), dtype=torch.float64)
    for i, label in enumerate(walk.labels(len(chances))):
        if label != IGNORE:
            total = total - chances[i, label]
    return total


def test_the_index_holds_flags_and_old_indexes_are_replaced(tmp_path: Path) -> None:
    config = learning(tmp_path, "clean_copy")
    shard = config.data.train[0]
    assert isinstance(shard, str)
    index = ensure(shard, words(config), config.data)
    flags = [bool(flag) for flag in index.column("learn_s")]
    assert flags == [learn for segments in DOCUMENTS.values() for _, learn in segments] + [True] * 6
    lengths = [opened(config).length(0, i) for i in range(5)]
    # An index of version 2, which has neither flags nor kinds of arrays.
    path = Path(shard + SUFFIX)
    columns = {name: np.array(column) for name, column in index.columns().items() if name != "learn_s"}
    with safe_open(path, "numpy") as file:
        meta = json.loads(file.metadata()["index"])
    del meta["stored"]
    meta |= {"settings": "2" + meta["settings"][1:], "autoencoders": []}
    save_file(columns, path, {"index": json.dumps(meta)})
    assert "learn_s" in ensure(shard, words(config), config.data)
    assert [opened(config).length(0, i) for i in range(5)] == lengths


def test_shown_rows_mark_given_segments(tmp_path: Path) -> None:
    documents = {"edit": DOCUMENTS["edit"], "answer": DOCUMENTS["answer"]}
    shard = str(write_tar(tmp_path / "s.tar", members(documents)))
    config = tiny(tmp_path, data={"train": [shard], "row_length": 64, "caption_drop": 0.0, "window": 4})
    corpus = opened(config)
    shown = show(corpus, 1, tmp_path / "shown")
    edit = "BOS BOI 2x2 given([4 patches]) EOI given('make it red') BOI 3x2 [6 patches] EOI EOS"
    answer = "BOS given('what is it') BOI 2x2 given([4 patches]) EOI 'a cat' EOS"
    assert sorted(shown[0].row.replace(f" [{64 - shown[0].positions} empty]", "").split(" | ")) == sorted(
        [edit, answer]
    )
    pixels = np.asarray(Image.open(shown[0].picture))
    assert (pixels == GIVEN).all(-1).any()
    (row,) = list(corpus.plan.epoch_rows(0))[:1]
    batch = prepare(one_row(corpus, row), corpus.patcher)
    walk = walked_given(corpus, row)
    assert given(batch, corpus.tokenizer)[: len(walk)].tolist() == walk
    plain = opened(override(config, {"data": {"train": [str(write_tar(tmp_path / "p.tar", pairs(4)))]}}))
    for row in show(plain, 2, tmp_path / "plain"):
        assert "given" not in row.row
        assert not (np.asarray(Image.open(row.picture)) == GIVEN).all(-1).any()


def walked_given(corpus: Corpus, row: PlannedRow) -> list[bool]:
    """Whether each position belongs to a given segment, EOI of a given image included."""
    found: list[bool] = []
    for document in row:
        found.append(False)
        for content, learn in DOCUMENTS[corpus.name(document)[1]]:
            size = len(corpus.tokenizer.encode(content)) if isinstance(content, str) else 3 + content // 2 * 2
            found += [not learn] * size
        found.append(False)
    return found


def test_the_only_learned_text_is_not_dropped(tmp_path: Path) -> None:
    """Captions are dropped for guidance only if an image is learned; next to a given image, the text is the target."""
    listed = [{"text": "words"}, {"image": "png", "learn": False}]
    members = {"a.png": png(picture(np.random.default_rng(0))), "a.json": json.dumps(listed).encode()}
    shard = str(write_tar(tmp_path / "given.tar", members))
    config = tiny(tmp_path, data={"train": [shard], "caption_drop": 1.0})
    corpus = Corpus(config.data.train, Tokenizer.of(config), config)
    (raw,) = corpus.first_step().micro
    assert len(raw.label_at_L) > int((raw.document_BS >= 0).any(1).sum())
