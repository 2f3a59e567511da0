"""The interface of objectives, tested by two that are written here: a raster MAR, and Transfusion with a clean copy.

Each of them reads shards, packs rows, computes loss and gradients, and generates.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmgen import objective as objectives
from mmgen.backbone import attention_mask
from mmgen.config import Config
from mmgen.config_io import override
from mmgen.data.loader import Corpus
from mmgen.flow.solvers import runge_kutta, solve
from mmgen.generate.decoder import Decoder, Request
from mmgen.model import MMGenModel, build_model
from mmgen.objective import (
    BackboneCall,
    Drawing,
    Embedded,
    ImageLayout,
    ImageObjective,
    ImageSpec,
    TransfusionObjective,
)
from mmgen.objective.layers import CellEmbedding
from mmgen.objective.transfusion import TransfusionLayout
from mmgen.sequence.attention import dense_visible
from mmgen.sequence.batch import Batch
from mmgen.sequence.document import Block
from mmgen.sequence.tokenizer import Tokenizer
from tests.conftest import packed, ready


class RasterLayout(ImageLayout):
    bidirectional = False
    noise_draws = 3

    def blocks(self, site, rng) -> list[Block]:
        n = site.grid[0] * site.grid[1]
        return [Block(np.arange(n), {"t": rng.random((n, 3), np.float32)}, bidirectional=False, key=site.key)]

    def context(self, grid) -> Block:
        n = grid[0] * grid[1]
        return Block(np.arange(n), {"t": np.ones((n, 3), np.float32)}, bidirectional=False, loss=False)


class RasterMAR(ImageObjective):
    """Causal next-patch prediction: a small head denoises each patch, given the hidden state before it."""

    Layout = RasterLayout

    def __init__(self, settings, patcher, width) -> None:
        super().__init__(settings, patcher, width)
        length = patcher.patch_length
        self.enter, self.place = nn.Linear(length, width), CellEmbedding(width)
        self.head = nn.Sequential(nn.Linear(width + length + 1, width), nn.SiLU(), nn.Linear(width, length))

    def embed(self, batch: Batch) -> Embedded:
        ends = torch.ones(len(batch.image_I), dtype=torch.bool)
        ends[:-1] = batch.image_I[1:] != batch.image_I[:-1]
        following = self.place(batch.cell_I2.roll(-1, 0)) * ~ends.unsqueeze(1)
        at = torch.cat([batch.at_I, batch.size_at_M])
        values = torch.cat([self.enter(batch.x_IP) + following, self.place(batch.first_M2)])
        return Embedded(at, values, batch.at_I[batch.loss_at_J] - 1, batch)

    def _denoise(self, hidden: Tensor, z: Tensor, t: Tensor) -> Tensor:
        return self.head(torch.cat([hidden, z, t], -1))

    def loss(self, hidden_JD: Tensor, state: Batch) -> Tensor:
        x, t = state.x_IP[state.loss_at_J].unsqueeze(1), state.draws["t"][state.loss_at_J].unsqueeze(-1)
        eps = state.eps_JKP
        hidden = hidden_JD.unsqueeze(1).expand(-1, eps.shape[1], -1)
        v = self._denoise(hidden, t * x + (1 - t) * eps, t)
        return (v - (x - eps)).square().mean((1, 2))

    def generate(self, spec: ImageSpec) -> Drawing:
        hidden_RD, patches = spec.opening_GRD[0], []
        n = spec.noise_RNP.shape[1]
        for i in range(n):
            times = torch.arange(5, dtype=spec.noise_RNP.dtype) / 4

            def velocity(z: Tensor, t: Tensor, hidden: Tensor = hidden_RD) -> Tensor:
                return self._denoise(hidden, z, t.expand(len(z), 1))

            patches.append(solve(runge_kutta(spec.noise_RNP[:, i], times, scheme="euler"), velocity))
            if i + 1 < n:
                cell = self.place(torch.tensor(divmod(i + 1, spec.grid[1])))
                inputs = self.enter(patches[-1]) + cell
                hidden_RD = (
                    yield BackboneCall(inputs.unsqueeze(1), False, True, order_Rn=torch.full((len(inputs), 1), i))
                )[0, :, 0]
        return torch.stack(patches, 1)


class CopyLayout(TransfusionLayout):
    def __init__(self, settings) -> None:
        super().__init__(settings)
        self.copies = 2


class CleanCopy(TransfusionObjective):
    """Transfusion in which later text attends to a second, clean copy of the image."""

    Layout = CopyLayout


def build(config: Config, monkeypatch: pytest.MonkeyPatch, name: str) -> tuple[Config, MMGenModel, Tokenizer]:
    monkeypatch.setitem(objectives.OBJECTIVES, "raster", RasterMAR)
    monkeypatch.setitem(objectives.OBJECTIVES, "copy", CleanCopy)
    config = override(config, {"objective": {"kind": name}})
    tokenizer = Tokenizer.of(config)
    torch.manual_seed(0)
    return config, build_model(config, len(tokenizer)), tokenizer


@pytest.mark.parametrize("name", ["raster", "copy", "transfusion"])
def test_from_shards_to_pictures(config: Config, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    config, model, tokenizer = build(config, monkeypatch, name)
    corpus = Corpus(config.data.train, tokenizer, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = ready(corpus, corpus.first_step().micro[0])
    history = []
    for _ in range(30):
        losses = model(batch)
        image = losses.image / losses.image_count
        (losses.text / losses.text_count + image).backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        history.append(image.item())
    assert history[-1] < 0.9 * history[0], "the objective learns"
    decoder = Decoder(model, tokenizer, config.sample)
    results = decoder.generate([Request(["picture 1"], "image", 1), Request(["picture 2"], "image", 2, (3, 2))])
    assert [result.images[0].size for result in results] == [(4, 4), (4, 6)]
    assert decoder.generate([Request([results[0].images[0]], "text")])[0].segments is not None


def test_raster_is_causal_and_learns_every_patch(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hidden state that predicts a patch depends on all earlier patches and on no later patch."""
    config = override(config, {"train": {"batch_rows": 1}})
    config, model, tokenizer = build(config, monkeypatch, "raster")
    model = model.double().eval()
    corpus = Corpus(config.data.train, tokenizer, config)
    batch = ready(corpus, corpus.first_step().micro[0], torch.float64)
    base = _read(model, batch)
    image = batch.image_I == batch.image_I[0]
    for i in torch.nonzero(image).flatten().tolist():
        moved = Batch(**{**vars(batch), "x_IP": batch.x_IP.clone()})
        moved.x_IP[i] += 1
        changed = (_read(model, moved) - base).abs().amax(1) > 1e-12
        assert not changed[: i + 1].any()
        assert changed[i + 1 : int(image.sum())].all()


def _read(model: MMGenModel, batch: Batch) -> Tensor:
    with torch.no_grad():
        inputs, embedded = model.embed(batch)
        hidden = model.hidden(inputs, batch.position_BS, attention_mask(batch.sites), batch.modality)
    return hidden.flatten(0, 1)[embedded.read_at_J]


def test_raster_generation_equals_one_forward_pass(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patches that are drawn one at a time with a cache equal those that one full pass predicts."""
    config, model, tokenizer = build(config, monkeypatch, "raster")
    model = model.double().eval()
    config = override(config, {"sample": {"guidance_scale": 1.0}})
    decoder = Decoder(model, tokenizer, config.sample)
    drawn, pictures = [], decoder.patcher.pictures
    decoder.patcher.pictures = lambda x_RNP, grid: drawn.extend(x_RNP) or pictures(x_RNP, grid)
    decoder.generate([Request(["abc"], "image", 9)])
    from mmgen.sequence.document import ImageSegment, TextSegment, Writer

    patch_length = model.patcher.patch_length
    context = model.objective.layout.context((2, 2))
    learned = Block(context.order_N, context.draws, bidirectional=False)
    text = TextSegment(tokenizer.encode("abc"))
    strip = Writer(tokenizer, model.positions).document([text, ImageSegment(drawn[0], (2, 2), [learned])])
    nothing = model.objective.layout.context((0, 0))
    batch = packed([[strip]], len(strip), tokenizer, nothing, patch_length, torch.float64)
    hidden = _read(model, batch)
    noise = np.random.Generator(np.random.Philox(key=9)).standard_normal((4, patch_length), np.float32)
    z, times = torch.from_numpy(noise).double(), torch.arange(5, dtype=torch.float64) / 4
    with torch.no_grad():
        again = solve(
            runge_kutta(z, times, scheme="euler"), lambda z, t: model.objective._denoise(hidden, z, t.expand(4, 1))
        )
    np.testing.assert_allclose(drawn[0], again.numpy(), atol=1e-5)


def test_a_noisy_copy_is_hidden_from_all_other_positions(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config = override(config, {"train": {"batch_rows": 1}})
    config, model, tokenizer = build(config, monkeypatch, "copy")
    corpus = Corpus(config.data.train, tokenizer, config)
    batch = ready(corpus, corpus.first_step().micro[0])
    seen, noised, block = dense_visible(batch.sites)[0], batch.noised_BS[0], batch.block_BS[0]
    assert noised.any()
    for k in torch.nonzero(noised).flatten().tolist():
        assert (block[seen[:, k]] == block[k]).all()
    # Both copies of an image share their positions and cells.
    first, second = (batch.at_I[batch.image_I == i] for i in (0, 1))
    assert torch.equal(batch.position_BS.flatten()[first], batch.position_BS.flatten()[second])
    assert torch.equal(batch.cell_I2[batch.image_I == 0], batch.cell_I2[batch.image_I == 1])
    assert torch.equal(batch.loss_at_J, torch.nonzero(noised.flatten()[batch.at_I]).flatten())
