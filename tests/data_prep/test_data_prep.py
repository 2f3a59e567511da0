"""Raw sources to shards: folders, tables, text and pages; what is written, resuming, and wrong sources."""

from __future__ import annotations

import base64
import csv
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_prep import folder, pages, table, text
from data_prep.shards import LeftOut, image_member, pieces
from mmgen.config import DataConfig, LimitsConfig
from mmgen.data.shards.pictures import image_size, open_image
from mmgen.data.shards.samples import Picture, Sample, Text, read
from tests.conftest import picture, png

KEEP = DataConfig(captionless="keep")
RNG = np.random.default_rng(0)


def shards(out: Path) -> list[Sample]:
    """Every sample of a folder of shards, none of them bad."""
    return list(read([str(out / "*.tar")], data=KEEP))


def same(sample: Sample, image: Image.Image) -> bool:
    """Whether a sample's image equals the picture."""
    return sample.image is not None and np.array_equal(np.asarray(open_image(sample.image)), np.asarray(image))


def photos(root: Path, count: int = 5) -> list[Image.Image]:
    """Pictures of several formats in folders, with caption files."""
    shown = [picture(RNG) for _ in range(count)]
    for i, image in enumerate(shown):
        place = root / f"part{i % 2}" / f"photo.v{i}"
        place.parent.mkdir(parents=True, exist_ok=True)
        image.save(f"{place}{('.png', '.webp', '.bmp')[i % 3]}", **({"lossless": True} if i % 3 == 1 else {}))
        if i % 2:
            Path(f"{place}.txt").write_text(f" picture {i}\n")
        else:
            Path(f"{place}.json").write_text(json.dumps({"caption": f"picture {i}", "licence": "CC0"}))
    return shown


def test_folder_of_images_with_caption_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = photos(tmp_path / "in")
    (tmp_path / "in" / "alone.png").write_bytes(png(shown[0]))
    (tmp_path / "in" / "broken.png").write_bytes(png(shown[0])[:40])
    (tmp_path / "in" / "broken.txt").write_text("cut off")
    folder.main(tmp_path / "in", out=tmp_path / "out", per_shard=2)
    found = shards(tmp_path / "out")
    assert sorted(sample.caption for sample in found) == [f"picture {i}" for i in range(5)]
    for sample in found:
        assert same(sample, shown[int(sample.caption[-1])])
    assert {sample.meta.get("licence") for sample in found} == {"CC0", None}
    captured = capsys.readouterr()
    assert "alone.png: no caption" in captured.err
    assert "broken.png: image cannot be decoded" in captured.err
    assert "5 samples written now, 2 left out" in captured.out
    folder.main(tmp_path / "in", out=tmp_path / "all", captionless=True)
    assert len(shards(tmp_path / "all")) == 6


def test_images_that_can_be_read_stay_as_they_are(tmp_path: Path) -> None:
    data = io.BytesIO()
    picture(RNG, (16, 16)).save(data, format="JPEG", quality=60)
    (tmp_path / "a.jpeg").write_bytes(data.getvalue())
    (tmp_path / "a.txt").write_text("a photo")
    folder.main(tmp_path, out=tmp_path / "out")
    assert shards(tmp_path / "out")[0].image == data.getvalue()


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "paths.parquet", "bytes.parquet", "struct.parquet"])
def test_table(tmp_path: Path, kind: str) -> None:
    """Rows in their order; a row without an image or a caption is left out."""
    shown = [picture(RNG) for _ in range(3)]
    for i, image in enumerate(shown):
        image.save(tmp_path / f"{i}.png")
    lines = [{"file": f"{i}.png", "words": f'the "{i}", one\nof three'} for i in range(3)]
    lines += [{"file": "none.png", "words": "nothing"}, {"file": "0.png", "words": ""}]
    source = tmp_path / f"list.{kind}"
    if kind in ("csv", "tsv"):
        with source.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["file", "words"], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(lines)
    elif kind == "jsonl":
        source.write_text("\n".join(json.dumps(line) for line in lines))
    else:
        cells = {
            "paths.parquet": [line["file"] for line in lines],
            "bytes.parquet": [*(png(image) for image in shown), None, png(shown[0])],
            "struct.parquet": [
                *({"bytes": png(image), "path": "x.png"} for image in shown),
                {"bytes": None, "path": "none.png"},
                {"bytes": png(shown[0]), "path": None},
            ],
        }[kind]
        pyarrow.parquet.write_table(pyarrow.table({"file": cells, "words": [line["words"] for line in lines]}), source)
    table.main(source, out=tmp_path / "out", image="file", caption="words", per_shard=2)
    found = shards(tmp_path / "out")
    assert [sample.caption for sample in found] == [line["words"] for line in lines[:3]]
    assert all(same(sample, image) for sample, image in zip(found, shown, strict=True))


def test_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two\nthree\n\nfour\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "five"}) + "\n\n" + json.dumps({"text": "six seven"}))

    def written(name: str, **options: object) -> list[str]:
        text.main(tmp_path, out=tmp_path / name, **options)  # type: ignore[arg-type]
        return [sample.caption for sample in shards(tmp_path / name)]

    assert written("file") == ["one two\nthree\n\nfour", "five", "six seven"]
    assert written("paragraph", split="paragraph") == ["one two\nthree", "four", "five", "six seven"]
    assert written("line", split="line") == ["one two", "three", "four", "five", "six seven"]
    assert written("cut", split="line", length=5) == ["one", "two", "three", "four", "five", "six", "seven"]


@given(st.text(max_size=60), st.integers(1, 12))
def test_pieces_lose_only_white_space(whole: str, length: int) -> None:
    found = list(pieces(whole, length, len))
    assert all(0 < len(piece) <= length for piece in found)
    assert "".join("".join(found).split()) == "".join(whole.split())


def site(root: Path) -> tuple[Image.Image, Image.Image]:
    """A page with pictures of every kind of address."""
    root.mkdir()
    a, b = picture(RNG), picture(RNG)
    (root / "img").mkdir()
    a.save(root / "img" / "a b.png")
    a.save(root.parent / "secret.png")
    inline = "data:image/png;base64," + base64.b64encode(png(b)).decode()
    (root / "page.html").write_text(
        f"""<!doctype html><html><head><title>no</title><style>p {{}}</style></head><body>
        <nav>Home</nav><!-- hidden --><h1>A   <em>red</em>
        house</h1><p>Before &amp; after<br>a line<script>no()</script></p>
        <figure><img src="img/a%20b.png?x=1" alt="no"><figcaption>The house</figcaption></figure>
        <img src="../secret.png"><img src="/img/none.png"><img src="https://example.com/c.png">
        <p>Then<img src="{inline}">the end</p><footer>no</footer></body></html>"""
    )
    return a, b


def test_pages_become_interleaved_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = site(tmp_path / "site")
    pages.main(tmp_path / "site", out=tmp_path / "out")
    (document,) = shards(tmp_path / "out")
    found = [segment.text if isinstance(segment, Text) else "image" for segment in document.segments]
    assert found == ["A red house\nBefore & after\na line", "image", "The house\nThen", "image", "the end"]
    drawn = [np.asarray(open_image(segment.data)) for segment in document.segments if isinstance(segment, Picture)]
    assert np.array_equal(drawn[0], np.asarray(a))
    assert np.array_equal(drawn[1], np.asarray(b))
    lines = capsys.readouterr().err
    for reason in (
        "../secret.png: outside",
        "none.png",
        "example.com/c.png: not in the folder, and nothing is downloaded",
    ):
        assert reason in lines


def test_long_pages_become_several_documents(tmp_path: Path) -> None:
    site(tmp_path / "site")
    pages.main(tmp_path / "site", out=tmp_path / "out", length=20, images=1)
    found = shards(tmp_path / "out")
    assert len(found) > 2
    for document in found:
        words = [segment.text for segment in document.segments if isinstance(segment, Text)]
        assert sum(map(len, words)) <= 20
        assert len(document.segments) - len(words) <= 1
    assert " ".join(" ".join(document.caption for document in found).split()) == (
        "A red house Before & after a line The house Then the end"
    )


def test_a_killed_command_resumes(tmp_path: Path) -> None:
    """The result equals that of an uninterrupted run, byte for byte; complete shards are not written again."""
    photos(tmp_path / "in", 7)
    folder.main(tmp_path / "in", out=tmp_path / "whole", name="photos", per_shard=2)
    command = (
        "import data_prep.folder as f, os, sys; from pathlib import Path\n"
        "write = f.image_member\n"
        "def count(*a, n=[0]):\n    n[0] += 1\n    return os._exit(9) if n[0] == 4 else write(*a)\n"
        "f.image_member = count\n"
        f"f.main(Path({str(tmp_path / 'in')!r}), out=Path({str(tmp_path / 'cut')!r}), name='photos', per_shard=2)"
    )
    assert subprocess.run([sys.executable, "-c", command], check=False, capture_output=True).returncode == 9
    done = [*(tmp_path / "cut").glob("*.tar")]
    assert len(done) == 1
    before = done[0].stat().st_mtime_ns
    folder.main(tmp_path / "in", out=tmp_path / "cut", name="photos", per_shard=2)
    assert done[0].stat().st_mtime_ns == before
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "cut").iterdir())
    assert all((tmp_path / "whole" / n).read_bytes() == (tmp_path / "cut" / n).read_bytes() for n in names)


def test_another_source_under_the_same_name_is_refused(tmp_path: Path) -> None:
    photos(tmp_path / "in")
    folder.main(tmp_path / "in", out=tmp_path / "out")
    (tmp_path / "in" / "new.png").write_bytes(png(picture(RNG)))
    with pytest.raises(ValueError, match=r"made from something else: files .*Choose another --out"):
        folder.main(tmp_path / "in", out=tmp_path / "out")


def test_a_changed_source_is_noticed(tmp_path: Path) -> None:
    """An edit that keeps sizes is noticed. A command that wrote nothing and shards inside the source are ignored."""
    picture(RNG).save(made(tmp_path / "in" / "a.png", b""))
    made(tmp_path / "in" / "a.txt", "a cat")
    folder.main(tmp_path / "in", out=tmp_path / "in" / "shards")
    folder.main(tmp_path / "in", out=tmp_path / "in" / "shards")
    made(tmp_path / "in" / "a.txt", "a dog")
    with pytest.raises(ValueError, match="files were added, removed or changed"):
        folder.main(tmp_path / "in", out=tmp_path / "in" / "shards")
    source = made(tmp_path / "list.csv", "image,caption\na.png,a cat\n")
    with pytest.raises(ValueError, match="all 1 items were left out"):
        table.main(source, out=tmp_path / "table")
    table.main(source, out=tmp_path / "table", images=tmp_path / "in")
    assert len(shards(tmp_path / "table")) == 1
    with pytest.raises(ValueError, match="not UTF-8"):
        text.main(made(tmp_path / "t.txt", "caf\xe9".encode("latin-1")), out=tmp_path / "text")
    text.main(made(tmp_path / "t.txt", "caf\xe9"), out=tmp_path / "text")
    assert shards(tmp_path / "text")[0].caption == "caf\xe9"


def test_captions_with_byte_order_marks_and_capital_suffixes(tmp_path: Path) -> None:
    for name, data in {"a.txt": b"\xef\xbb\xbfmarked", "b.TXT": b"LOUD", "c.json": b'{"caption": null}'}.items():
        made(tmp_path / "in" / name, data)
        picture(RNG).save(tmp_path / "in" / f"{name[0]}.png")
    (tmp_path / "linked").symlink_to(tmp_path / "in")
    (tmp_path / "top").mkdir()
    (tmp_path / "top" / "way").symlink_to(tmp_path / "linked")
    folder.main(tmp_path / "top", out=tmp_path / "out", captionless=True)
    assert [sample.caption for sample in shards(tmp_path / "out")] == ["marked", "LOUD", ""]


def test_rows_that_would_break_a_csv_reader(tmp_path: Path) -> None:
    picture(RNG).save(tmp_path / "a.png")
    html = "x" * 200_000
    rows = f"image,caption,html\na.png,one,{html}\na\0.png,two,\na.png,three,\n"
    table.main(made(tmp_path / "t.csv", rows), out=tmp_path / "csv")
    assert [sample.caption for sample in shards(tmp_path / "csv")] == ["one", "three"]
    table.main(made(tmp_path / "t.jsonl", '{"image": "a.png"}\n{"image": "a.png", "caption": "b"}'), out=tmp_path / "l")
    assert [sample.caption for sample in shards(tmp_path / "l")] == ["b"]
    text.main(made(tmp_path / "s.jsonl", '{"text": "bad \\ud83d end"}\n{"text": "good"}'), out=tmp_path / "text")
    assert [sample.caption for sample in shards(tmp_path / "text")] == ["bad ? end", "good"]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("<html><head><title>T</title><body><p>Hello<img src=i.png>", ["Hello", "image"]),
        ("<form id=aspnetForm><p>Hello</p><select><option>no</select></form>", ["Hello"]),
        ("<header>no</header><article><header><h1>Title</h1></header>Words</article>", ["Title\nWords"]),
        ('<img src="data:image/gif;base64,R0lGODlhAQABAAAAACw=" data-src="i.png">Words', ["image", "Words"]),
        ('<img srcset="i.png 1x, big.png 2x">Words', ["image", "Words"]),
        ('<img src="spacer.png">Words', ["Words"]),
        ('<base href="/sub/"><body><img src="only.png">', ["image"]),
        ('<base href="https://example.com/"><body><img src="i.png">', ["image"]),
        ('<img src="linked.png">', ["image"]),
        ('<img src="http://[">Words', ["Words"]),
        ('<base href="http://["><body><img src="i.png">Words', ["Words"]),
    ],
)
def test_pages_as_found_on_the_web(tmp_path: Path, body: str, expected: list[str]) -> None:
    root = made(tmp_path / "site" / "page.html", body).parent
    (root / "sub").mkdir()
    for name in ("i.png", "sub/only.png"):
        picture(RNG).save(root / name)
    picture(RNG, (1, 9)).save(root / "spacer.png")
    picture(RNG).save(tmp_path / "elsewhere.png")
    (root / "linked.png").symlink_to(tmp_path / "elsewhere.png")
    pages.main(root, out=tmp_path / "out")
    (document,) = shards(tmp_path / "out")
    assert [segment.text if isinstance(segment, Text) else "image" for segment in document.segments] == expected


def test_odd_images(tmp_path: Path) -> None:
    """MPO of phones is kept as a JPEG with its orientation, 16 bits are kept, unknown ranges are left out."""
    exif = Image.Exif()
    exif[0x0112] = 6
    shown = picture(RNG, (40, 80))
    data = io.BytesIO()
    shown.save(data, format="MPO", save_all=True, append_images=[shown], exif=exif)
    assert image_member(data.getvalue(), "phone") == {"jpg": data.getvalue()}
    assert image_size(Picture(data.getvalue()), LimitsConfig()) == (80, 40)
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for kind in (np.uint16, ">u2", np.int32):
        found = Image.open(io.BytesIO(image_member(tiff(ramp.astype(kind)), "ramp")["png"]))
        assert np.array_equal(np.asarray(found), ramp)
    for wrong, why in ((ramp.astype(np.float32), "floating point"), (ramp.astype(np.int32) * 9, "32 bits")):
        with pytest.raises(LeftOut, match=why):
            image_member(tiff(wrong), "ramp")


def tiff(values: np.ndarray) -> bytes:
    """A TIFF of these pixel values, in their type and byte order."""
    data = io.BytesIO()
    if values.dtype == ">u2":
        Image.frombytes("I;16B", values.shape[::-1], values.tobytes()).save(data, format="TIFF")
    else:
        Image.fromarray(values).save(data, format="TIFF")
    return data.getvalue()


def test_images_that_training_refuses_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("L", (8000, 7000)).save(made(tmp_path / "in" / "large.png", b""))
    made(tmp_path / "in" / "large.txt", "large")
    with pytest.raises(ValueError, match="all 1 items"):
        folder.main(tmp_path / "in", out=tmp_path / "out")
    assert "large.png: image of 8000x7000 has more than" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda at: folder.main(at, out=at / "out", name="v1.0"), "a key ends at its first dot"),
        (lambda at: folder.main(at / "none", out=at / "out"), "is not a folder"),
        (lambda at: folder.main(at, out=at / "out"), "holds nothing to write"),
        (lambda at: pages.main(at, out=at / "out"), "holds nothing to write"),
        (lambda at: pages.main(at, out=at / "out", images=0), "must be at least 1"),
        (lambda at: text.main(out=at / "out"), "name files"),
        (lambda at: text.main(at / "a.pdf", out=at / "out"), "neither a folder nor a file"),
        (lambda at: table.main(at / "a.xls", out=at / "out"), "name a file that ends in"),
        (
            lambda at: table.main(made(at / "t.csv", "a,b\n1,2\n"), out=at / "out"),
            r"no column 'image', but \['a', 'b'\]",
        ),
        (lambda at: table.main(made(at / "t.jsonl", '{"image": 1'), out=at / "out"), "line 1"),
        (lambda at: text.main(made(at / "t.jsonl", '{"body": "x"}'), out=at / "out"), "field 'text'"),
        (lambda at: text.main(made(at / "t.txt", b"\xff\xfe"), out=at / "out"), "not UTF-8"),
        (
            lambda at: text.main(made(at / "t.txt", "x"), out=at / "out", tokenizer=at / "no.json"),
            "no.json: No such file",
        ),
        (lambda at: text.main(made(at / "t.txt", "x"), out=at / "out", per_shard=0), "at least 1"),
    ],
)
def test_wrong_sources_are_named_in_words(tmp_path: Path, call: Callable[[Path], None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(tmp_path)
    assert not list(tmp_path.glob("out/*.tar"))


def made(path: Path, content: str | bytes) -> Path:
    """A file of that content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_judge_and_test_digits_do_not_depend_on_the_validation_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A larger validation split changes the training split only; scores of versions stay comparable."""
    from data_prep import digits

    for name, share in (("one", 0.1), ("two", 0.3)):
        monkeypatch.setattr(digits, "VALIDATION", share)
        digits.main(out=tmp_path / name)

    def contents(folder: str, part: str) -> dict[str, bytes]:
        with tarfile.open(tmp_path / folder / f"{part}-000000.tar") as tar:
            return {member.name: tar.extractfile(member).read() for member in tar}

    for part in ("judge", "test"):
        assert contents("one", part) == contents("two", part)
    assert len(contents("one", "val")) < len(contents("two", "val"))
