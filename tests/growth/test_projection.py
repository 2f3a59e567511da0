"""Adding a patch projection: one class for all objectives, and one line of the registry."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mmgen.config import Config
from mmgen.config_io import override
from mmgen.data.loader import Corpus
from mmgen.generate.decoder import Decoder, Request
from mmgen.model import build_model
from mmgen.objective import layers
from mmgen.objective.layers import PatchEntry, PatchExit, PatchProjection
from mmgen.sequence.batch import Cells
from mmgen.sequence.tokenizer import Tokenizer
from tests.conftest import ready


def over_grids(layer: nn.Module, rows_IC: Tensor, cells: Cells) -> Tensor:
    """A convolution [1, C, h, w] to [1, C', h, w] over the patch grid of each image."""
    out = []
    for image in cells.image_I.unique():
        mine = cells.image_I == image
        height, width = (cells.cell_I2[mine].amax(0) + 1).tolist()
        out.append(layer(rows_IC[mine].T.reshape(1, -1, height, width))[0].flatten(1).T)
    nothing = layer(rows_IC.new_zeros(1, rows_IC.shape[1], 1, 1))[0].flatten(1).T[:0]
    return torch.cat([*out, nothing])


class Down(PatchEntry):
    mixes = True

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(length, width, 3, padding=1)

    def enter(self, x_IP: Tensor, t_I: Tensor, cells: Cells) -> tuple[Tensor, Tensor | None]:
        entered = over_grids(self.conv, x_IP, cells)
        return entered, entered


class Up(PatchExit):
    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2 * width, length, 3, padding=1)

    def leave(self, hidden_ID: Tensor, memory: Tensor | None, t_I: Tensor, cells: Cells) -> Tensor:
        return over_grids(self.conv, torch.cat([hidden_ID, memory], 1), cells)


class Woven(PatchProjection):
    """A convolution over the patch grid of each image, with a skip connection around the backbone."""

    def entry(self) -> PatchEntry:
        return Down(self.settings.patch_length, self.width)

    def exit(self) -> PatchExit:
        return Up(self.settings.patch_length, self.width)


def woven(config: Config, monkeypatch: pytest.MonkeyPatch, objective: dict) -> Config:
    monkeypatch.setitem(layers.PROJECTIONS, "woven", Woven)
    return override(config, {"objective": objective, "model": {"patcher": {"projection": "woven"}}})


@pytest.mark.parametrize("objective", [{"kind": "transfusion"}, {"kind": "mar"}], ids=["transfusion", "mar"])
def test_one_class_serves_both_objectives(config: Config, monkeypatch: pytest.MonkeyPatch, objective: dict) -> None:
    """The loss falls, every parameter has a gradient, and images of two sizes are drawn."""
    config = woven(config, monkeypatch, objective)
    tokenizer = Tokenizer.of(config)
    torch.manual_seed(0)
    model = build_model(config, len(tokenizer))
    corpus = Corpus(config.data.train, tokenizer, config)
    rows = [row for row, _ in zip(corpus.plan.epoch_rows(0), range(4), strict=False)]
    batch = ready(corpus, corpus.step(1, rows, corpus.start).micro[0])
    optimizer, history = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(30):
        losses = model(batch)
        image = losses.image / losses.image_count
        (losses.text / losses.text_count + image).backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        history.append(image.item())
    assert history[-1] < 0.9 * history[0]
    requests = [Request(["picture 1"], "image", 1), Request(["picture 2"], "image", 2, (3, 2))]
    results = Decoder(model, tokenizer, config.sample).generate(requests)
    assert [result.images[0].size for result in results] == [(4, 4), (4, 6)]


def test_masked_patches_do_not_leak_through_a_projection_that_mixes(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The convolution must not carry masked patches to the inputs of their neighbours."""
    config = woven(config, monkeypatch, {"kind": "mar"})
    tokenizer = Tokenizer.of(config)
    model = build_model(config, len(tokenizer))
    corpus = Corpus(config.data.train, tokenizer, config)
    batch = ready(corpus, corpus.step(1, [next(corpus.plan.epoch_rows(0))], corpus.start).micro[0])
    masked = batch.draws["masked"] > 0
    noised = batch.noised_BS.flatten()[batch.at_I]
    before = model.objective.embed(batch).values
    batch.x_IP[masked] += 100
    after = model.objective.embed(batch).values
    assert masked.any()
    assert torch.equal(before[noised], after[noised])


def test_a_projection_that_mixes_is_refused_by_a_causal_order(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config = woven(config, monkeypatch, {"kind": "mar", "mar": {"order": "raster"}})
    with pytest.raises(ValueError, match=r"'woven' mixes the patches .* set objective.mar.order to masked"):
        build_model(config, 300)
