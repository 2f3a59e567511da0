"""The model: visibility, gradients of all parameters, backbones, attention kernels, saving and loading."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from mmgen.backbone import _matmul_attention, attention, attention_mask
from mmgen.config import Config
from mmgen.config_io import override
from mmgen.model import MMGenConfig, MMGenModel
from mmgen.sequence.attention import dense_visible, flex_rule
from mmgen.sequence.batch import Batch
from mmgen.sequence.document import ImageSegment, TextSegment, Writer
from tests.conftest import awake, packed

RNG = np.random.default_rng(0)


def batch_of(model: MMGenModel, tokenizer, rows: list, length: int = 30, clean: bool = False) -> Batch:
    """A batch of rows of documents; a document is a list of texts (lists of ids) and images (grids), with random pixels."""
    objective, patch = model.objective, model.patcher.patch_length
    rng = np.random.default_rng(1)

    def segment(piece):
        if isinstance(piece, list):
            return TextSegment(piece)
        block = objective.layout.context(piece)
        if not clean:
            draws = {"t": np.full(len(block.order_N), 0.3, np.float32)}
            block = type(block)(block.order_N, draws, block.bidirectional, key=int(rng.integers(2**63)))
        return ImageSegment(rng.standard_normal((piece[0] * piece[1], patch)).astype(np.float32), piece, [block])

    strips = [[Writer(tokenizer, "shared").document([segment(piece) for piece in doc]) for doc in row] for row in rows]
    nothing = objective.layout.context((0, 0))
    dtype = model.get_input_embeddings().weight.dtype
    return packed(strips, length, tokenizer, nothing, patch, dtype)


ROWS = [[[[1, 2], (2, 2), [3]]], [[(3, 2), [4, 5]], [[6]]]]


@pytest.mark.parametrize("bidirectional", [True, False])
def test_a_change_reaches_exactly_the_visible_positions(config: Config, bidirectional: bool) -> None:
    """Change the input at each position: after two layers, exactly the positions that see it by the rule change."""
    model, tokenizer = awake(override(config, {"objective": {"bidirectional": bidirectional}}))
    batch = batch_of(model, tokenizer, ROWS, 24)
    inputs, _ = model.embed(batch)
    mask = attention_mask(batch.sites)
    base = model.hidden(inputs, batch.position_BS, mask, batch.modality)
    seen = dense_visible(batch.sites)
    reach = (seen.double() @ seen.double()) > 0  # two layers
    for k in range(24):
        moved = inputs.clone()
        moved[:, k] += 1.0
        changed = (model.hidden(moved, batch.position_BS, mask, batch.modality) - base).abs().amax(-1) > 1e-12
        assert torch.equal(changed, reach[:, :, k]), k


@pytest.mark.parametrize("rows", [ROWS, [[[[1, 2, 3]]]], [[[(2, 2)]]], [[]]], ids=["mixed", "text", "image", "empty"])
def test_every_parameter_has_a_gradient(config: Config, rows: list) -> None:
    """A parameter without a gradient would make sharded training abort or hang."""
    model, tokenizer = awake(config, torch.float32)
    model.train()
    losses = model(batch_of(model, tokenizer, rows))
    (losses.text + losses.image).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_other_documents_in_a_row_change_nothing(config: Config) -> None:
    """The loss of two documents packed into one row is the sum of their losses in separate rows."""
    model, tokenizer = awake(config)
    first, second = [[1, 2, 3], (2, 2), [9]], [(3, 2), [4, 5]]
    parts = [model(batch_of(model, tokenizer, [[doc]], 20, clean=True)).text for doc in (first, second)]
    whole = batch_of(model, tokenizer, [[first, second]], 40, clean=True)
    whole.x_IP[:4] = batch_of(model, tokenizer, [[first]], 20, clean=True).x_IP
    whole.x_IP[4:] = batch_of(model, tokenizer, [[second]], 20, clean=True).x_IP
    torch.testing.assert_close(parts[0] + parts[1], model(whole).text, rtol=1e-12, atol=1e-12)


def test_fresh_model_predicts_zero_patches(config: Config) -> None:
    """The output is initialised to zero, so the first image loss is the mean square of the target."""
    torch.manual_seed(0)
    model, tokenizer = awake(config)
    fresh = MMGenModel(model.config).double()
    batch = batch_of(fresh, tokenizer, ROWS)
    expected = (batch.x_IP[batch.loss_at_J] - batch.eps_JKP[:, 0]).square().mean(-1).sum()
    torch.testing.assert_close(fresh(batch).image, expected)


def test_save_and_load(config: Config, tmp_path: Path) -> None:
    model, _ = awake(config, torch.float32)
    model.save_pretrained(tmp_path / "out")
    again = MMGenModel.from_pretrained(tmp_path / "out")
    for (name, a), (other, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b), name


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neox"])
def test_any_decoder_is_a_backbone(config: Config, kind: str) -> None:
    changes = {"model": {"backbone": {"model_type": kind}}}
    model, tokenizer = awake(override(config, changes), torch.float32)
    losses = model(batch_of(model, tokenizer, ROWS))
    assert losses.text.isfinite()
    assert losses.image.isfinite()


@pytest.mark.parametrize("family", [LlamaConfig, Qwen3Config])
def test_a_pretrained_backbone_keeps_its_weights(config: Config, tmp_path: Path, family: type) -> None:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    source = AutoModelForCausalLM.from_config(family(vocab_size=50, head_dim=16, tie_word_embeddings=False, **sizes))
    source.bfloat16().save_pretrained(tmp_path / "hub")
    source.float()
    model, tokenizer = awake_pretrained(override(config, {"model": {"backbone": str(tmp_path / "hub")}}))
    ours, theirs = dict(model.backbone.named_parameters()), dict(source.named_parameters())
    for name, weight in theirs.items():
        assert torch.equal(ours[name][: len(weight)], weight), name
    assert len(ours["model.embed_tokens.weight"]) >= len(tokenizer)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert model(batch_of(model, tokenizer, ROWS)).image.isfinite()


def awake_pretrained(config: Config):
    from mmgen.model import build_model
    from mmgen.sequence.tokenizer import Tokenizer

    tokenizer = Tokenizer.of(config)
    return build_model(config, len(tokenizer)), tokenizer


def test_flex_attention_equals_dense_attention(config: Config) -> None:
    """The kernel for CUDA with its BlockMask, run forward on this device."""
    model, tokenizer = awake(config, torch.float32)
    batch = batch_of(model, tokenizer, ROWS, 32)
    B, S = batch.ids_BS.shape
    q, k, v = torch.randn(3, B, 2, S, 16).unbind(0)
    layer = model.backbone.get_decoder().layers[0].self_attn
    blocks = create_block_mask(flex_rule(batch.sites), B, None, S, S, device="cpu")
    for heads in (2, 1):
        flex, _ = attention(layer, q, k[:, :heads], v[:, :heads], blocks, 0.25)
        dense, _ = attention(layer, q, k[:, :heads], v[:, :heads], attention_mask(batch.sites), 0.25)
        torch.testing.assert_close(flex, dense, rtol=1e-5, atol=1e-5)
    causal = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25).transpose(1, 2)
    assert not torch.allclose(attention(layer, q, k, v, blocks, 0.25)[0], causal, atol=1e-3)


def test_compiled_attention_in_bf16_equals_attention(config: Config) -> None:
    model, tokenizer = awake(config, torch.float32)
    batch, layer = batch_of(model, tokenizer, ROWS, 32), model.backbone.get_decoder().layers[0].self_attn
    mask = attention_mask(batch.sites)
    shape = (len(batch.ids_BS), 4, batch.ids_BS.shape[1], 16)
    q, k, v = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    compiled = torch.compile(lambda *parts: attention(layer, *parts, mask, 0.25)[0], backend="eager")
    for heads in (4, 2, 1):
        exact, _ = attention(layer, q.float(), k[:, :heads].float(), v[:, :heads].float(), mask, 0.25)
        found = compiled(q, k[:, :heads], v[:, :heads]).float()
        assert torch.linalg.norm(found - exact) < 1e-2 * torch.linalg.norm(exact)
    shuffled, _ = attention(layer, q.float(), k.float(), v.float(), mask.roll(1, -1), 0.25)
    assert not torch.allclose(compiled(q, k, v).float(), shuffled, atol=0.1)


def test_sliding_windows_are_refused(config: Config) -> None:
    with pytest.raises(ValueError, match="sliding"):
        MMGenModel(MMGenConfig.of(override(config, {"model": {"backbone": {"model_type": "mistral"}}}), 300))
    extra = {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 8}
    with pytest.raises(ValueError, match="sliding"):
        MMGenModel(MMGenConfig.of(override(config, {"model": {"backbone": {"extra": extra}}}), 300))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": {"kind": "transfusoin"}}, "unknown objective.kind 'transfusoin', did you mean 'transfusion'"),
        ({"model": {"patcher": {"projection": "liner"}}}, "did you mean 'linear'"),
        ({"model": {"backbone": {"model_type": "qwen33"}}}, "unknown model.backbone.model_type 'qwen33'"),
        ({"model": {"backbone": "no/such-folder"}}, "cannot be loaded"),
    ],
)
def test_unknown_names_are_refused(config: Config, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MMGenModel(MMGenConfig.of(override(config, changes), 300))


def test_only_training_is_compiled(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        traced.append(len(graph.graph.nodes))
        return graph

    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: whole(function, backend=backend))
    model, tokenizer = awake(config, torch.float32)
    batch = batch_of(model, tokenizer, ROWS, 32)
    inputs, mask = model.embed(batch)[0], attention_mask(batch.sites)
    model.train()
    expected = model.hidden(inputs, batch.position_BS, mask, batch.modality)
    model.compile_backbone()
    torch.testing.assert_close(model.hidden(inputs, batch.position_BS, mask, batch.modality), expected)
    assert len(model.backbone.get_decoder().layers) > 1
    assert len(traced) == 1, "all layers share one compiled function"
    model.eval()
    torch.testing.assert_close(
        model.hidden(inputs[:1], batch.position_BS[:1], mask[:1], batch.modality[:1]), expected[:1]
    )
    assert len(traced) == 1


@pytest.mark.parametrize("half", [False, True])
def test_attention_dropout_is_applied_in_training_only(config: Config, half: bool) -> None:
    model, tokenizer = awake(
        override(config, {"model": {"backbone": {"extra": {"attention_dropout": 0.5}}}}), torch.float32
    )
    batch = batch_of(model, tokenizer, ROWS)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        assert torch.equal(model(batch).text, model(batch).text)
        clean = model(batch).text
        model.train()
        drawn = torch.stack([model(batch).text for _ in range(8)])
    assert len(drawn.unique()) == 8
    assert not torch.isclose(drawn, clean).any()


def test_dropped_attention_is_right_on_average() -> None:
    """Weights are scaled by 1 / (1 - p), in the fused kernel and in the two products (torch's dropout as the judge)."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 4, 8)
    mask = torch.zeros(1, 1, 4, 4)
    plain = attention(nn.Identity(), q, k, v, mask, 0.3)[0]
    for dropped in (
        lambda: attention(nn.Identity(), q, k, v, mask, 0.3, dropout=0.25)[0],
        lambda: _matmul_attention(q, k, v, mask, 0.3, 0.25).transpose(1, 2),
    ):
        mean = torch.stack([dropped() for _ in range(4000)]).mean(0)
        torch.testing.assert_close(mean, plain, rtol=0, atol=0.06)


def test_dropout_with_a_block_mask_is_refused(config: Config) -> None:
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 128, 128, device="cpu")
    q = torch.zeros(1, 1, 128, 16)
    with pytest.raises(ValueError, match="set attention_dropout to 0"):
        attention(nn.Identity(), q, q, q, mask, 1.0, dropout=0.1)
