"""`mmgen data check`: problems are folded into one line per kind, and no error of a library reaches the user."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from mmgen.config import Config
from mmgen.config_io import override
from mmgen.data.dataset import Overlong
from mmgen.data.shards.index import pool_of
from mmgen.data.shards.samples import BadRecord
from mmgen.data.tools.check import CheckOptions, CheckReport, check
from mmgen.data.tools.check_streams import check_streams
from mmgen.data.tools.findings import KINDS, folded, folded_bad, folded_overlong
from mmgen.sequence.tokenizer import Tokenizer
from tests.conftest import pairs, picture, png, run, write_tar


def report_of(config: Config, *shards: object) -> CheckReport:
    return check([*map(str, shards)], Tokenizer.of(config), config, CheckOptions())


def test_a_thousand_duplicates_are_one_line(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = []
    for folder in "ab":
        (tmp_path / folder).mkdir()
        texts = {f"{i:04d}.txt": b"text" for i in range(1200)}
        shards.append(write_tar(tmp_path / folder / "train-000000.tar", texts))
    code, out, _ = run(capsys, "data", "check", *shards, "--data.tokenizer", config.data.tokenizer)
    assert code == 1
    (line,) = [line for line in out.splitlines() if "duplicate key" in line]
    assert line.startswith("1,200 duplicate keys, such as train-000000.tar/0000, train-000000.tar/0001, train")
    assert "--name" in line, "the line names the remedy"
    assert len(out.splitlines()) < 40
    report = report_of(config, *shards).as_dict()
    assert (report["duplicates"], len(report["duplicate_keys"])) == (1200, 1000)  # type: ignore[arg-type]
    assert report["duplicate_shards"] == [str(shards[1])]


def long_captions() -> dict[str, bytes]:
    return {**pairs(8), **{f"000{i}.json": json.dumps({"caption": "long " * (20 + i)}).encode() for i in range(1, 6)}}


def test_all_overlong_documents_are_reported_and_the_check_continues(config: Config, tmp_path: Path) -> None:
    members = long_captions()
    members["0007.png"] = members["0007.png"][:60]
    shard = write_tar(tmp_path / "long.tar", members)
    found = report_of(config, shard)
    lines = "\n".join(found.findings())
    assert "5 documents are longer than a row, such as long.tar/0001 (" in lines
    assert "raise data.row_length, shorten the text, or set data.overlong to truncate" in lines
    assert "1 bad sample: long.tar/0007 (image cannot be decoded" in lines
    report = found.as_dict()
    assert (report["overlong"], report["bad"], report["samples"], report["holds"]) == (5, 1, 8, False)
    assert [document.key for document in found.overlong] == [f"000{i}" for i in range(1, 6)]
    assert report["overlong_documents"][0] == {
        "shard": "long.tar",
        "key": "0001",
        "positions": found.overlong[0].positions,
    }
    assert report["coverage_exact"]
    assert not report_of(override(config, {"data": {"overlong": "truncate"}}), shard).overlong


def test_streams_report_overlong_documents_too(streamed: Config, tmp_path: Path) -> None:
    shards = [*streamed.data.train, str(write_tar(tmp_path / "long.tar", long_captions()))]
    config = override(streamed, {"data": {"train": shards}})
    report = check_streams(Tokenizer.of(config), config, CheckOptions())
    assert [document.key for document in report.overlong] == [f"000{i}" for i in range(1, 6)]
    assert not report.holds
    assert report.guarantees.hold


def test_lengths_are_those_that_training_needs(config: Config, tmp_path: Path) -> None:
    """A row of the longest reported length takes every document."""
    shard = str(write_tar(tmp_path / "long.tar", long_captions()))
    longest = max(document.positions for document in report_of(config, shard).overlong)
    for length, count in ((longest, 0), (longest - 1, 1)):
        assert len(report_of(override(config, {"data": {"row_length": length}}), shard).overlong) == count


def test_lines_are_folded_by_kind() -> None:
    assert not [*folded("key", "keys", [])]
    assert [*folded("key", "keys", ["a"])] == ["1 key: a"]
    assert [*folded("key", "keys", [*"abc"], "Rename them")] == ["3 keys: a, b, c. Rename them"]
    assert [*folded("key", "keys", [str(i) for i in range(1234)])] == ["1,234 keys, such as 0, 1, 2"]
    size = [BadRecord("s", str(i), f"image of {i}x{i} has more than 9 pixels (data.limits.pixels)") for i in range(5)]
    cut = [BadRecord("s", str(i), f"image cannot be decoded: truncated at {i}") for i in range(2)]
    assert [*folded_bad([*cut, *size])] == [
        "5 bad samples, such as s/0, s/1, s/2 (image of 0x0 has more than 9 pixels (data.limits.pixels))",
        "2 bad samples: s/0, s/1 (image cannot be decoded: truncated at 0)",
    ]
    many = [BadRecord("s", letter, f"reason {letter}") for letter in "abcdefghijklmnop"]
    assert len([*folded_bad(many)]) == KINDS + 1
    assert [*folded_overlong([Overlong("s", "k", 90)], "do this")] == [
        "1 document is longer than a row: s/k (90 positions). The longest needs 90 positions: do this"
    ]


RAW = ("Traceback", "<_io", "0x7", "pydantic", "UnbalancedBraces", "Errno")


@pytest.mark.parametrize(
    ("make", "messages"),
    [
        (lambda at: at / "none.tar", ["none.tar does not exist: make it first, or correct its path"]),
        (lambda at: at, ["is a folder, not a shard: name its .tar files, such as '", "/*.tar'"]),
        (lambda at: "train-{000..", ["the braces of 'train-{000..' do not match"]),
        (lambda at: "s4://box/a.tar", ["s4://box/a.tar cannot be opened"]),
        (lambda at: empty(at / "empty.tar"), ["no usable sample in", "cannot be read to its end"]),
        (lambda at: text(at / "page.tar"), ["no usable sample in", "no tar header at byte 0"]),
        (lambda at: text(at / "page.tar.gz"), ["no usable sample in", "its compressed data is damaged"]),
        (lambda at: write_tar(at / "nothing.tar", {}), ["no usable sample in", "the shards are empty"]),
        (lambda at: pictures(at / "odd.tar"), ["odd.tar/gif", "its header is damaged, or not one of PNG, JPEG, WEBP"]),
    ],
)
def test_wrong_shards_are_named_in_words(
    config: Config, tmp_path: Path, make: Callable[[Path], object], messages: list[str]
) -> None:
    try:
        found = "\n".join(report_of(config, make(tmp_path)).findings())
    except (ValueError, OSError) as error:
        found = str(error)
    for message in messages:
        assert message in found
    for raw in RAW:
        assert raw not in found


def empty(path: Path) -> Path:
    path.write_bytes(b"")
    return path


def text(path: Path) -> Path:
    path.write_text("<html>not found</html>" * 100)
    return path


def pictures(path: Path) -> Path:
    """A shard in which one image is sound and one is a GIF under another name."""
    gif = io.BytesIO()
    Image.new("RGB", (4, 4)).save(gif, format="GIF")
    sound = png(picture(np.random.default_rng(0)))
    return write_tar(path, {"gif.png": gif.getvalue(), "gif.txt": b"a", "good.png": sound, "good.txt": b"b"})


def test_a_killed_worker_is_an_error_in_words() -> None:
    with pytest.raises(ChildProcessError, match="use fewer --workers"), pool_of(2) as pool:
        pool.submit(os._exit, 9).result()


def test_pillow_does_not_warn_of_large_images(tmp_path: Path) -> None:
    """`data.limits.pixels` refuses such an image with a reason; Pillow's warning would come on top of it."""
    code = (
        "import io; from PIL import Image; from mmgen.config import LimitsConfig\n"
        "from mmgen.data.shards.pictures import image_size; from mmgen.data.shards.samples import Picture\n"
        "file = io.BytesIO(); Image.new('1', (10000, 10000)).save(file, format='PNG')\n"
        "try:\n    image_size(Picture(file.getvalue()), LimitsConfig())\n"
        "except ValueError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "image of 10000x10000 has more than" in done.stdout
    assert "DecompressionBomb" not in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", 0], "COUNT must be at least 1 (got 0)"),
        (["show", 1, "--out", "{at}/tokenizer.json"], "tokenizer.json is a file: name a folder"),
        (["check", "--world", 0], "--world must be at least 1 (got 0)"),
        (["check", "--inject", "nothing"], "unknown fault 'nothing' (one of: per_rank_seed"),
        (
            ["index", "--data.cache_dir", "{at}/tokenizer.json"],
            "the index of {at}/train-000.tar can be written neither",
        ),
        (["buckets", "--pixels", "1x1"], "hold no patch of 2x2: raise --pixels"),
        (["index", "--data.tokenizer", "{at}/train-000.tar"], "is not a tokenizer.json"),
    ],
)
def test_wrong_options_are_named_in_words(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[object], message: str
) -> None:
    (tmp_path / "train-000.tar.mmgen-index").mkdir()  # no index can be written next to the shard
    file = tmp_path / "run.yaml"
    settings = config.model_dump(mode="json")
    settings["data"]["cache_dir"] = str(tmp_path / "cache")
    file.write_text(yaml.safe_dump(settings))
    words = [str(word).format(at=tmp_path) for word in words]
    code, out, error = run(capsys, "data", *words, "--config", file)
    assert code == 2
    assert message.format(at=tmp_path) in error
    for raw in RAW:
        assert raw not in out + error
