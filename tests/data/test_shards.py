"""Reading shards that nobody vouches for: archives, members, images, places."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import re
import resource
import struct
import tarfile
import threading
import time
import zlib
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmgen.config import Config, DataConfig, LimitsConfig
from mmgen.config_io import override
from mmgen.data.loader import Corpus, steps
from mmgen.data.order import Position
from mmgen.data.shards import store
from mmgen.data.shards.index import build, ensure, find
from mmgen.data.shards.pictures import image_size, open_image, open_stored
from mmgen.data.shards.samples import (
    BadRecord,
    BadSample,
    Picture,
    Text,
    clean,
    groups,
    parse,
    read,
)
from mmgen.data.shards.tar import Damaged, Member, members
from mmgen.image.resize import fit, flatten, nearest_size
from mmgen.sequence.tokenizer import Tokenizer
from tests.conftest import pairs, picture, png, text_tokenizer, write_tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def everything(name: str) -> bool:
    return True


def tar_of(names: dict[str, bytes], form: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, data in names.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def tokenizer() -> Tokenizer:
    return Tokenizer(text_tokenizer(), [(2, 2), (3, 2)])


def listed(content: bytes, most: int = 1 << 20) -> list[Member]:
    return list(members(io.BytesIO(content), everything, most))


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text("aé./ _-0", min_size=1, max_size=300).map(lambda s: "d/" + s + "x"),
        st.binary(max_size=1500),
        max_size=6,
    ),
    st.sampled_from(["gnu", "pax"]),
)
def test_members_are_those_of_tarfile(names: dict[str, bytes], form: str) -> None:
    content = tar_of(names, FORMATS[form])
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        expected = [(info.name, info.offset_data, info.size) for info in tar.getmembers()]
    found = listed(content)
    assert [(member.name, member.offset, member.size) for member in found] == expected
    assert [member.data for member in found] == list(names.values())
    assert all(content[m.offset : m.offset + m.size] == m.data for m in found)


def test_links_devices_and_sparse_members_are_left_out() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number, kind in enumerate([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]):
            info = tarfile.TarInfo(f"{number}.txt")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("folder")
        info.type = tarfile.DIRTYPE
        tar.addfile(info)
        info = tarfile.TarInfo("9.txt")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"yes"))
    found = listed(buffer.getvalue())
    assert [member.reason != "" for member in found] == [True] * 4 + [False]
    assert "symbolic link" in found[0].reason
    assert [member.data for member in found] == [None] * 4 + [b"yes"]


def sparse(tmp_path: Path, form: str) -> bytes:
    """A sparse member as GNU tar writes it."""
    import subprocess

    with (tmp_path / "hole.txt").open("wb") as file:
        for block in range(40):
            file.seek(block * 1_000_000)
            file.write(b"x")
    (tmp_path / "plain.txt").write_bytes(b"plain")
    command = ["tar", "-S", f"--format={form}", "-cf", "s.tar", "hole.txt", "plain.txt"]
    subprocess.run(command, cwd=tmp_path, check=True)
    return (tmp_path / "s.tar").read_bytes()


@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_sparse_members_of_gnu_tar(tmp_path: Path, form: str) -> None:
    found = listed(sparse(tmp_path, form), 1 << 30)
    assert [member.reason for member in found] == ["it is sparse", ""]
    assert found[1].data == b"plain"


def test_truncation_at_every_block(tmp_path: Path) -> None:
    """Whatever is cut off, the samples before it are read, and one line tells of the loss."""
    whole = tar_of(pairs(4))
    complete = [sample.key for sample in read([str(write(tmp_path / "w.tar", whole))])]
    lost = []
    for size in range(0, len(whole), 512):
        bad: list[BadRecord] = []
        found = [sample.key for sample in read([str(write(tmp_path / "c.tar", whole[:size]))], bad)]
        assert found == complete[: len(found)]
        assert (not bad) == (found == complete and len(whole[:size].rstrip(b"\0")) + 512 <= size)
        assert all("cannot be read to its end" in item.reason for item in bad)
        lost.append(len(complete) - len(found))
    assert sorted(lost, reverse=True) == lost
    for size in (1, 511, 700, 1025):
        assert damaged(whole[:size])


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def damaged(content: bytes) -> str:
    with pytest.raises(Damaged) as error:
        listed(content)
    return str(error.value)


def test_damaged_headers_are_named() -> None:
    whole = bytearray(tar_of({"a.txt": b"1", "b.txt": b"2"}))
    assert damaged(b"PK\3\4" + bytes(600)) == "no tar header at 0 bytes"
    assert "no tar header at 1024 bytes" in damaged(bytes(whole[:1024] + b"\xff" * 512 + whole[1024:]))
    assert "behind the end mark" in damaged(bytes(whole) + bytes(whole))
    assert "not octal" in damaged(_with_size(whole, b"99999999999\0"))
    assert "negative" in damaged(_with_size(whole, b"\xff" * 12))
    assert "ends inside a.txt" in damaged(_with_size(whole, b"77777777777\0"))
    assert "ends inside a.txt" in damaged(_with_size(whole, b"\x80" + b"\x7f" * 11))
    huge = bytearray(tar_of({"x" * 200: b"1"}, tarfile.GNU_FORMAT))
    assert "extended header of" in damaged(_with_size(huge, b"77777777777\0"))
    bad_pax = tar_of({"é" * 80: b"1"}, tarfile.PAX_FORMAT).replace(b" path=", b" path ")
    assert "not made of records" in damaged(bad_pax)
    short = re.sub(rb"\d{3} path=", b"001 path=", tar_of({"é" * 80: b"1"}, tarfile.PAX_FORMAT))
    assert "not made of records" in damaged(short)


def _with_size(content: bytearray, size: bytes) -> bytes:
    changed = bytearray(content)
    changed[124:136] = size
    changed[148:156] = b" " * 8
    changed[148:156] = b"%06o\0 " % sum(changed[:512])
    return bytes(changed)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_mutated_archive_never_breaks_the_reader(data: st.DataObject) -> None:
    """Whatever bytes change, the reader ends with samples, named losses, or both."""
    form = data.draw(st.sampled_from(sorted(FORMATS)))
    members = {**pairs(2), "long" * (20 if form == "ustar" else 60) + ".txt": b"text"}
    content = bytearray(tar_of(members, FORMATS[form]))
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + 1] = data.draw(st.binary(max_size=3))
        if not content:
            break
    assert survive(bytes(content)) <= len(members), "a change may lose or split samples, not make members up"


def survive(content: bytes) -> int:
    """Samples that are read; anything but `Damaged` and `BadSample` escapes."""
    count = 0
    try:
        for group in groups(io.BytesIO(content), LimitsConfig()):
            try:
                sample = parse("s.tar", group, DataConfig())
                for segment in sample.segments:
                    if isinstance(segment, Picture):
                        image_size(segment, LimitsConfig())
                count += 1
            except BadSample:
                pass
    except Damaged:
        pass
    return count


def png_bomb(side: int) -> bytes:
    """A PNG whose header claims side x side black pixels, compressed a thousandfold."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    packer = zlib.compressobj(9)
    body = b"".join(packer.compress(bytes(side + 1)) for _ in range(min(side, 2000))) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def hostile() -> dict[str, bytes]:
    """Members of which only `good` and `thin` make documents."""
    rng = np.random.default_rng(0)
    good = png(picture(rng))

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (Path("/tmp/mmgen-was-here"),))

    return {
        "../../escape.txt": b"a text from a path that climbs",
        "/absolute.txt": b"a text from an absolute path",
        "good.png": good, "good.txt": b"fine",
        "thin.png": png(Image.new("RGB", (20_000, 1))), "thin.txt": b"one pixel high",
        "dot.png": png(Image.new("RGB", (1, 1))), "dot.txt": b"one pixel",
        "bomb.png": png_bomb(20_000), "bomb.txt": b"400 million pixels",
        "empty.png": b"", "empty.txt": b"zero bytes",
        "wrong.png": b"GIF89a" + bytes(50), "wrong.txt": b"another format",
        "cut.png": good[:20], "cut.txt": b"cut",
        "alone.png": good,
        "pickle.pyd": pickle.dumps(Bomb()),
        "pickled.npy": npy(np.array([Bomb()], dtype=object)), "pickled.txt": b"a pickle in numpy's clothes",
        "nan.npy": npy(np.full((4, 2, 2), np.nan, np.float32)), "nan.txt": b"not finite",
        "claims.npy": npy(np.zeros((4, 2, 2), np.float32)).replace(b"(4, 2, 2)", b"(4, 2,99)"), "claims.txt": b"shape",
        "deep.json": b"[" * 100_000,
        "long.txt": b"x" * 200_000,
        "number.json": b'{"caption": 3}',
        "big.png": good + bytes(70 * 2**20), "big.txt": b"too large a member",
        "good.webp": b"again, apart from the first",
    }  # fmt: skip


SOUND = {"../../escape", "/absolute", "good", "thin", "dot"}


def test_a_hostile_shard_is_survived(config: Config, tmp_path: Path) -> None:
    """No crash, nothing written, little memory; every loss has a line; the rest trains."""
    folder = tmp_path / "in"
    folder.mkdir()
    shard = write_tar(folder / "hostile.tar", hostile())
    before = set(tmp_path.rglob("*"))
    one = override(config, {
        "data": {"train": [str(shard)], "row_length": 128, "cache_dir": str(tmp_path / "cache"), "max_bad_fraction": 1},
        "model": {"patcher": {"image_sizes": [[4, 4]]}},
    })  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    corpus = Corpus(one.data.train, Tokenizer.load(one.data.tokenizer, [(2, 2)]), one)
    found = list(steps(corpus, 0, 3, Position()))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200 * 1024
    assert {sample.key for sample in corpus.samples} == SOUND
    assert sum(step.documents for step in found) > 0
    assert not any(step.bad for step in found)
    keys = {name.rsplit("/", 1)[-1].split(".", 1)[0] for name in hostile() if not name.startswith(("..", "/"))}
    assert {item.key for item in corpus.bad} == keys - SOUND | {"good"}, "every loss has its line"
    reasons = {item.key: item.reason for item in corpus.bad}
    assert "400000000 pixels" in reasons["bomb"]
    assert "apart from the first" in reasons["good"]
    assert "Python objects" in reasons["pickled"]
    assert "not finite" in reasons["nan"]
    assert "without a caption" in reasons["alone"]
    assert set(tmp_path.rglob("*")) - before == {folder / "hostile.tar.mmgen-index"}
    assert not Path("/tmp/mmgen-was-here").exists()


def test_compressed_shards(config: Config, tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    content = tar_of(pairs(6))
    base = override(config, {"data": {"cache_dir": str(tmp_path / "cache")}})
    packed = {"a.tar": content, "a.tar.gz": gzip.compress(content), "a.tar.zst": zstandard.compress(content)}
    seen = []
    for name, data in packed.items():
        shard = write(tmp_path / name, data)
        assert [sample.caption for sample in read([str(shard)])] == [f"picture {i}" for i in range(6)]
        corpus = Corpus([str(shard)], Tokenizer.of(base), base)
        seen.append([sample.image for sample in corpus.samples])
    assert seen[0] == seen[1] == seen[2]
    two = write(tmp_path / "two.tar.gz", gzip.compress(content[:1024]) + gzip.compress(content[1024:]))
    assert len(list(read([str(two)]))) == 6, "several streams in one file"
    for name in ("a.tar.gz", "a.tar.zst"):
        bad: list[BadRecord] = []
        list(read([str(write(tmp_path / f"cut-{name}", packed[name][:-30]))], bad))
        assert "cannot be read to its end" in bad[0].reason


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_compression_bomb_stops_early(tmp_path: Path, kind: str) -> None:
    zstandard = pytest.importorskip("zstandard")
    header = tar_of({"a.txt": bytes(0)})[:512]
    packer = zlib.compressobj(9, wbits=31) if kind == "gz" else zstandard.ZstdCompressor(19).compressobj()
    body = packer.compress(_with_size(bytearray(header), b"77777777777\0"))
    body += b"".join(packer.compress(bytes(1 << 20)) for _ in range(120)) + packer.flush()
    assert len(body) < 1 << 18
    shard = write(tmp_path / f"bomb.tar.{kind}", body)
    bad: list[BadRecord] = []
    began = time.process_time()
    assert not list(read([str(shard)], bad))
    assert "unpacks to more than" in bad[0].reason
    assert time.process_time() - began < 10


def test_a_shell_is_never_asked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="would run a shell command"):
        list(read([f"pipe:touch {tmp_path}/x"]))
    assert not (tmp_path / "x").exists()


class Ranges(SimpleHTTPRequestHandler):
    """A file server that answers byte ranges."""

    def send_head(self):
        asked = self.headers.get("Range")
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return None
        content = path.read_bytes()
        first, last = 0, len(content) - 1
        if asked:
            low, high = asked.split("=")[1].split("-")
            first, last = int(low or 0), min(last, int(high or last))
        part = content[first : last + 1]
        self.server.asked.append(asked)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", '"1"')
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.end_headers()
        return io.BytesIO(part)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, ThreadingHTTPServer]]:
    from functools import partial

    pytest.importorskip("aiohttp")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=str(tmp_path))) as http:
        http.asked = []
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}", http
        http.shutdown()


@pytest.mark.parametrize("place", ["http", "memory"])
@pytest.mark.parametrize("workers", [0, 2])
def test_remote_shards_give_the_same_steps(config: Config, tmp_path: Path, server, place: str, workers: int) -> None:
    local = [str(write_tar(tmp_path / f"r-{i}.tar", pairs(10, i))) for i in range(2)]
    base = override(config, {"data": {"cache_dir": str(tmp_path / "cache"), "workers": workers}})
    words = Tokenizer.of(base)
    if place == "memory":
        for path in local:
            fsspec.filesystem("memory").pipe(f"/box/{Path(path).name}", Path(path).read_bytes())
        there = ["memory://box/r-*.tar"]
    else:
        there = [f"{server[0]}/r-{{0..1}}.tar"]
    expected = steps(Corpus(local, words, base), 0, 4, Position())
    found = steps(Corpus(there, words, base), 0, 4, Position())
    for a, b in zip(expected, found, strict=True):
        assert (a.micro[0].ids_BS == b.micro[0].ids_BS).all()
        assert (a.micro[0].patches_UP == b.micro[0].patches_UP).all()
        assert not b.bad
    if place == "http" and not workers:
        assert any(asked and asked != "bytes=0-0" for asked in server[1].asked), "samples come by range"


def test_globs_lists_and_braces(tmp_path: Path) -> None:
    names = [str(write_tar(tmp_path / f"g-{i}.tar", pairs(1))) for i in range(3)]
    assert store.expand([str(tmp_path / "g-*.tar")]) == names
    assert store.expand([str(tmp_path / "g-{2,0}.tar"), names[1]]) == [names[2], names[0], names[1]]
    with pytest.raises(FileNotFoundError, match="does not exist"):
        store.expand([str(tmp_path / "h-*.tar")])


def test_the_index_is_kept_and_renewed(config: Config, tmp_path: Path) -> None:
    shard = str(write_tar(tmp_path / "i.tar", pairs(3)))
    data, words = config.data, tokenizer()
    first = ensure(shard, words, data)
    assert [first.key(i) for i in range(3)] == ["0000", "0001", "0002"]
    stamp = Path(shard + ".mmgen-index").stat().st_mtime_ns
    assert ensure(shard, words, data).meta == first.meta
    assert Path(shard + ".mmgen-index").stat().st_mtime_ns == stamp, "written once"
    more = ensure(shard, Tokenizer(text_tokenizer(), [(2, 2)]), data)
    assert sum(name.startswith("tokens_s:") for name in more.columns()) == 2, "a column per tokenizer"
    assert find(shard, override(config, {"data": {"clean_captions": True}}).data) is None, "other settings, other index"
    write_tar(Path(shard), pairs(5))
    assert ensure(shard, words, data).count == 5, "a changed shard is indexed again"
    Path(shard + ".mmgen-index").write_bytes(b"cut")
    assert ensure(shard, words, data).count == 5
    import hashlib

    assert ensure(shard, words, data).meta.sha256 == hashlib.sha256(Path(shard).read_bytes()).hexdigest()


def test_an_index_goes_to_the_cache_where_the_place_is_read_only(config: Config, tmp_path: Path, monkeypatch) -> None:
    shard = str(write_tar(tmp_path / "i.tar", pairs(3)))
    data = override(config, {"data": {"cache_dir": str(tmp_path / "cache")}}).data
    (tmp_path / "i.tar.mmgen-index").mkdir()  # nothing can be renamed to it
    assert ensure(shard, tokenizer(), data).count == 3
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert find(shard, data)


def test_columns_are_what_the_samples_are(config: Config, tmp_path: Path) -> None:
    members = {**pairs(4), "t.txt": b"text alone"}
    shard = str(write_tar(tmp_path / "c.tar", members))
    index = ensure(shard, tokenizer(), config.data)
    found = list(read([shard]))
    assert [index.key(i) for i in range(index.count)] == [sample.key for sample in found]
    lengths = [
        len(tokenizer().encode(s.text)) if isinstance(s, Text) else 0 for sample in found for s in sample.segments
    ]
    (tokens,) = [index.column(name) for name in index.columns() if name.startswith("tokens_s")]
    assert tokens.tolist() == lengths
    assert index.column("height_s").max() == 6
    assert index.column("paired_n").tolist() == [1, 1, 1, 1, 0]
    content = Path(shard).read_bytes()
    assert all(content[o : o + n] == members[f"{index.key(i)}.{e}"] for i in range(5) for e, o, n in index.members(i))
    assert build(shard, tokenizer(), config.data) == Path(shard + ".mmgen-index").read_bytes(), "bytes repeat"


def test_interleaved_documents(config: Config, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    told = ["first", {"image": "a.png"}, {"text": "between"}, {"image": "k.b.png"}, "last"]
    members = {
        "k.json": json.dumps(told).encode(), "k.a.png": png(picture(rng)), "k.b.png": png(picture(rng, (6, 4))),
        "bad.json": json.dumps([{"image": "none.png"}]).encode(), "odd.json": b'[{"sound": "x"}]', "void.json": b"[]",
    }  # fmt: skip
    shard = str(write_tar(tmp_path / "k.tar", members))
    one = override(config, {"data": {"train": [shard], "caption_drop": 0.0, "row_length": 64}})
    corpus = Corpus(one.data.train, Tokenizer.of(one), one)
    assert {item.key for item in corpus.bad} == {"bad", "odd", "void"}
    batch = next(steps(corpus, 0, 1, Position())).micro[0]
    words = corpus.tokenizer
    ids = [
        i for i, document in zip(batch.ids_BS[0].tolist(), batch.document_BS[0].tolist(), strict=True) if document == 0
    ]
    boi, pad = words.boi, words.pad
    expected = [
        words.bos, *words.encode("first"), boi, words.size[2, 2], *[pad] * 4, words.eoi, *words.encode("between"),
        boi, words.size[3, 2], *[pad] * 6, words.eoi, *words.encode("last"), words.eos,
    ]  # fmt: skip
    assert ids == expected
    dropped = override(one, {"data": {"caption_drop": 1.0}})
    corpus = Corpus(dropped.data.train, words, dropped)
    kept = [i for i in next(steps(corpus, 0, 1, Position())).micro[0].ids_BS[0].tolist() if i not in words.special]
    assert words.decode(kept) == "last", "every text before an image is dropped"


def test_modes_and_orientation() -> None:
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 65536, (4, 4), dtype=np.uint16)
    deep = open_image(png(Image.fromarray(levels)))
    np.testing.assert_array_equal(np.asarray(flatten(deep, 1)), np.rint(levels / 257))
    clear = Image.fromarray(np.dstack([np.full((4, 4, 3), 200, np.uint8), np.array([[0, 85, 170, 255]] * 4, np.uint8)]))
    np.testing.assert_allclose(np.asarray(flatten(clear, 3))[0, :, 0], [255, 237, 218, 200], atol=1)
    inks = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    assert np.asarray(flatten(jpeg(inks), 3))[0, 0, 0] > 200, "red"
    sides = Image.fromarray(np.kron(np.array([[255, 0]], np.uint8), np.ones((32, 32), np.uint8)))  # left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    turned = jpeg(sides, exif=exif)
    assert image_size(Picture(turned.fp_data), LimitsConfig()) == (64, 32)
    shown = np.asarray(fit(turned, 1, [(64, 32)]))
    assert shown.shape == (64, 32)
    assert shown[:32].mean() > 200 > 50 > shown[32:].mean(), "what was left is above"


def jpeg(image: Image.Image, **options: object) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=95, **options)
    opened = open_image(buffer.getvalue())
    opened.fp_data = buffer.getvalue()  # type: ignore[attr-defined]
    return opened


def test_sizes_filters_and_crops() -> None:
    declared = [(16, 16), (32, 32), (16, 32), (32, 16)]
    sizes = np.array([[100, 100], [20, 20], [10, 10], [50, 100], [300, 100], [16, 32]])
    assert nearest_size(sizes, declared).tolist() == [1, 0, 0, 2, 3, 2]
    ramp = Image.fromarray(np.tile(np.arange(0, 256, 4, dtype=np.uint8), (32, 1)))  # 32 x 64
    left, middle = (np.asarray(fit(ramp, 1, [(16, 16)], "area", at)) for at in ((0.0, 0.0), (0.5, 0.5)))
    np.testing.assert_allclose(left[0], np.arange(0, 128, 4).reshape(-1, 2).mean(1), atol=1)
    np.testing.assert_allclose(middle[0].astype(int) - left[0], 64, atol=1)
    edge = Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 32, axis=0).repeat(32, axis=1))
    sharp, soft = (np.asarray(fit(edge, 1, [(16, 32)], name)) for name in ("lanczos", "area"))
    assert set(np.unique(soft)) == {0, 255} != set(np.unique(sharp)), "Lanczos rings at an edge"


def test_a_large_jpeg_is_decoded_small() -> None:
    from mmgen.image.resize import draft

    buffer = io.BytesIO()
    Image.fromarray(np.tile(np.linspace(0, 255, 2048).astype(np.uint8), (2048, 1))).save(buffer, format="JPEG")
    sizes = []
    image = open_image(buffer.getvalue(), None, lambda image: (draft(image, [(64, 64)]), sizes.append(image.size)))
    assert image.size == (256, 256)
    whole = fit(open_image(buffer.getvalue()), 1, [(64, 64)])
    assert np.abs(np.asarray(fit(image, 1, [(64, 64)])).astype(int) - np.asarray(whole)).mean() < 2


def test_captions_are_cleaned_where_asked(config: Config, tmp_path: Path) -> None:
    dirty = "  <b>A&amp;nbsp;red</b>\tfox\x00 https://x.org/a?b  &lt;i&gt;runs&lt;/i&gt; "
    assert clean(dirty) == "A red fox runs"
    shard = str(write_tar(tmp_path / "d.tar", {"a.txt": dirty.encode()}))
    assert [s.caption for s in read([shard])] == [dirty.strip()]
    assert [s.caption for s in read([shard], data=DataConfig(clean_captions=True))] == ["A red fox runs"]


def test_latents_are_read_safely() -> None:
    from safetensors.numpy import save

    latent = np.random.default_rng(0).standard_normal((4, 2, 3)).astype(np.float16)
    for data in (npy(latent), npy(np.asfortranarray(latent)), save({"latent": latent})):
        opened = open_stored(data)
        assert (opened.kind, opened.array.dtype) == ("latent", np.float32)
        np.testing.assert_array_equal(opened.array, latent.astype(np.float32))
    for wrong in (
        npy(latent[0]),
        npy(latent.astype(np.int32)),
        save({}),
        b"",
        b"\x93NUMPY\x09\x00",
        save({"latent": latent})[:-3],
    ):
        with pytest.raises(BadSample, match="latent|array cannot be read"):
            open_stored(wrong)


def test_webdatasets_reader_agrees(tmp_path: Path) -> None:
    """Keys and extensions are cut as webdataset cuts them."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    names = {"a/b.c/x.y.png": b"1", "a/b.c/x.txt": b"2", "Q.TXT": b"3", "dir.v1/noext": b"4", "z.seg.png": b"5"}
    shard = write_tar(tmp_path / "n.tar", names)
    with shard.open("rb") as file:
        theirs = [
            (group["__key__"], {k for k in group if not k.startswith("__")})
            for group in group_by_keys(tar_file_expander([{"url": "n", "stream": file}]))
        ]
    with shard.open("rb") as file:
        ours = [(group.key, {*group.members, *group.others}) for group in groups(file, LimitsConfig())]
    assert ours == theirs
    assert webdataset.__version__
