"""Pictures of any origin are read upright and in the right colours; sizes are proposed from the index."""

from __future__ import annotations

import io
import json
import math
import struct
import zlib
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from mmgen.config import Config, LimitsConfig
from mmgen.config_io import override
from mmgen.data.loader import Corpus, steps
from mmgen.data.order import Position
from mmgen.data.shards.index import SUFFIX
from mmgen.data.shards.pictures import image_size, open_image
from mmgen.data.shards.samples import Picture
from mmgen.data.tools.sizes import candidates, choose_sizes, kept, propose
from mmgen.image.resize import fit, orientation
from mmgen.sequence.tokenizer import Tokenizer
from tests.conftest import run, write_tar


def encoded(image: Image.Image, form: str, turned: int) -> bytes:
    """An image file with the EXIF orientation `turned`."""
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = turned
    options = {"PNG": {}, "WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}[form]
    image.save(buffer, format=form, exif=exif, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("turned", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG"])
def test_every_orientation_of_every_format(form: str, turned: int) -> None:
    """The oracle is Pillow's own transposition, for the header and for the pixels."""
    ramp = np.add.outer(np.arange(24) * 4, np.arange(16) * 8).astype(np.uint8)
    image = Image.fromarray(np.dstack([ramp, ramp[::-1], np.full_like(ramp, 90)]))
    data = encoded(image, form, turned)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert image_size(Picture(data), LimitsConfig()) == (upright.height, upright.width)
    shown = fit(open_image(data), 3, [(24, 16), (16, 24)])
    np.testing.assert_array_equal(np.asarray(shown), np.asarray(upright.convert("RGB")))
    assert orientation(shown) == 1, "an upright image is not turned again"
    if turned > 1:
        assert not np.array_equal(np.asarray(shown), np.asarray(image)), "ignoring EXIF must change the result"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_an_orientation_after_the_pixels_of_a_png_is_ignored() -> None:
    """The index reads headers alone, so the decoder must not read another size later."""
    tall = Image.fromarray(np.arange(24 * 16, dtype=np.uint16).reshape(24, 16).astype(np.uint8))
    data = encoded(tall, "PNG", 6)
    start = data.index(b"eXIf") - 4
    size = struct.unpack(">I", data[start : start + 4])[0] + 12
    exif, rest = data[start : start + size], data[:start] + data[start + size :]
    late = rest[:-12] + exif + rest[-12:]
    assert Image.open(io.BytesIO(late)).getexif()[0x0112] == 6, "Pillow reads it"
    assert image_size(Picture(late), LimitsConfig()) == (24, 16)
    assert fit(open_image(late), 1, [(24, 16), (16, 24)]).size == (16, 24)


@pytest.mark.parametrize("wrong", [0, 9, 65535])
def test_an_orientation_out_of_range_is_ignored(wrong: int) -> None:
    image = Image.new("RGB", (4, 6))
    for form in ("PNG", "WEBP", "JPEG"):
        assert image_size(Picture(encoded(image, form, wrong)), LimitsConfig()) == (6, 4)


def test_an_orientation_of_another_type_is_ignored() -> None:
    exif = b"MM\x00\x2a\x00\x00\x00\x08\x00\x01" + struct.pack(">HHI4s", 0x0112, 2, 3, b"ab\x00\x00") + bytes(4)
    buffer = io.BytesIO()
    Image.new("RGB", (4, 6)).save(buffer, format="PNG", exif=exif)
    assert Image.open(io.BytesIO(buffer.getvalue())).getexif()[0x0112] == "ab"
    assert image_size(Picture(buffer.getvalue()), LimitsConfig()) == (6, 4)


def test_cmyk_becomes_rgb() -> None:
    """A CMYK JPEG, stored inverted as Adobe does: R = (255 - C)(255 - K) / 255."""
    inks = [(0, 0, 0, 0), (255, 0, 0, 0), (0, 255, 0, 0), (0, 0, 255, 0), (0, 0, 0, 255), (64, 128, 32, 80)]
    for ink in inks:
        buffer = io.BytesIO()
        Image.new("CMYK", (16, 16), ink).save(buffer, format="JPEG", quality=100)
        assert b"Adobe" in buffer.getvalue()
        shown = np.asarray(fit(open_image(buffer.getvalue()), 3, [(16, 16)]))[8, 8]
        expected = [(255 - c) * (255 - ink[3]) / 255 for c in ink[:3]]
        np.testing.assert_allclose(shown, expected, atol=3)


@pytest.mark.parametrize("turned", [1, 6])
def test_sixteen_bits_are_scaled_and_turned(turned: int) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (24, 16), dtype=np.uint16)
    data = encoded(Image.fromarray(values), "PNG", turned)
    assert open_image(data).mode == "I;16"
    shown = np.asarray(fit(open_image(data), 1, [(24, 16), (16, 24)]))
    np.testing.assert_array_equal(shown, np.rint((np.rot90(values, -1) if turned == 6 else values) / 257))
    colours = np.asarray(fit(open_image(data), 3, [(24, 16), (16, 24)]))
    assert (colours == shown[..., None]).all()


def test_deep_colours_and_greys_with_alpha() -> None:
    """16-bit RGB and grey with alpha, written byte by byte, without Pillow's writer."""
    rng = np.random.default_rng(1)
    for kind, channels in ((2, 3), (4, 2), (6, 4)):
        values = rng.integers(0, 65536, (6, 4, channels), dtype=np.uint16)
        if channels in (2, 4):
            values[..., -1] = 65535
        lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 6, 16, kind, 0, 0, 0))
        data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
        shown = np.asarray(fit(open_image(data), 3, [(6, 4)])).astype(float)
        colours = values[..., :1].repeat(3, axis=2) if channels == 2 else values[..., :3]
        np.testing.assert_allclose(shown, colours / 257, atol=1.01)


def test_turned_pictures_train(config: Config, tmp_path: Path) -> None:
    """Index and decoder agree on the patch grid, so no sample is quarantined."""
    rng, members = np.random.default_rng(0), {}
    for i in range(16):
        image = Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8))
        form = ("PNG", "WEBP", "JPEG")[i % 3]
        members[f"{i:03d}.{form.lower()}"] = encoded(image, form, 1 + i % 8)
        members[f"{i:03d}.txt"] = b"a picture"
    shard = str(write_tar(tmp_path / "turned.tar", members))
    two = override(config, {"data": {"train": [shard]}, "model": {"patcher": {"image_sizes": [[4, 6], [6, 4]]}}})
    words = Tokenizer.of(two)
    corpus = Corpus([shard], words, two)
    grids = Counter(tuple(corpus.dataset.grids_of(i)[0]) for i in range(16))
    assert grids == {(2, 3): 8, (3, 2): 8}
    assert not [bad for step in steps(corpus, 0, 6, Position()) for bad in step.bad]


def brute_force(counts: Counter[tuple[int, int]], pixels: int, patch: int, most: int) -> float:
    """Smallest loss over every choice of candidates, with the cropping of training."""
    sizes, weights = np.array(list(counts)), np.array(list(counts.values()))
    offered = candidates(pixels, patch)
    choices = [choice for n in range(1, most + 1) for choice in combinations(offered, n)]
    return min(float(((1 - kept(sizes, choice)) * weights).sum()) for choice in choices)


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_equals_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(20, 400, (40, 2))
    counts = Counter({(int(h), int(w)): int(n) for (h, w), n in zip(sizes, rng.integers(1, 30, 40), strict=True)})
    for most in (1, 2, 3):
        chosen = choose_sizes(counts, 64 * 64, 16, most)
        weights = np.array(list(counts.values()))
        loss = float(((1 - kept(np.array(list(counts)), chosen)) * weights).sum())
        assert len(chosen) <= most
        assert loss == pytest.approx(brute_force(counts, 64 * 64, 16, most), abs=1e-9)


def test_candidates_are_as_large_as_the_area_allows() -> None:
    offered = candidates(256 * 256, 16)
    assert (256, 256) in offered
    assert len(set(offered)) == len(offered)
    for height, width in offered:
        assert height % 16 == width % 16 == 0
        assert height * width <= 256 * 256
        assert max(height, width) <= 4 * min(height, width)
        assert (height + 16) * width > 256 * 256 or height * (width + 16) > 256 * 256
    assert sorted((w, h) for h, w in offered) == sorted(offered)
    with pytest.raises(ValueError, match="hold no patch of 16x16: raise --pixels"):
        candidates(100, 16)


def test_sizes_that_do_not_help_are_not_proposed() -> None:
    square, wide = Counter({(50, 50): 3}), Counter({(50, 50): 3, (40, 80): 5})
    assert choose_sizes(square, 64 * 64, 16, 5) == [(64, 64)]
    assert len(choose_sizes(wide, 64 * 64, 8, 5)) == 2


def test_sizes_are_proposed_from_the_index(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members: dict[str, bytes] = {}
    for i, (height, width) in enumerate([(64, 64)] * 5 + [(32, 96)] * 3 + [(90, 60)] * 2):
        buffer = io.BytesIO()
        Image.new("RGB", (width, height)).save(buffer, format="PNG")
        members |= {f"{i:02d}.png": buffer.getvalue(), f"{i:02d}.txt": b"a"}
    members["10.txt"] = b"only text"
    shard = str(write_tar(tmp_path / "sizes.tar", members))
    found = propose([shard], Tokenizer.of(config), config, 3, (16, 16))
    assert found.images == 10
    ratios = [math.log(h / w) for h, w in found.image_sizes]
    assert len(ratios) == 3
    assert sorted(found.shares) == [0.2, 0.3, 0.5]
    assert 0.9 < found.area_kept <= 1
    assert found.area_kept_now < found.area_kept
    assert found.enlarged == 0
    assert Path(shard + SUFFIX).exists()
    words = ["data", "buckets", shard, "--n", 3, "--data.tokenizer", config.data.tokenizer]
    code, out, _ = run(capsys, *words, "--pixels", "64x64", "--json")
    assert (code, json.loads(out)["images"]) == (0, 10)
    code, _, error = run(capsys, *words, "--pixels", 64)
    assert code == 2
    assert "is not a height and a width such as 256x256" in error
