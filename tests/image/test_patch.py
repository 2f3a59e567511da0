"""Patches of pixels and back, cell embeddings, projections and the tokenizer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmgen.config import PatcherConfig
from mmgen.image.patch import PixelPatcher, cut, raster
from mmgen.objective.layers import CellEmbedding, build_projection
from mmgen.sequence.tokenizer import Tokenizer
from tests.conftest import text_tokenizer


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 3]), st.integers(0, 10**6))
def test_round_trip_is_exact(rows: int, columns: int, side: int, channels: int, seed: int) -> None:
    size = (rows * side, columns * side)
    patcher = PixelPatcher(PatcherConfig(channels=channels, patch_size=side, image_sizes=[size]))
    values = np.random.default_rng(seed).integers(0, 256, (*size, channels), dtype=np.uint8)
    image = Image.fromarray(values.squeeze(-1) if channels == 1 else values)
    x_NP, grid = patcher.encode(image)
    assert grid == (rows, columns)
    assert patcher.decode(x_NP, grid).tobytes() == image.tobytes()


def test_patches_are_those_of_einops() -> None:
    pixels = np.random.default_rng(0).random((6, 8, 3)).astype(np.float32)
    rows, grid = cut(pixels, 2)
    np.testing.assert_array_equal(rows, rearrange(pixels, "(h p) (w q) c -> (h w) (p q c)", p=2, q=2))
    assert raster(grid)[5].tolist() == [1, 1]


def test_sizes_that_patches_do_not_divide() -> None:
    with pytest.raises(ValueError, match="not divisible"):
        cut(np.zeros((5, 4, 3), np.float32), 2)
    with pytest.raises(ValueError, match="image size 5x4 is not divisible by patch_size 2"):
        PatcherConfig(patch_size=2, image_sizes=[(5, 4)])
    with pytest.raises(ValueError, match="channels is 2"):
        PatcherConfig(channels=2)


def test_alpha_is_put_on_white() -> None:
    patcher = PixelPatcher(PatcherConfig(patch_size=2, image_sizes=[(2, 2)]))
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert patcher.fit(clear).getpixel((0, 0)) == (255, 255, 255)


def test_cell_embeddings_are_distinct_and_extend_to_any_grid() -> None:
    torch.manual_seed(0)
    embed = CellEmbedding(32)
    grid = torch.from_numpy(raster((40, 30)))
    embedded = embed(grid)
    assert embedded.shape == (1200, 32)
    assert torch.pdist(embedded).min() > 1e-3


@pytest.mark.parametrize("name", ["linear", "bottleneck"])
def test_projection_shapes(name: str) -> None:
    settings_ = PatcherConfig(patch_size=2, image_sizes=[(4, 4)], projection=name, bottleneck=5)
    projection = build_projection(settings_, 16)
    entry, exit_ = projection.entry(), projection.exit()
    entered, memory = entry.enter(torch.randn(7, 12), torch.rand(7), None)
    assert entered.shape == (7, 16)
    assert exit_.leave(entered, memory, torch.rand(7), None).shape == (7, 12)
    assert (name == "bottleneck") == (sum(p.numel() for p in entry.parameters()) == 12 * 5 + 5 * 16 + 16)


def test_tokenizer_round_trip(tmp_path) -> None:
    tokenizer = Tokenizer(text_tokenizer(), [(2, 2)])
    tokenizer.save(tmp_path / "t.json")
    again = Tokenizer.load(tmp_path / "t.json", [(2, 2)])
    assert again.encode("héllo") == tokenizer.encode("héllo")
    assert again.decode(again.encode("héllo ✓")) == "héllo ✓"
    assert (again.boi, again.size) == (tokenizer.boi, tokenizer.size)
    with pytest.raises(FileNotFoundError, match=r"data_prep\.tokenizer"):
        Tokenizer.load(tmp_path / "none.json", [])
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"not a tokenizer\.json"):
        Tokenizer.load(tmp_path / "bad.json", [])
