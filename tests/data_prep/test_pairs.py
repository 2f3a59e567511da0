"""Pairs of pictures with an instruction become documents; only their result is learned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import pairs
from mmgen.data.shards.samples import Picture, Sample, Text, read

RNG = np.random.default_rng(0)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    before, after = tmp_path / "before", tmp_path / "after"
    for folder in (before / "sub", after / "sub"):
        folder.mkdir(parents=True)
    for name in ("a.png", "b.png", "sub/c.png", "alone.png"):
        Image.fromarray(RNG.integers(256, size=(4, 4, 3), dtype=np.uint8)).save(before / name)
    for name in ("a.png", "b.jpg", "sub/c.png"):
        Image.fromarray(RNG.integers(256, size=(4, 4, 3), dtype=np.uint8)).save(after / name)
    (after / "a.txt").write_text("make it red")
    (before / "sub" / "c.txt").write_text("turn it")
    return before, after


def documents(out: Path) -> list[Sample]:
    return list(read([str(out / "*.tar")]))


def test_the_picture_and_the_instruction_are_given_and_the_result_is_learned(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = folders
    pairs.main(before, after, out=tmp_path / "edits")
    first, second = documents(tmp_path / "edits")
    for document, text, name in ((first, "make it red", "a.png"), (second, "turn it", "sub/c.png")):
        given, words, result = document.segments
        assert isinstance(given, Picture)
        assert isinstance(words, Text)
        assert isinstance(result, Picture)
        assert (given.learn, words.learn, result.learn) == (False, False, True)
        assert words.text == text
        assert (given.data, result.data) == ((before / name).read_bytes(), (after / name).read_bytes())
    err = capsys.readouterr().err
    assert "alone.png: no picture of the same name in" in err
    assert "b.png: no instruction" in err


def test_an_instruction_for_all_and_learning_of_all(folders: tuple[Path, Path], tmp_path: Path) -> None:
    pairs.main(*folders, out=tmp_path / "edits", instruction="improve it", learn_both=True)
    found = documents(tmp_path / "edits")
    assert [document.caption for document in found] == ["make it red", "improve it", "turn it"]
    assert all(segment.learn for document in found for segment in document.segments)


def test_names_with_dots_have_their_own_instructions(folders: tuple[Path, Path], tmp_path: Path) -> None:
    before, after = folders
    for name in ("p.v1", "p.v2"):
        for folder in folders:
            Image.fromarray(RNG.integers(256, size=(4, 4, 3), dtype=np.uint8)).save(folder / f"{name}.png")
        (after / f"{name}.txt").write_text(f"make {name}")
    (after / "p.txt").write_text("not this")
    pairs.main(before, after, out=tmp_path / "edits")
    assert [document.caption for document in documents(tmp_path / "edits")] == [
        "make it red", "make p.v1", "make p.v2", "turn it",
    ]  # fmt: skip


def test_splits_keep_pairs_together(folders: tuple[Path, Path], tmp_path: Path) -> None:
    pairs.main(*folders, out=tmp_path / "edits", instruction="improve it", val=0.4, test=0.3)
    found = documents(tmp_path / "edits")
    assert len(found) == 3
    assert all(len(document.segments) == 3 for document in found)


def test_a_missing_folder_is_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none is not a folder"):
        pairs.main(folders[0], tmp_path / "none", out=tmp_path / "edits")
