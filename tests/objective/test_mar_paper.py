"""What makes MAR more like its paper: time features, norm of the entry, cell in the head's condition, dropout, a config."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding

from mmgen.backbone import attention_mask
from mmgen.config import Config
from mmgen.config_io import load, override
from mmgen.flow.solvers import SOLVERS, adds_noise
from mmgen.generate.decoder import Decoder, Request
from mmgen.model import MMGenModel
from mmgen.objective import mar as mar_module
from mmgen.objective.image_flow import build_path
from mmgen.objective.layers import TimeEmbedding
from mmgen.parity import check_parity
from mmgen.sequence.document import TextSegment, Writer
from mmgen.train.loop import train
from tests.conftest import awake, packed
from tests.objective.test_mar import ORDERS, first_batch, mar

PAPER = {"head": {"width": 24, "time_features": 256, "cell": True}, "entry_norm": True}


def test_time_features_are_those_of_diffusers() -> None:
    """As many as the setting asks for, of the 1,000 steps of MAR's own code."""
    t = torch.linspace(0, 1, 7)
    embedding, found = TimeEmbedding(8, 256), []
    embedding.mlp[0].register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    embedding(t)
    torch.testing.assert_close(
        found[0], get_timestep_embedding(1000 * t, 256, downscale_freq_shift=0), atol=1e-4, rtol=0
    )


def test_an_odd_number_of_time_features_is_refused(config: Config) -> None:
    with pytest.raises(ValueError, match=r"objective\.mar\.head\.time_features"):
        mar(config, head={"time_features": 63})


def check_loss(config: Config, order: str) -> None:
    """The loss equals a loop over patches, whose condition has the cell of that patch, worked out here."""
    config = mar(config, order, **PAPER)
    model, tokenizer = awake(config)
    batch = first_batch(config, tokenizer, 1)
    objective, total = model.objective, 0.0
    with torch.no_grad():
        found = model(batch)
        inputs, embedded = model.embed(batch)
        hidden = model.hidden(inputs, batch.position_BS, attention_mask(batch.sites), batch.modality).flatten(0, 1)
        for j, (i, read) in enumerate(zip(batch.loss_at_J.tolist(), embedded.read_at_J.tolist(), strict=True)):
            cell, x = objective.head_place(batch.cell_I2[i]), batch.x_IP[i]
            state = F.linear(hidden[read] + cell, objective.head.state.weight, objective.head.state.bias)
            errors = [
                (objective.head(t * x + (1 - t) * eps, t, state) - (x - eps)).square().mean()
                for t, eps in zip(batch.draws["t"][i], batch.eps_JKP[j], strict=True)
            ]
            total += torch.stack(errors).mean()
    torch.testing.assert_close(found.image, total, rtol=1e-6, atol=0)


@pytest.mark.parametrize("order", ORDERS)
def test_the_head_knows_the_cell_of_its_patch(config: Config, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails if the cells are permuted."""
    check_loss(config, order)
    plain = mar_module.MARObjective._condition
    monkeypatch.setattr(
        mar_module.MARObjective, "_condition", lambda self, hidden, cell: plain(self, hidden, cell.roll(1, 0))
    )
    with pytest.raises(AssertionError, match="not close"):
        check_loss(config, order)


@pytest.mark.parametrize("order", ORDERS)
def test_the_norm_follows_patch_and_cell(config: Config, order: str) -> None:
    """Torch's layer norm of patch and cell embedding; mask vectors, and the cell of the next patch, are not normalised."""
    config = mar(config, order, **PAPER)
    model, tokenizer = awake(config)
    batch, objective = first_batch(config, tokenizer), model.objective
    values = model.embed(batch)[1].values
    place = objective.place(batch.cell_I2)
    normal = F.layer_norm(objective.enter(batch.x_IP) + place, (32,), objective.norm.weight, objective.norm.bias, 1e-6)
    masked = batch.draws["masked"] > 0
    if order == "masked":
        assert masked.any()
        assert not masked.all()
        torch.testing.assert_close(values[masked], objective.mask_vector + place[masked])
        torch.testing.assert_close(values[~masked], normal[~masked])
    else:
        last = torch.ones_like(batch.image_I, dtype=torch.bool)
        last[:-1] = batch.image_I[1:] != batch.image_I[:-1]
        torch.testing.assert_close(values[: len(last)][last], normal[last])
        following = objective.next_place(batch.cell_I2.roll(-1, 0))
        torch.testing.assert_close(values[: len(last)][~last], (normal + following)[~last])


@pytest.mark.parametrize("order", ORDERS)
def test_every_parameter_takes_part_without_images(config: Config, order: str) -> None:
    model, tokenizer = awake(mar(config, order, **PAPER))
    nothing = model.objective.layout.context((0, 0))
    strip = Writer(tokenizer, "shared").document([TextSegment(tokenizer.encode("words"))])
    batch = packed([[strip]], len(strip), tokenizer, nothing, model.patcher.patch_length, torch.float64, 4)
    losses = model(batch)
    (losses.text + losses.image).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.slow
def test_sampling_equals_training(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after saving and loading; and a decoder whose cells are permuted is seen."""
    config = mar(config, **PAPER)
    for report in check_parity(config):
        assert report.holds, report
    model, _ = awake(config, torch.float32)
    model.save_pretrained(tmp_path / "out")
    again = MMGenModel.from_pretrained(tmp_path / "out")
    assert again.objective.section == config.objective.mar
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    plain = mar_module.MARObjective._condition

    def permuted(self, hidden, cell):
        return plain(self, hidden, cell.flip(-1) if hidden.ndim == 4 else cell)  # four axes in the decoder only

    monkeypatch.setattr(mar_module.MARObjective, "_condition", permuted)
    reports = [report for report in check_parity(config) if report.variant.startswith("mar")]
    assert not any(report.holds for report in reports)


@pytest.mark.parametrize("backbone", [
    {"model_type": "qwen3", "extra": {"attention_dropout": 0.5}},
    {"model_type": "gpt_neox", "extra": {"hidden_dropout": 0.5, "attention_dropout": 0.0}},
    {"model_type": "gpt_neox", "extra": {"hidden_dropout": 0.0, "attention_dropout": 0.5}},
])  # fmt: skip
def test_dropout_acts_in_training_and_never_in_sampling(config: Config, backbone: dict) -> None:
    config = override(mar(config, **PAPER), {"model": {"backbone": backbone}})
    model, tokenizer = awake(config, torch.float32)
    batch = first_batch(config, tokenizer, 1).to("cpu", torch.float32)
    model.train()
    with torch.no_grad():
        assert not torch.equal(model(batch).image, model(batch).image)
    requests = [Request(["a"], "image", 1), Request(["b"], "text", 2)]
    first, second = (Decoder(model, tokenizer, config.sample).generate(requests) for _ in range(2))
    assert model.training, "the decoder restores the mode"
    assert first[0].images[0].tobytes() == second[0].images[0].tobytes()
    assert first[1].segments == second[1].segments
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(batch).image, model(batch).image)


def test_the_shipped_config_trains_and_draws(config: Config) -> None:
    """The settings of the paper, on a small model and the shards of this test."""
    paper = load("configs/digits_mar_paper.yaml")
    assert (paper.objective.path, paper.objective.prediction, paper.objective.loss_space) == ("cosine", "eps", "eps")
    assert (paper.sample.solver, paper.sample.steps, paper.sample.unmask_steps) == ("ancestral", 100, 64)
    section = paper.objective.mar
    assert (section.head.time_features, section.head.cell, section.entry_norm) == (256, True, True)
    extra = paper.model.backbone.extra
    assert (extra["attention_dropout"], extra["hidden_dropout"]) == (0.1, 0.1)
    backbone = {"model_type": paper.model.backbone.model_type, "extra": extra, "num_key_value_heads": 2}
    small = override(config, {
        "objective": paper.objective.model_dump(), "model": {"backbone": backbone},
        "sample": {**paper.sample.model_dump(), "steps": 10, "max_new_tokens": 4}, "data": {"row_length": 60},
        "train": {"steps": 3, "warmup_steps": 1, "save_every": 3},
    })  # fmt: skip
    assert train(small) == 0
    model, tokenizer = awake(small, torch.float32)
    batch = first_batch(small, tokenizer).to("cpu", torch.float32)
    losses = model(batch)
    (losses.text + losses.image).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    (result,) = Decoder(model, tokenizer, small.sample).generate([Request(["picture 1"], "image", 1)])
    assert result.images[0].size == (4, 4)


@pytest.mark.parametrize("solver", [name for name, kind in SOLVERS.items() if kind.from_noise])
def test_a_temperature_is_refused_or_changes_the_picture(config: Config, solver: str) -> None:
    falling = {"path": "ve", "prediction": "eps", "loss_space": "eps"} if solver == "annealed_langevin" else {}
    config = mar(config, shared=falling)
    model, tokenizer = awake(config)
    changes = {"solver": solver, "steps": 4, "unmask_steps": 2, "guidance_scale": 1.0}
    warm, cold = (
        override(config, {"sample": {**changes, "noise_temperature": temperature}}).sample for temperature in (1.0, 0.5)
    )
    request = [Request(["a"], "image", 1)]
    (drawn,) = Decoder(model, tokenizer, warm).generate(request)
    if not adds_noise(solver, torch.linspace(0, 1, 5), build_path(config.objective)):
        with pytest.raises(ValueError, match=rf"sample\.noise_temperature is 0\.5, but the solver '{solver}'"):
            Decoder(model, tokenizer, cold).generate(request)
    else:
        (other,) = Decoder(model, tokenizer, cold).generate(request)
        assert other.images[0].tobytes() != drawn.images[0].tobytes()


def test_a_temperature_acts_on_ddim_with_eta(config: Config) -> None:
    config = mar(config)
    model, tokenizer = awake(config)
    changes = {"solver": "ddim", "solver_options": {"eta": 1.0}, "steps": 4, "unmask_steps": 2, "guidance_scale": 1.0}
    drawn = [
        Decoder(model, tokenizer, override(config, {"sample": {**changes, "noise_temperature": temperature}}).sample)
        .generate([Request(["a"], "image", 1)])[0]
        .images[0]
        .tobytes()
        for temperature in (1.0, 0.5)
    ]
    assert drawn[0] != drawn[1]
