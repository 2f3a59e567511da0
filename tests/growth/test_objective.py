"""Adding an objective: discrete tokens, with integer codes as patches, a cross-entropy loss and no noise.

It adds its own classes, its settings to `OBJECTIVE_SETTINGS`, a line to `OBJECTIVES`, and its kind of patch to
`PATCHERS`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mmgen import config as settings_of
from mmgen import objective as objectives
from mmgen.config import Config, Settings
from mmgen.config_io import load, override
from mmgen.generate.decoder import Decoder, Request
from mmgen.image import latent
from mmgen.image.patch import Patcher, Patches
from mmgen.objective import BackboneCall, Drawing, Embedded, ImageLayout, ImageObjective, ImageSpec
from mmgen.objective.layers import CellEmbedding
from mmgen.parity import check_parity
from mmgen.sequence.batch import Batch
from mmgen.sequence.document import Block
from mmgen.train.checkpoint.read import load_model
from mmgen.train.loop import train
from tests.conftest import run


class DiscreteSettings(Settings):
    codes: int = 8
    temperature: float = 0.0


class Codes(Patcher):
    """Grey values of 2x2 pixels as codes 0 to 7, a simple discrete tokenizer of images."""

    stored = "codes"

    def __init__(self, settings, device="cpu", facts=None) -> None:
        super().__init__(settings)

    @property
    def ready(self) -> Patches:
        return Patches(1, np.int64)

    def encode_pixels(self, pixels_MNL: Tensor, grid) -> Tensor:
        return (pixels_MNL.float().mean(-1, keepdim=True) // 32).long()

    def encode_stored(self, stored):
        return stored.reshape(-1, 1).astype(np.int64), stored.shape

    def pictures(self, x_RNP, grid) -> list[Image.Image]:
        assert np.asarray(x_RNP).dtype == np.int64
        side = self.settings.side
        values = (np.asarray(x_RNP).reshape(-1, *grid) * 32 + 16).astype(np.uint8)
        return [Image.fromarray(one.repeat(side, 0).repeat(side, 1)).convert("RGB") for one in values]


class DiscreteLayout(ImageLayout):
    """Codes in raster order under causal attention, like text."""

    bidirectional = False

    def blocks(self, site, rng) -> list[Block]:
        return [Block(np.arange(site.grid[0] * site.grid[1]), {}, bidirectional=False)]

    def context(self, grid) -> Block:
        return Block(np.arange(grid[0] * grid[1]), {}, bidirectional=False, loss=False)


class Discrete(ImageObjective):
    Layout = DiscreteLayout

    def __init__(self, settings, patcher, width: int) -> None:
        super().__init__(settings, patcher, width)
        self.section = settings.section
        self.enter, self.place = nn.Embedding(self.section.codes, width), CellEmbedding(width)
        self.head = nn.Linear(width, self.section.codes)

    def embed(self, batch: Batch) -> Embedded:
        has_next = torch.zeros(len(batch.image_I), dtype=torch.bool, device=batch.image_I.device)
        has_next[:-1] = batch.image_I[1:] == batch.image_I[:-1]
        following = self.place(batch.cell_I2.roll(-1, 0)) * has_next.unsqueeze(1)
        values = torch.cat([self.enter(batch.x_IP.squeeze(1)) + following, self.place(batch.first_M2)])
        at = torch.cat([batch.at_I, batch.size_at_M])
        return Embedded(at, values, batch.at_I[batch.loss_at_J] - 1, batch.x_IP[batch.loss_at_J].squeeze(1))

    def loss(self, hidden_JD: Tensor, state: Any) -> Tensor:
        return nn.functional.cross_entropy(self.head(hidden_JD), state, reduction="none")

    def generate(self, spec: ImageSpec) -> Drawing:
        rows, n, _ = spec.noise_RNP.shape
        hidden_GRD, codes = spec.opening_GRD, []
        for i in range(n):
            scores = self.head(hidden_GRD)
            if len(scores) > 1:
                scores = scores[1:] + spec.sample.guidance_scale * (scores[:1] - scores[1:])
            noise = self.section.temperature * spec.noise(scores[0])
            codes.append((scores[0] + noise).argmax(-1))
            if i + 1 < n:
                cell = self.place(torch.tensor([divmod(i + 1, spec.grid[1])])).expand(rows, -1)
                inputs_R1D = (self.enter(codes[-1]) + cell).unsqueeze(1)
                at_R1 = torch.full((rows, 1), i)
                hidden_GRD = (yield BackboneCall(inputs_R1D, False, keep=True, order_Rn=at_R1))[:, :, 0]
        return torch.stack(codes, 1).unsqueeze(-1)


@pytest.fixture
def discrete(config: Config, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setitem(settings_of.OBJECTIVE_SETTINGS, "discrete", DiscreteSettings)
    monkeypatch.setitem(objectives.OBJECTIVES, "discrete", Discrete)
    monkeypatch.setitem(latent.PATCHERS, "codes", Codes)
    patcher = {"kind": "codes", "patch_size": 1, "vae": {"channels": 1, "factor": 2}}
    return override(config, {
        "model": {"patcher": patcher}, "objective": {"kind": "discrete", "discrete": {"codes": 8}},
        "train": {"steps": 60, "lr": 0.01, "warmup_steps": 5, "save_every": 60},
    })  # fmt: skip


def test_it_trains_and_draws_through_the_real_loop(discrete: Config) -> None:
    assert train(discrete) == 0
    lines = [json.loads(line) for line in (discrete.run.dir / "metrics.jsonl").read_text().splitlines()]
    image = [line["loss/image"] for line in lines if "loss/image" in line]
    assert image[0] > 0.9 * np.log(8)
    assert image[-1] < 0.95 * np.log(8), "better than uniform: the captions' pictures are learned"
    model, tokenizer = load_model(discrete.run.dir / "checkpoints" / "latest")
    assert isinstance(model.objective, Discrete)
    assert model.objective.section == DiscreteSettings(codes=8)
    requests = [Request(["picture 1"], "image", 1), Request(["picture 2"], "image", 2, (3, 2)), Request(["continue"])]
    results = Decoder(model, tokenizer, discrete.sample).generate(requests)
    assert [result.images[0].size for result in results[:2]] == [(4, 4), (4, 6)]
    assert Decoder(model, tokenizer, discrete.sample).generate([Request([results[0].images[0]], "text")])


def test_drawn_codes_are_those_that_one_forward_pass_predicts(discrete: Config) -> None:
    """Greedy codes that are drawn one at a time with a cache are the likeliest codes of one training pass over them."""
    from mmgen.backbone import attention_mask
    from mmgen.sequence.batch import RowFormat, collate, prepare
    from mmgen.sequence.document import ImageSegment, TextSegment, Writer
    from tests.conftest import awake, ready  # noqa: F401

    discrete = override(discrete, {"sample": {"guidance_scale": 1.0}})
    model, tokenizer = awake(discrete)
    decoder, drawn = Decoder(model, tokenizer, discrete.sample), []
    pictures = decoder.patcher.pictures
    decoder.patcher.pictures = lambda x_RNP, grid: drawn.extend(x_RNP) or pictures(x_RNP, grid)
    decoder.generate([Request(["abc"], "image", 9)])
    layout, text = model.objective.layout, TextSegment(tokenizer.encode("abc"))
    block = Block(np.arange(4), {}, bidirectional=False)
    strip = Writer(tokenizer, model.positions).document([text, ImageSegment(drawn[0], (2, 2), [block])])
    raw = collate([[strip]], RowFormat(len(strip), tokenizer, layout.context((0, 0)), decoder.patcher.ready))
    batch = prepare(raw, decoder.patcher, "cpu", torch.float64)
    assert batch.x_IP.dtype == torch.int64
    with torch.no_grad():
        inputs, embedded = model.embed(batch)
        hidden = model.hidden(inputs, batch.position_BS, attention_mask(batch.sites), batch.modality)[0]
        again = model.objective.head(hidden[embedded.read_at_J]).argmax(-1)
    assert again.tolist() == drawn[0].ravel().tolist()


def test_its_settings_are_checked_and_stored(discrete: Config, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"objective\.discrete\.codes must be a whole number"):
        override(discrete, {"objective": {"discrete": {"codes": "many"}}})
    with pytest.raises(ValueError, match="'discrete' has no `replay`"):
        check_parity(discrete)
    file = tmp_path / "own.yaml"
    file.write_text("objective: {kind: discrete, discrete: {codes: 5}, transfusion: {cap: 0.1}}")
    assert load(file).objective.section == DiscreteSettings(codes=5)
    assert Config.model_validate(load(file).model_dump(mode="json")).objective.section == DiscreteSettings(codes=5)


def test_the_command_line_trains_it(discrete: Config, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import yaml

    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(discrete.model_dump(mode="json")))
    code, out, err = run(capsys, "train", "--config", file, "--train.steps", 2, "--train.warmup_steps", 1)
    assert code == 0, err
    assert (discrete.run.dir / "checkpoints" / "step-2").is_dir()
