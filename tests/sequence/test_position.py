"""Positions of patches: shared, counted line by line, or with a row and a column."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, GPT2Config, LlamaConfig

from mmgen.backbone import add_axes
from mmgen.config import Config
from mmgen.config_io import override
from mmgen.image.patch import raster
from mmgen.model import MMGenConfig, MMGenModel
from mmgen.sequence.document import Block, ImageSegment, TextSegment, Writer
from mmgen.sequence.position import BITS, MASK, offsets, taken
from mmgen.sequence.tokenizer import Tokenizer
from tests.conftest import awake


def written(config: Config, positions: str) -> list[int]:
    tokenizer = Tokenizer.of(config)
    order = np.array([3, 0, 2, 5, 1, 4])
    blocks = [Block(order, {}), Block(np.arange(6), {})]
    image = ImageSegment(np.zeros((6, 12), np.float32), (3, 2), blocks)
    return Writer(tokenizer, positions).document([TextSegment([1, 2]), image, TextSegment([3])]).position


def test_positions_of_a_document(config: Config) -> None:
    # BOS, two tokens, BOI, size: 0 to 4. The image begins at 5.
    assert written(config, "shared") == [*range(5), *[5] * 12, 6, 7, 8]
    assert written(config, "raster") == [*range(5), 8, 5, 7, 10, 6, 9, *range(5, 11), 11, 12, 13]
    axial = np.array(written(config, "axial"))
    assert (axial & MASK).tolist() == written(config, "shared")
    rows, columns = axial >> BITS & MASK, axial >> 2 * BITS
    assert [*zip(rows[5:11], columns[5:11], strict=True)] == [(1, 1), (0, 0), (1, 0), (2, 1), (0, 1), (2, 0)]
    assert not rows[:5].any()
    assert not columns[-3:].any()


def test_offsets_of_any_grid() -> None:
    for grid in ((1, 1), (3, 5), (64, 64)):
        packed = offsets("axial", grid)
        assert np.array_equal(np.stack([packed >> BITS & MASK, packed >> 2 * BITS], 1), raster(grid))
        assert [taken(kind, grid) for kind in ("shared", "axial", "raster")] == [1, 1, grid[0] * grid[1]]


LLAMA = LlamaConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=16, vocab_size=9)
COHERE = CohereConfig(
    hidden_size=32,
    num_attention_heads=2,
    num_key_value_heads=2,
    num_hidden_layers=1,
    intermediate_size=16,
    vocab_size=9,
)


@pytest.mark.parametrize("settings", [LLAMA, COHERE], ids=["llama", "cohere"])
def test_axes_turn_pairs_of_the_decoder(settings: LlamaConfig | CohereConfig) -> None:
    """Scores depend on differences of position, row and column alone, and tokens keep the angles of the backbone."""
    decoder = AutoModelForCausalLM.from_config(settings).get_decoder()
    plain = decoder.rotary_emb
    add_axes(decoder, 100.0)
    rotary, apply = decoder.rotary_emb, __import__(type(decoder).__module__, fromlist=["x"]).apply_rotary_pos_emb
    x = torch.zeros(1, dtype=torch.float32)
    text = torch.arange(7)[None]
    for one, other in zip(rotary(x, text), plain(x, text), strict=True):
        torch.testing.assert_close(one, other)
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16)

    def score(at: tuple[int, int, int], to: tuple[int, int, int]) -> torch.Tensor:
        packed = torch.tensor([[s + (r << BITS) + (c << 2 * BITS) for s, r, c in (at, to)]])
        cos, sin = rotary(x, packed)
        turned = [apply(v.expand(1, 1, 2, 16), v.expand(1, 1, 2, 16), cos, sin)[0] for v in (q, k)]
        return (turned[0][0, 0, 0] * turned[1][0, 0, 1]).sum()

    base = score((4, 2, 1), (4, 0, 3))
    torch.testing.assert_close(score((9, 7, 5), (9, 5, 7)), base, rtol=1e-4, atol=1e-4)
    for other in (score((5, 2, 1), (4, 0, 3)), score((4, 3, 1), (4, 0, 3)), score((4, 2, 2), (4, 0, 3))):
        assert (other - base).abs() > 1e-3


def test_a_backbone_without_a_rotary_embedding_is_refused() -> None:
    decoder = AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=9)).get_decoder()
    with pytest.raises(
        ValueError, match=r"type 'gpt2' has no rotary embedding: set model.positions to raster or shared"
    ):
        add_axes(decoder, 100.0)


@pytest.mark.parametrize("positions", ["shared", "raster", "axial"])
def test_positions_are_saved_with_the_model(config: Config, positions: str, tmp_path) -> None:
    model, _ = awake(override(config, {"model": {"positions": positions}}), torch.float32)
    model.save_pretrained(tmp_path)
    again = MMGenModel.from_pretrained(tmp_path)
    assert (again.positions, again.config.position_base) == (positions, 100.0)
    assert again.state_dict().keys() == model.state_dict().keys()


def test_a_model_of_an_earlier_version_has_shared_positions() -> None:
    assert MMGenConfig().positions == "shared"
