"""Muon, compared with torch's, and its choice of parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from mmgen.config import Config
from mmgen.config_io import override
from mmgen.model import build_model
from mmgen.plan import plan
from mmgen.train.muon import hidden_matrices, orthogonal
from mmgen.train.optimizer import AveragingMuon, build_optimizer


@pytest.mark.parametrize("shape", [(8, 8), (4, 12), (12, 4), (3, 6, 5)])
def test_orthogonal_keeps_singular_vectors_and_evens_out_values(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    values = u.mT @ orthogonal(matrix) @ vh.mT
    diagonal = values.diagonal(dim1=-2, dim2=-1)
    assert (values - torch.diag_embed(diagonal)).abs().max() < 1e-9
    assert diagonal.min() > 0.3
    assert diagonal.max() < 1.3


def test_orthogonal_of_zeros_is_zero() -> None:
    assert torch.equal(orthogonal(torch.zeros(2, 3)), torch.zeros(2, 3))


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleList([nn.Linear(6, 10), nn.Linear(10, 6)])
        self.leave = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.leave(self.backbone[1](torch.tanh(self.backbone[0](x))))
        return out


def weight(layers: Layers, i: int) -> nn.Parameter:
    return layers.get_parameter(f"backbone.{i}.weight")


def test_the_optimiser_equals_torchs_muon_and_adamw() -> None:
    """torch's Muon iterates in bf16, so updates agree to about 1 %."""
    torch.manual_seed(0)
    ours, theirs = Layers(), Layers()
    theirs.load_state_dict(ours.state_dict())
    start = weight(ours, 0).detach().clone()
    settings = Config.model_validate({"train": {"optimizer": "muon", "weight_decay": 0.3, "lr": 0.01}}).train
    mine = build_optimizer(ours, settings)
    assert isinstance(mine, AveragingMuon)
    matrices = [weight(theirs, 0), weight(theirs, 1)]
    muon = torch.optim.Muon(matrices, lr=0.01, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    rest = [
        {"params": [theirs.leave.weight], "weight_decay": 0.3},
        {
            "params": [
                theirs.get_parameter("backbone.0.bias"),
                theirs.get_parameter("backbone.1.bias"),
                theirs.leave.bias,
            ],
            "weight_decay": 0.0,
        },
    ]
    adamw = torch.optim.AdamW(rest, lr=0.01, betas=settings.betas)
    for _ in range(20):
        x = torch.randn(16, 6)
        for model, optimizers in ((ours, (mine,)), (theirs, (muon, adamw))):
            model(x).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad()
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), p, rtol=0.03, atol=0.003)
    moved = (weight(ours, 0) - start).norm()
    assert (weight(ours, 0) - weight(theirs, 0)).norm() < 0.02 * moved


@pytest.mark.parametrize("kind", ["transfusion", "mar"])
def test_hidden_matrices_are_those_of_the_layers(config: Config, kind: str) -> None:
    config = override(config, {"objective": {"kind": kind}})
    model = build_model(config, 40)
    names = hidden_matrices(model)
    left = {name for name, p in model.named_parameters() if p.ndim >= 2} - names
    assert len([name for name in names if name.startswith("backbone.")]) == 7 * config.model.backbone.num_hidden_layers
    assert all(name.startswith("objective.") for name in left - {"backbone.model.embed_tokens.weight"})
    assert any("head.blocks" in name for name in names) == (kind == "mar")


def test_a_language_head_with_its_own_weights_is_not_hidden() -> None:
    settings = Qwen3Config(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=4,
        intermediate_size=16, tie_word_embeddings=False,
    )  # fmt: skip
    model = nn.ModuleDict({"backbone": Qwen3ForCausalLM(settings)})
    names = {name.rpartition("layers.0.")[2] for name in hidden_matrices(model)}
    attention = {f"self_attn.{part}_proj.weight" for part in "qkvo"}
    assert names == attention | {f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")}


def test_muon_refuses_shards() -> None:
    with pytest.raises(ValueError, match="optimizer muon needs zero_stage 0"):
        Config.model_validate({"train": {"optimizer": "muon", "zero_stage": 2}})


def test_the_plan_counts_the_moments_of_muon(config: Config) -> None:
    config = override(config, {"train": {"optimizer": "muon"}})
    planned = plan(config)
    optimizer = build_optimizer(build_model(config, planned.vocabulary), config.train)
    optimizer.create_state(1, [p for group in optimizer.param_groups for p in group["params"]])
    moments = [state[kind] for state in optimizer.state.values() for kind in ("exp_avg", "exp_avg_sq") if kind in state]
    assert planned.memory_moments_bytes == sum(4 * moment.numel() for moment in moments)
