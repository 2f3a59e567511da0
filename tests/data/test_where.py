"""`data.where` and `data.captions`: which samples are used, and with which words."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmgen.config import Config, DataConfig
from mmgen.config_io import override
from mmgen.data.loader import Corpus
from mmgen.data.shards.index import find
from mmgen.data.shards.samples import BadRecord, read
from mmgen.data.streams import Streams
from mmgen.data.tools.check import index_shards
from mmgen.sequence.tokenizer import Tokenizer
from tests.conftest import tiny
from tests.data.common import epoch_names, tar_of, tokenizer_of, write


def png(height: int, width: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def shard(at: Path, count: int = 200) -> str:
    """Samples with a score of 0 to 1, every tenth without one; widths 4 and 8; two captions, every fourth with one."""
    members: dict[str, bytes] = {}
    for i in range(count):
        meta = {"caption": f"short {i}"}
        if i % 10:
            meta["score"] = i / count  # type: ignore[assignment]
        if i % 4:
            meta["long"] = f"a longer text {i}"
        members |= {f"{i:04d}.png": png(4, 4 if i % 2 else 8), f"{i:04d}.json": json.dumps(meta).encode()}
        members[f"{i:04d}.txt"] = f"text {i}".encode()
    return str(write(at / "a.tar", tar_of(members)))


def settings(at: Path, **data: object) -> Config:
    return tiny(at, data={"train": [shard(at)], **data})


def wanted(i: int) -> bool:
    return bool(i % 10) and i / 200 > 0.5 and not i % 2


def test_samples_are_chosen_by_their_fields_and_counted(tmp_path: Path) -> None:
    config = settings(tmp_path, where="score > 0.5 and width == 8")
    corpus = Corpus(config.data.train, tokenizer_of(config), config)
    keys = {sample.key for sample in corpus.samples}
    assert keys == {f"{i:04d}" for i in range(200) if wanted(i)}
    left = corpus.dataset.unwanted
    assert left == {"data.where is false": 180 - len(keys), "data.where: it has no field 'score'": 20}
    assert not corpus.bad, "a sample that is left out is not a bad one"
    assert f"{len(keys)} samples (" in corpus.description
    assert "20 samples, because data.where: it has no field 'score' left out" in corpus.description
    report = index_shards(config.data.train, tokenizer_of(config), config, 1, lambda line: None)
    assert (report.samples, report.left_out, report.bad) == (len(keys), 200 - len(keys), 0)


def test_documents_that_are_cut_are_counted(tmp_path: Path) -> None:
    config = settings(tmp_path, overlong="truncate", row_length=24)
    members = {"1.png": png(4, 4), "1.txt": b"a" * 60, "2.png": png(4, 4), "2.txt": b"b"}
    path = str(write(tmp_path / "long.tar", tar_of(members)))
    config = override(config, {"data": {"train": [path]}})
    corpus = Corpus(config.data.train, tokenizer_of(config), config)
    found = re.search(
        r"the text of 1 is cut: the longest needs data.row_length (\d+), and it is 24", corpus.description
    )
    assert found
    whole = override(config, {"data": {"row_length": int(found[1])}})
    assert "cut" not in Corpus(whole.data.train, tokenizer_of(whole), whole).description
    shorter = override(config, {"data": {"row_length": int(found[1]) - 1}})
    assert "of 1 is cut" in Corpus(shorter.data.train, tokenizer_of(shorter), shorter).description


def test_an_index_of_another_condition_is_made_again(tmp_path: Path) -> None:
    config = settings(tmp_path)
    Corpus(config.data.train, tokenizer_of(config), config)
    (path,) = config.data.train
    assert isinstance(path, str)
    assert find(path, config.data) is not None
    other = override(config, {"data": {"where": "score > 0.5"}})
    assert find(path, other.data) is None
    assert len(Corpus(other.data.train, tokenizer_of(other), other).samples) == sum(
        bool(i % 10) and i / 200 > 0.5 for i in range(200)
    )


def test_streams_use_the_same_samples(tmp_path: Path) -> None:
    """The first epoch of a stream has each sample once that the index has."""
    config = settings(tmp_path, where="score > 0.5 and width == 8", streams=1)
    streams = Streams(config.data.train, tokenizer_of(config), config)
    expected = {("a.tar", f"{i:04d}"): 1 for i in range(200) if wanted(i)}
    assert epoch_names(streams, 0) == expected


def test_a_condition_that_leaves_nothing_is_explained(tmp_path: Path) -> None:
    config = settings(tmp_path, where="scores > 0.5")
    with pytest.raises(
        ValueError, match=r"no usable sample.*200 samples, because data\.where: it has no field 'scores'"
    ):
        Corpus(config.data.train, tokenizer_of(config), config)


def test_a_wrong_condition_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.where: 'os\.x' is not allowed"):
        settings(tmp_path, where="os.x == 1")


def test_captions_are_drawn_by_key_in_the_proportion_of_their_weights(tmp_path: Path) -> None:
    data = DataConfig(captions={"long": 0.8, "txt": 0.2})
    path = shard(tmp_path, 1000)
    kinds = Counter[str]()
    for i, sample in enumerate(read([path], [], data)):
        kind = "long" if sample.caption.startswith("a longer") else "txt"
        assert sample.caption == (f"a longer text {i}" if kind == "long" else f"text {i}")
        assert i % 4 or kind == "txt", "every fourth has one caption only"
        kinds[kind] += bool(i % 4)
    assert kinds["long"] / 750 == pytest.approx(0.8, abs=0.05)
    again = [sample.caption for sample in read([path], [], data)]
    assert again == [sample.caption for sample in read([path], [], data)]


def test_the_order_of_the_fields_does_not_change_the_draw(tmp_path: Path) -> None:
    path = shard(tmp_path)
    one, other = DataConfig(captions={"long": 0.6, "txt": 0.4}), DataConfig(captions={"txt": 0.4, "long": 0.6})
    assert one == other
    assert [s.caption for s in read([path], [], one)] == [s.caption for s in read([path], [], other)]


def test_width_and_height_are_those_of_the_picture(tmp_path: Path) -> None:
    """The JSON of a downloaded picture often has the size of the original."""
    meta = json.dumps({"caption": "a", "width": 1024}).encode()
    path = str(write(tmp_path / "a.tar", tar_of({"1.png": png(4, 8), "1.json": meta})))
    assert len(list(read([path], [], DataConfig(where="width == 8 and height == 4")))) == 1
    assert not list(read([path], [], DataConfig(where="width == 1024")))


def test_a_sample_that_is_left_out_is_not_bad(tmp_path: Path) -> None:
    meta = json.dumps({"caption": ["a", "list"], "score": 0}).encode()
    path, bad = str(write(tmp_path / "a.tar", tar_of({"1.png": png(4, 8), "1.json": meta}))), list[BadRecord]()
    assert not list(read([path], bad, DataConfig(where="score > 1")))
    assert not bad


def test_the_index_knows_the_lengths_of_the_drawn_captions(tmp_path: Path) -> None:
    config = settings(tmp_path, captions={"long": 0.5, "caption": 0.5})
    tokenizer = Tokenizer.of(config)
    corpus = Corpus(config.data.train, tokenizer, config)
    for i in range(0, 200, 7):
        text = corpus.samples[i].caption
        texts = [s for s in corpus.decoded(0, i).segments if hasattr(s, "ids")]
        assert [list(s.ids) for s in texts] == [tokenizer.encode(text)]  # type: ignore[union-attr]
    step = corpus.first_step()
    assert step.documents > 0
    assert not step.bad
