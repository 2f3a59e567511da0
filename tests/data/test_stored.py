"""Precomputed arrays instead of images: their kinds, shards of codes, and patchers that accept them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from mmgen.config import Config
from mmgen.config_io import override
from mmgen.data.documents import DecodedImage
from mmgen.data.loader import Corpus, steps
from mmgen.data.order import Cursors, Position
from mmgen.data.shards import pictures
from mmgen.data.shards.index import IMAGE, TEXT, ensure
from mmgen.data.shards.pictures import STORED, StoredKind, maker_of, open_stored
from mmgen.data.shards.samples import BadSample, Picture
from mmgen.data.streams import StreamCorpus
from mmgen.image import latent
from mmgen.image.patch import Grid, Patcher, Patches
from mmgen.sequence.batch import prepare
from mmgen.sequence.tokenizer import Tokenizer
from tests.conftest import picture, png, tiny, write_tar


class CodePatcher(Patcher):
    """Accepts codes unchanged; a test double for a discrete tokenizer of images."""

    stored = "codes"

    def __init__(self, settings, device="cpu", facts=None) -> None:
        super().__init__(settings)

    @property
    def ready(self) -> Patches:
        return Patches(1, np.int64)

    def encode_stored(self, stored: np.ndarray) -> tuple[np.ndarray, Grid]:
        if stored.max() >= 2**40:
            raise ValueError("a code is not in the codebook")
        return stored.reshape(-1, 1), stored.shape

    def encode_pixels(self, pixels_MNL: torch.Tensor, grid: Grid) -> torch.Tensor:
        raise AssertionError("codes need no encoder")

    def pictures(self, x_RNP, grid):
        raise AssertionError


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def codes() -> dict[str, np.ndarray]:
    """Codes that float32 cannot represent exactly."""
    rng = np.random.default_rng(0)
    shapes = {"a": (2, 2), "b": (3, 2), "c": (2, 2), "d.0": (2, 2), "d.1": (3, 2)}
    return {key: 2**30 + rng.integers(0, 1000, shape, dtype=np.int64) for key, shape in shapes.items()}


def members() -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    arrays = codes()
    for key in "abc":
        array = arrays[key].astype(np.int32) if key == "a" else arrays[key]
        content = save({"codes": array}, {"image_tokenizer": "1234"}) if key != "b" else npy(array)
        found[f"{key}.{'npy' if key == 'b' else 'safetensors'}"] = content
        found[f"{key}.txt"] = f"codes {key}".encode()
    found["d.json"] = json.dumps([{"image": "0.npy", "learn": False}, "then", {"image": "1.npy"}]).encode()
    return {**found, "d.0.npy": npy(arrays["d.0"]), "d.1.npy": npy(arrays["d.1"])}


@pytest.fixture
def coded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setitem(latent.PATCHERS, "codes", CodePatcher)
    shard = str(write_tar(tmp_path / "codes.tar", members()))
    config = tiny(tmp_path, data={"train": [shard], "caption_drop": 0.0, "image_first": 0.0})
    patcher = {"kind": "codes", "patch_size": 1, "vae": {"channels": 1, "factor": 2}}
    return override(config, {"model": {"patcher": patcher}})


def words(config: Config) -> Tokenizer:
    return Tokenizer.load(config.data.tokenizer, config.model.patcher.grids)


def test_codes_are_indexed_and_read_back(coded: Config) -> None:
    shard = coded.data.train[0]
    assert isinstance(shard, str)
    index = ensure(shard, words(coded), coded.data)
    number = STORED["codes"].number
    assert index.column("kind_s").tolist() == [TEXT, number] * 3 + [number, TEXT, number]
    sizes = list(zip(index.column("height_s").tolist(), index.column("width_s").tolist(), strict=True))
    assert sizes == [(0, 0), (2, 2), (0, 0), (3, 2), (0, 0), (2, 2), (2, 2), (0, 0), (3, 2)]
    assert (index.meta.pictures, index.meta.stored) == (0, {"codes": ["", "1234"]})
    corpus, arrays = Corpus(coded.data.train, words(coded), coded), codes()
    assert not corpus.bad
    found = [s for i in range(4) for s in corpus.decoded(0, i).segments if isinstance(s, DecodedImage)]
    for image, array in zip(found, arrays.values(), strict=True):
        assert image.x_NP.dtype == np.int64
        assert image.grid == array.shape
        np.testing.assert_array_equal(image.x_NP, array.reshape(-1, 1))
    assert [image.learn for image in found] == [True, True, True, False, True]


def test_codes_reach_the_batch_unchanged(coded: Config) -> None:
    corpus, arrays = Corpus(coded.data.train, words(coded), coded), codes()
    wanted = sorted(tuple(array.ravel().tolist()) for array in arrays.values())
    seen: list[tuple[int, ...]] = []
    for row in corpus.plan.epoch_rows(0):
        raw = corpus.step(0, [row], Position()).micro[0]
        batch = prepare(raw, corpus.patcher, dtype=torch.float64)
        assert raw.patches_UP.dtype == batch.x_IP.dtype == torch.int64
        assert batch.x_IP.shape[1] == 1
        seen += [tuple(batch.x_IP[batch.image_I == n, 0].tolist()) for n in batch.image_I.unique()]
    assert sorted(seen) == wanted
    empty = corpus.batch([[]])
    assert (empty.patches_UP.dtype, tuple(empty.patches_UP.shape)) == (torch.int64, (0, 1))


def test_codes_are_refused_by_other_patchers(coded: Config, tmp_path: Path) -> None:
    pixels = override(coded, {"model": {"patcher": {"kind": "pixels", "patch_size": 2}}})
    with pytest.raises(
        ValueError, match=r"codes\.tar holds codes, but model.patcher.kind is pixels: name shards of im"
    ):
        Corpus(pixels.data.train, words(pixels), pixels)
    vae = override(coded, {"model": {"patcher": {"kind": "vae", "vae": {"name": "nowhere"}}}})
    with pytest.raises(ValueError, match=r"holds codes, but model.patcher.kind is vae: name shards of latents"):
        Corpus(vae.data.train, words(vae), vae)
    latents = str(write_tar(tmp_path / "l.tar", {"a.npy": npy(np.zeros((1, 2, 2), np.float32)), "a.txt": b"a"}))
    with pytest.raises(
        ValueError, match=r"holds latents, but model.patcher.kind is codes: set it to vae, or name shards"
    ):
        Corpus([latents], words(coded), coded)
    images = write_tar(tmp_path / "i.tar", {"a.png": png(picture(np.random.default_rng(0))), "a.txt": b"a"})
    with pytest.raises(ValueError, match="holds codes, but .* holds images: name shards of one kind"):
        Corpus([*coded.data.train, str(images)], words(coded), coded)
    random = override(coded, {"data": {"crop": "random"}})
    with pytest.raises(ValueError, match="stored codes have one crop"):
        Corpus(random.data.train, words(random), random)


def test_codes_that_do_not_fit_are_bad_samples(coded: Config, tmp_path: Path) -> None:
    arrays = {"flat": np.arange(4), "huge": np.full((2, 2), 2**41), "odd": np.zeros((5, 2), np.int64),
              "negative": np.full((2, 2), -1), "unsigned": np.full((2, 2), 2**64 - 1, np.uint64),
              "good": np.zeros((2, 2), np.uint8)}  # fmt: skip
    content: dict[str, bytes] = {}
    for key, array in arrays.items():
        content |= {f"{key}.npy": npy(array), f"{key}.txt": b"x"}
    corpus = Corpus([str(write_tar(tmp_path / "wrong.tar", content))], words(coded), coded)
    reasons = {bad.key: bad.reason for bad in corpus.bad}
    for i in range(len(corpus.samples)):
        try:
            corpus.decoded(0, i)
        except BadSample as error:
            reasons[corpus.dataset.name(i)[1]] = str(error)
    assert reasons.keys() == arrays.keys() - {"good"}
    assert "none of: floating point [channels, height, width] (latent), integers [height, width]" in reasons["flat"]
    assert "not in the codebook" in reasons["huge"]
    assert "represents an image of 10x4 pixels, which model.patcher.image_sizes does not declare" in reasons["odd"]
    assert "negative" in reasons["negative"]
    assert "too large" in reasons["unsigned"]


def test_streams_refuse_arrays(coded: Config) -> None:
    streamed = override(coded, {"data": {"streams": 1}})
    with pytest.raises(
        ValueError,
        match="finds no usable sample in its shards: the last bad one is codes.tar/d: .*read only through an index",
    ):
        next(steps(StreamCorpus(streamed.data.train, words(streamed), streamed), 0, 1, Cursors()))


def test_a_kind_is_one_entry_of_the_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A further kind of array needs one entry in the registry and no other change."""
    depth = StoredKind(
        number=7, plural="depth maps", form="one-byte integers [1, height, width]",
        matches=lambda array: array.ndim == 3 and array.dtype == np.uint8,
        dtype=np.uint8, cell_pixels=lambda patcher: 1, maker="camera",
    )  # fmt: skip
    content = save({"x": np.ones((1, 4, 4), np.uint8)}, {"camera": "left"})
    with pytest.raises(BadSample, match="none of"):
        open_stored(content)
    monkeypatch.setitem(pictures.STORED, "depth", depth)
    opened = open_stored(content)
    assert (opened.kind, opened.size) == ("depth", (4, 4))
    assert maker_of(Picture(content, stored=True), "depth") == "left"
    shard = str(write_tar(tmp_path / "depth.tar", {"a.safetensors": content, "a.txt": b"a"}))
    config = tiny(tmp_path, data={"train": [shard]})
    index = ensure(shard, words(config), config.data)
    assert index.column("kind_s").tolist() == [TEXT, 7]
    assert index.meta.stored == {"depth": ["left"]}
    with pytest.raises(ValueError, match="holds depth maps, but model.patcher.kind is pixels"):
        Corpus([shard], words(config), config)
    assert {TEXT, IMAGE}.isdisjoint(kind.number for kind in STORED.values())
