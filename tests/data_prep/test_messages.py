"""Messages of the scripts: wrong commands and damaged sources are named in words, repeated losses are folded."""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

import data_prep
from data_prep import folder, run
from data_prep.shards import LeftOut, image_member
from tests.conftest import picture
from tests.data_prep.test_data_prep import RNG, made, photos


def parquet(path: Path, cells: list[object]) -> Path:
    columns = {"image": cells, "caption": ["a"] * len(cells)}
    pyarrow.parquet.write_table(pyarrow.table(columns), path, compression="none")
    return path


def cut(path: Path) -> Path:
    """The file without its first column's data, so that reading fails after the header was read."""
    content = path.read_bytes()
    return made(path, content[:4] + b"\xff" * 40 + content[44:])


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("folder", lambda at: [at, "--out", made(at / "file.png", "")], "is a file: name a folder"),
        ("folder", lambda at: [at, "--out", noted(at / "out")], "out.source.json is damaged"),
        ("table", lambda at: [made(at / "t.parquet", "PAR1"), "--out", at / "o"], "cannot be read as Parquet"),
        ("table", lambda at: [cut(parquet(at / "t.parquet", ["a"])), "--out", at / "o"], "cannot be read as Parquet"),
        ("table", lambda at: [made(at / "t.csv", b"\xff\xfe\0"), "--out", at / "o"], "t.csv is not UTF-8"),
        ("text", lambda at: [made(at / "t.jsonl", b'{"text": "\xff"}'), "--out", at / "o"], "t.jsonl is not UTF-8"),
        ("text", lambda at: [made(at / "t.txt", "x"), "--out", at / "o", "--length", "many"], "--length: 'many' is not a whole number"),
        ("tokenizer", lambda at: [at / "none.tar", "--out", at / "t.json"], "none.tar does not exist"),
        ("tokenizer", lambda at: ["--out", at / "t.json"], "no shards are given: name the .tar files"),
        ("tokenizer", lambda at: [made(at / "a.tar", "x"), "--out", at / "t.json"], "no usable sample"),
        ("tokenizer", lambda at: [at / "a.tar", "--out", at, "--vocabulary", 10], "the bytes alone are 256 tokens"),
        ("tokenizer", lambda at: [at / "a.tar", "--out", at], "is a folder: name a file"),
        ("digits", lambda at: ["--out", made(at / "file", "")], "is a file: name a folder"),
        ("scenes", lambda at: ["--out", at / "o", "--train", 0], "--train must be at least 1"),
        ("latents", lambda at: ["--config", made(at / "c.yaml", "data: {trian: []}"), "--out", at], "data.trian"),
        ("latents", lambda at: ["--config", at / "none.yaml", "--out", at], "none.yaml does not exist"),
        ("latents", lambda at: ["--config", made(at / "c.yaml", "run: {}"), "--out", at, at / "a.tar"], "a.tar does"),
        ("train_vae", lambda at: ["--config", made(at / "c.yaml", "run: {seed: 1}"), "--batch", 0], "--batch is 0"),
    ],
)  # fmt: skip
def test_a_wrong_command_ends_with_words_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    script: str, words: Callable[[Path], list[object]], message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("sys.argv", [f"{script}.py", *map(str, words(tmp_path))])
    with pytest.raises(SystemExit) as stop:
        run(importlib.import_module(f"data_prep.{script}").main)
    captured = capsys.readouterr()
    text = " ".join((captured.out + captured.err).replace("│", " ").split())
    assert stop.value.code == 2
    assert message in text
    for raw in (
        "Traceback",
        "Errno",
        "pydantic",
        "Arrow",
        "<_io",
        "codec",
    ):
        assert raw not in text


def noted(out: Path) -> Path:
    """A folder of shards with a damaged note of their source."""
    made(out / "out-000000.tar", "")
    made(out / "out.source.json", "{")
    return out


def test_every_script_runs_through_run() -> None:
    """`run` turns errors into messages; a script that calls cyclopts itself ends with a traceback."""
    for script in sorted(Path(data_prep.__file__).parent.glob("[a-z]*.py")):
        source = script.read_text()
        assert "cyclopts.run(" not in source
        assert ("\n    run(main)\n" in source) == ("def main(" in source)


def test_repeated_losses_are_folded_and_all_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lines for the first three of a kind, then a count; the file lists all, each once, also after a resume."""
    for i in range(40):
        picture(RNG).save(made(tmp_path / "in" / f"{i:02d}.png", b""))
    made(tmp_path / "in" / "40.bmp", "no picture")
    made(tmp_path / "in" / "40.txt", "a caption")
    made(tmp_path / "in" / "00.txt", "a caption")
    folder.main(tmp_path / "in", out=tmp_path / "out", per_shard=25)
    lines = capsys.readouterr().err.splitlines()
    assert sum("no caption file" in line for line in lines) == 4
    assert any(line.startswith("39 left out: no caption file") and "out.left-out.txt" in line for line in lines)
    assert "left out: 40.bmp: image cannot be decoded: its header is damaged" in lines
    listed = (tmp_path / "out" / "out.left-out.txt").read_text().splitlines()
    assert len(listed) == len(set(listed)) == 40
    folder.main(tmp_path / "in", out=tmp_path / "out", per_shard=25)
    again = (tmp_path / "out" / "out.left-out.txt").read_text().splitlines()
    assert len(again) == 40 + 16, "a shard without any sample is not written, so its items are read again"


def test_progress_counts_the_items_of_the_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos(tmp_path / "in")
    folder.main(tmp_path / "in", out=tmp_path / "out")
    assert "writing out shards: 5 of 5 items of the source" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "BMP", "PNG", "JPEG", "WEBP", "ICO", "PPM", "TGA", "PCX", "SGI"])
def test_damaged_pictures_are_left_out_in_words(kind: str) -> None:
    """Random changes of bytes: the picture is read, or left out for a reason; no other error escapes."""
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(data, format=kind)
    rng, reasons = np.random.default_rng(2), list[str]()
    for _ in range(60):
        content = bytearray(data.getvalue())
        for at in rng.integers(len(content), size=int(rng.integers(1, 6))):
            content[at] = rng.integers(256)
        try:
            image_member(bytes(content[: int(rng.integers(len(content) // 2, len(content) + 1))]), "x")
        except LeftOut as error:
            reasons.append(str(error))
    assert not [why for why in reasons if "<_io" in why]
