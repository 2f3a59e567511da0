"""Reading archives that may be damaged or hostile: members, truncation, headers, mutations."""

from __future__ import annotations

import gzip
import io
import re
import tarfile
import time
import zlib
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from mmgen.config import Config, DataConfig, LimitsConfig
from mmgen.config_io import override
from mmgen.data.loader import Corpus
from mmgen.data.shards.pictures import image_size
from mmgen.data.shards.samples import (
    BadRecord,
    BadSample,
    Picture,
    groups,
    parse,
    read,
)
from mmgen.data.shards.tar import Damaged, Member, members
from mmgen.sequence.tokenizer import Tokenizer
from tests.conftest import pairs, write_tar
from tests.data.common import tar_of, with_size, write

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def everything(name: str) -> bool:
    return True


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
def test_members_equal_those_of_tarfile(names: dict[str, bytes], form: str) -> None:
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
    """At any cut, the samples before it are read, and the loss is reported once."""
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


def damaged(content: bytes) -> str:
    with pytest.raises(Damaged) as error:
        listed(content)
    return str(error.value)


def test_damaged_headers_are_named() -> None:
    whole = bytearray(tar_of({"a.txt": b"1", "b.txt": b"2"}))
    assert damaged(b"PK\3\4" + bytes(600)) == "no tar header at byte 0"
    assert "no tar header at byte 1024" in damaged(bytes(whole[:1024] + b"\xff" * 512 + whole[1024:]))
    assert "after the end mark" in damaged(bytes(whole) + bytes(whole))
    assert "not octal" in damaged(with_size(whole, b"99999999999\0"))
    assert "negative" in damaged(with_size(whole, b"\xff" * 12))
    assert "ends inside a.txt" in damaged(with_size(whole, b"77777777777\0"))
    assert "ends inside a.txt" in damaged(with_size(whole, b"\x80" + b"\x7f" * 11))
    huge = bytearray(tar_of({"x" * 200: b"1"}, tarfile.GNU_FORMAT))
    assert "extended header of" in damaged(with_size(huge, b"77777777777\0"))
    bad_pax = tar_of({"é" * 80: b"1"}, tarfile.PAX_FORMAT).replace(b" path=", b" path ")
    assert "not made of records" in damaged(bad_pax)
    short = re.sub(rb"\d{3} path=", b"001 path=", tar_of({"é" * 80: b"1"}, tarfile.PAX_FORMAT))
    assert "not made of records" in damaged(short)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_mutated_archive_never_breaks_the_reader(data: st.DataObject) -> None:
    """For any change of bytes, the reader returns samples, reported losses, or both."""
    form = data.draw(st.sampled_from(sorted(FORMATS)))
    members = {**pairs(2), "long" * (20 if form == "ustar" else 60) + ".txt": b"text"}
    content = bytearray(tar_of(members, FORMATS[form]))
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + 1] = data.draw(st.binary(max_size=3))
        if not content:
            break
    assert survive(bytes(content)) <= len(members), "a change may lose or split samples, but not add members"


def survive(content: bytes) -> int:
    """Number of samples that are read; only `Damaged` and `BadSample` are caught."""
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
    body = packer.compress(with_size(bytearray(header), b"77777777777\0"))
    body += b"".join(packer.compress(bytes(1 << 20)) for _ in range(120)) + packer.flush()
    assert len(body) < 1 << 18
    shard = write(tmp_path / f"bomb.tar.{kind}", body)
    bad: list[BadRecord] = []
    began = time.process_time()
    assert not list(read([str(shard)], bad))
    assert "unpacks to more than" in bad[0].reason
    assert time.process_time() - began < 10


def test_keys_agree_with_the_webdataset_reader(tmp_path: Path) -> None:
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
