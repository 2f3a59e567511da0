"""Splits into training, validation and test shards: by content, complete, with distinct names and keys."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import folder, split, table
from mmgen.data.shards.samples import Picture, Sample, read
from tests.data.common import tar_of, write

RNG = np.random.default_rng(0)


def pictures(root: Path, count: int) -> Path:
    """Captioned pictures, every fifth with the pixels of the first."""
    root.mkdir()
    first = RNG.integers(256, size=(4, 4, 3), dtype=np.uint8)
    for i in range(count):
        pixels = first if i % 5 == 0 else RNG.integers(256, size=(4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{i:03d}.png")
        (root / f"{i:03d}.txt").write_text(f"picture {i}")
    return root


def splits(out: Path, stem: str) -> dict[str, list[Sample]]:
    return {name: list(read([str(out / f"{stem}-{name}-*.tar")])) for name in ("train", "val", "test")}


def test_equal_pictures_are_in_one_split_and_nothing_is_lost(tmp_path: Path) -> None:
    out = tmp_path / "cats"
    folder.main(pictures(tmp_path / "in", 300), out=out, per_shard=90, val=0.2, test=0.1)
    found = splits(out, "cats")
    captions = [sample.caption for samples in found.values() for sample in samples]
    assert sorted(captions) == sorted(f"picture {i}" for i in range(300))
    contents = {name: {sample.image for sample in samples} for name, samples in found.items()}
    assert not contents["train"] & contents["val"]
    assert not contents["train"] & contents["test"]
    assert not contents["val"] & contents["test"]
    distinct = 241
    assert len(contents["val"]) == pytest.approx(0.2 * distinct, abs=20)
    assert len(contents["test"]) == pytest.approx(0.1 * distinct, abs=16)
    keys = [sample.key for samples in found.values() for sample in samples]
    assert len(set(keys)) == 300
    assert not list(out.glob("*.part"))


def test_a_second_call_changes_nothing_and_other_shares_are_refused(tmp_path: Path) -> None:
    source, out = pictures(tmp_path / "in", 20), tmp_path / "set"
    folder.main(source, out=out, per_shard=8, val=0.2, test=0.1)
    before = {path: path.read_bytes() for path in out.glob("*.tar")}
    folder.main(source, out=out, per_shard=8, val=0.2, test=0.1)
    assert {path: path.read_bytes() for path in out.glob("*.tar")} == before
    with pytest.raises(ValueError, match=r"made from something else.*val"):
        folder.main(source, out=out, per_shard=8, val=0.3, test=0.1)


@pytest.mark.parametrize(("val", "test"), [(-0.1, 0.1), (0.5, 0.5)])
def test_impossible_shares_are_refused(tmp_path: Path, val: float, test: float) -> None:
    with pytest.raises(ValueError, match=r"--val .* must be shares"):
        folder.main(pictures(tmp_path / "in", 1), out=tmp_path / "out", val=val, test=test)


def test_a_table_is_split_as_its_folder_is(tmp_path: Path) -> None:
    source = pictures(tmp_path / "in", 60)
    rows = "".join(f"{i:03d}.png,picture {i}\n" for i in range(60))
    (source / "list.csv").write_text("image,caption\n" + rows)
    folder.main(source, out=tmp_path / "a", val=0.2, test=0.1)
    table.main(source / "list.csv", out=tmp_path / "b", val=0.2, test=0.1)
    for name, samples in splits(tmp_path / "a", "a").items():
        assert [s.caption for s in samples] == [s.caption for s in splits(tmp_path / "b", "b")[name]]


def test_shards_are_split_with_their_interleaved_documents(tmp_path: Path) -> None:
    image = (pictures(tmp_path / "in", 1) / "000.png").read_bytes()
    listed = json.dumps(["a", {"image": "one.0.png"}, "b", {"image": "1.png", "learn": False}]).encode()
    members = {"one.0.png": image, "one.1.png": image, "one.json": listed, "two.png": image, "two.txt": b"two"}
    shard = write(tmp_path / "raw.tar", tar_of(members))
    split.main(str(shard), out=tmp_path / "set", val=0, test=0)
    one, two = read([str(tmp_path / "set" / "set-*.tar")])
    assert [type(segment).__name__ for segment in one.segments] == ["Text", "Picture", "Text", "Picture"]
    assert isinstance(one.segments[3], Picture)
    assert not one.segments[3].learn
    assert two.caption == "two"
