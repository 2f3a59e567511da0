"""Shards from untrusted sources: hostile members, remote stores, the index, and interleaved documents."""

from __future__ import annotations

import io
import json
import pickle
import resource
import struct
import threading
import zlib
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from mmgen.config import Config, DataConfig
from mmgen.config_io import override
from mmgen.data.loader import Corpus, steps
from mmgen.data.order import Position
from mmgen.data.shards import store
from mmgen.data.shards.index import build, ensure, find
from mmgen.data.shards.samples import (
    Text,
    clean,
    read,
)
from mmgen.sequence.tokenizer import Tokenizer
from tests.conftest import pairs, picture, png, text_tokenizer, write_tar
from tests.data.common import npy


def tokenizer() -> Tokenizer:
    return Tokenizer(text_tokenizer(), [(2, 2), (3, 2)])


def png_bomb(side: int) -> bytes:
    """A PNG whose header claims side x side black pixels, compressed a thousandfold."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    packer = zlib.compressobj(9)
    body = b"".join(packer.compress(bytes(side + 1)) for _ in range(min(side, 2000))) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def hostile() -> dict[str, bytes]:
    """Members with many faults; only the keys in `SOUND` make documents."""
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
        "pickled.npy": npy(np.array([Bomb()], dtype=object)), "pickled.txt": b"a pickle inside a npy file",
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
    """It causes no crash, writes nothing and takes little memory; each loss is reported, and the rest trains."""
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
    assert {item.key for item in corpus.bad} == keys - SOUND | {"good"}, "every loss is reported"
    reasons = {item.key: item.reason for item in corpus.bad}
    assert "400000000 pixels" in reasons["bomb"]
    assert "apart from the first" in reasons["good"]
    assert "Python objects" in reasons["pickled"]
    assert "not finite" in reasons["nan"]
    assert "without a caption" in reasons["alone"]
    assert set(tmp_path.rglob("*")) - before == {folder / "hostile.tar.mmgen-index"}
    assert not Path("/tmp/mmgen-was-here").exists()


def test_no_shell_command_is_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="would run a shell command"):
        list(read([f"pipe:touch {tmp_path}/x"]))
    assert not (tmp_path / "x").exists()


class Ranges(SimpleHTTPRequestHandler):
    """A file server with byte ranges."""

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


def test_an_index_is_written_to_the_cache_if_the_folder_is_read_only(
    config: Config, tmp_path: Path, monkeypatch
) -> None:
    shard = str(write_tar(tmp_path / "i.tar", pairs(3)))
    data = override(config, {"data": {"cache_dir": str(tmp_path / "cache")}}).data
    (tmp_path / "i.tar.mmgen-index").mkdir()  # nothing can be renamed to it
    assert ensure(shard, tokenizer(), data).count == 3
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert find(shard, data)


def test_columns_describe_the_samples(config: Config, tmp_path: Path) -> None:
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
    listed = ["first", {"image": "a.png"}, {"text": "between"}, {"image": "k.b.png"}, "last"]
    members = {
        "k.json": json.dumps(listed).encode(), "k.a.png": png(picture(rng)), "k.b.png": png(picture(rng, (6, 4))),
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
    assert not kept, "all text is dropped"


def test_captions_are_cleaned_if_set(config: Config, tmp_path: Path) -> None:
    dirty = "  <b>A&amp;nbsp;red</b>\tfox\x00 https://x.org/a?b  &lt;i&gt;runs&lt;/i&gt; "
    assert clean(dirty) == "A red fox runs"
    shard = str(write_tar(tmp_path / "d.tar", {"a.txt": dirty.encode()}))
    assert [s.caption for s in read([shard])] == [dirty.strip()]
    assert [s.caption for s in read([shard], data=DataConfig(clean_captions=True))] == ["A red fox runs"]
