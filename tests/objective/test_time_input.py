"""How Transfusion's network reads t: by addition, as a token in front of the patches, or as AdaLN of the output."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers.models.normalization import AdaLayerNormContinuous
from torch import Tensor

from mmgen.config import Config
from mmgen.config_io import override
from mmgen.data.loader import Corpus
from mmgen.generate.decoder import Decoder, Request
from mmgen.model import MMGenConfig, MMGenModel
from mmgen.objective import ImageSite
from mmgen.objective.layers import OutputModulation, TimeEmbedding
from mmgen.objective.transfusion import TransfusionLayout, TransfusionObjective
from mmgen.parity import check_parity
from mmgen.plan import plan
from mmgen.sequence.attention import dense_visible
from mmgen.sequence.batch import Batch
from mmgen.sequence.document import ImageSegment, TextSegment, Writer
from mmgen.sequence.position import MASK
from tests.conftest import awake, packed
from tests.objective.test_mar import first_batch

WAYS = (["addition"], ["token"], ["adaln"], ["addition", "adaln"], ["token", "adaln"])


def timed(config: Config, ways: list[str] | str, context: str = "capped") -> Config:
    section = {"transfusion": {"time_input": ways, "context": context}}
    return override(config, {"objective": section, "data": {"row_length": 60}})


def test_the_modulation_is_that_of_diffusers() -> None:
    """`AdaLayerNormContinuous`, whose linear map gives scale before shift."""
    torch.manual_seed(0)
    ours, theirs = OutputModulation(8), AdaLayerNormContinuous(8, 8, elementwise_affine=False, eps=1e-6)
    torch.nn.init.normal_(ours.modulation.weight)
    torch.nn.init.normal_(ours.modulation.bias)
    with torch.no_grad():
        theirs.linear.weight.copy_(ours.modulation.weight.roll(8, 0))
        theirs.linear.bias.copy_(ours.modulation.bias.roll(8, 0))
    hidden, time = torch.randn(5, 8), torch.randn(5, 8)
    torch.testing.assert_close(ours(hidden, time), theirs(hidden.unsqueeze(1), time).squeeze(1))


@pytest.mark.parametrize("ways", WAYS, ids="+".join)
def test_every_parameter_takes_part_without_images(config: Config, ways: list[str]) -> None:
    model, tokenizer = awake(timed(config, ways), torch.float32)
    strip = Writer(tokenizer, "shared").document([TextSegment(tokenizer.encode("words"))])
    nothing = model.objective.layout.context((0, 0))
    for batch in (
        packed([[strip]], len(strip), tokenizer, nothing, model.patcher.patch_length),
        first_batch(timed(config, ways), tokenizer).to("cpu", torch.float32),
    ):
        losses = model(batch)
        (losses.text + losses.image).backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []
        model.zero_grad()


def check_own_time(config: Config, ways: list[str]) -> None:
    """The output for an image depends on its own t, and not on the t of the last image of the batch."""
    config = timed(config, ways)
    model, tokenizer = awake(config)
    batch = first_batch(config, tokenizer)
    last = batch.image_I == batch.image_I[-1]
    images = batch.image_I[batch.loss_at_J]

    z = torch.randn_like(batch.x_IP)
    base = outputs_of(model, batch, z, batch.draws["t"])
    t = batch.draws["t"].clone()
    t[last] = 1 - t[last]
    moved = outputs_of(model, batch, z, t)
    changed = torch.zeros(int(images.max()) + 1, dtype=torch.bool)
    changed[images[(base - moved).abs().amax(1) > 1e-9]] = True
    assert torch.nonzero(changed).flatten().tolist() == [int(images[-1])]


def outputs_of(model: MMGenModel, batch: Batch, z_IP: Tensor, t_I: Tensor) -> Tensor:
    """The outputs [J, P] of the network for given noisy patches and times."""
    outputs: list[Tensor] = []
    objective, own = model.objective, TransfusionObjective._enter

    def enter(_: Tensor, t: Tensor, cells: object) -> tuple[Tensor, Tensor | None]:
        return own(objective, z_IP, t, cells)

    objective._enter = enter
    plain = objective.flow.loss
    objective.flow.loss = lambda output, *rest: (outputs.append(output), plain(output, *rest))[1]
    try:
        with torch.no_grad():
            model(Batch(**{**vars(batch), "draws": {"t": t_I}}))
    finally:
        del objective._enter
        objective.flow.loss = plain
    return outputs[0]


@pytest.mark.parametrize("ways", WAYS, ids="+".join)
def test_each_image_has_its_own_time(config: Config, ways: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails if the times of images are exchanged."""
    check_own_time(config, ways)
    plain = TimeEmbedding.forward
    monkeypatch.setattr(TimeEmbedding, "forward", lambda self, t: plain(self, t.roll(1, 0)))
    with pytest.raises(AssertionError):
        check_own_time(config, ways)


def test_the_position_of_the_token(config: Config) -> None:
    """BOS, words, BOI, size, time, patches, EOI: the token is a position of the image's block, without a patch."""
    config = timed(config, "token", "clean_copy")
    model, tokenizer = awake(config)
    layout = TransfusionLayout(config.objective)
    assert (layout.lead, layout.copies) == (1, 2)
    blocks = layout.blocks(ImageSite((3, 2), True, True, 0.3, key=3), np.random.default_rng(0))
    image = ImageSegment(np.zeros((6, 12), np.float32), (3, 2), blocks)
    for positions, patches in (("shared", [6] * 6), ("raster", [*range(6, 12)]), ("axial", [6] * 6)):
        strip = Writer(tokenizer, positions).document([TextSegment([1, 2]), image, TextSegment([3])])
        found = [position & MASK for position in strip.position]
        assert found[:5] == [*range(5)]  # BOS, two words, BOI, size
        assert found[5:19] == [5, *patches] * 2
        assert found[19:] == [patches[-1] + 1 + k for k in range(3)]  # EOI, a word, EOS
        assert [placed.offset for placed in strip.blocks] == [6, 13]
        assert strip.block == [-1] * 5 + [0] * 7 + [1] * 7 + [-1] * 3
    batch = packed([[strip]], 24, tokenizer, layout.context((0, 0)), 12, torch.float64)
    assert batch.at_I.tolist() == [*range(6, 12), *range(13, 19)]
    assert (batch.label_BS[0] >= 0).nonzero().flatten().tolist() == [0, 1, 2, 3, 19, 20]
    seen = dense_visible(batch.sites)[0]
    assert seen[5].nonzero().flatten().tolist() == [*range(12)], "the token sees the text and its own block"
    assert seen[7, 5]
    assert not seen[13:22, 5].any(), "the token of a noisy copy is hidden from all positions outside it"
    assert seen[20, 12], "later text sees the token of the clean copy"
    inputs, embedded = model.embed(batch)
    t = torch.tensor([batch.draws["t"][0], 1.0], dtype=torch.float64)
    torch.testing.assert_close(inputs[0, [5, 12]], model.objective.time(t))
    assert embedded.read_at_J.tolist() == [*range(6, 12)]


def test_planned_lengths_count_the_token(config: Config) -> None:
    """The loader refuses a document of another length than planned, so one epoch shows that they agree."""
    for context in ("capped", "clean_copy"):
        config = timed(config, "token", context)
        model, tokenizer = awake(config)
        corpus = Corpus(config.data.train, tokenizer, config)
        rows = list(corpus.plan.epoch_rows(0))
        step = corpus.step(1, rows, corpus.start)
        assert (step.bad, step.documents, step.images) == ([], 40, 40)
    assert plan(config).positions_per_image == [2 * 5 + 3, 2 * 7 + 3]


@pytest.mark.parametrize("ways", [["token"], ["addition", "adaln"]], ids="+".join)
@pytest.mark.parametrize("positions", ["raster", "axial"])
def test_sampling_equals_training(config: Config, ways: list[str], positions: str) -> None:
    config = override(timed(config, ways), {"model": {"positions": positions}})
    reports = [report for report in check_parity(config) if report.variant.startswith("transfusion")]
    assert len(reports) == 3
    for report in reports:
        assert report.holds, report


@pytest.mark.parametrize("ways", [["token"], ["adaln"]], ids="+".join)
def test_parity_sees_another_time(config: Config, ways: list[str]) -> None:
    for report in check_parity(timed(config, ways), "shifted-t"):
        assert not report.holds, report


def test_in_painting_and_captions_with_a_token(config: Config) -> None:
    model, tokenizer = awake(timed(config, "token"), torch.float32)
    decoder = Decoder(model, tokenizer, config.sample)
    (drawn,) = decoder.generate([Request(["a"], "image", 1, (3, 2))])
    assert drawn.images[0].size == (4, 6)
    assert decoder.generate([Request([drawn.images[0]], "text", 2)])[0].segments is not None


def test_old_configurations_read_the_time_by_addition(config: Config) -> None:
    written = json.loads(MMGenConfig.of(config, 300).to_json_string())
    del written["objective"]["transfusion"]["time_input"]
    for name in ("conv_channels", "conv_depth"):
        del written["patcher"][name]
    del written["objective"]["mar"]["entry_norm"]
    model = MMGenModel(MMGenConfig(**written))
    assert model.objective.ways == ["addition"]
    assert model.state_dict().keys() == MMGenModel(MMGenConfig.of(config, 300)).state_dict().keys()
    assert not any(name in key for key in model.state_dict() for name in ("modulation", "norm.", "head_place")
                   if key.startswith("objective."))  # fmt: skip


@pytest.mark.parametrize("ways", [[], ["token", "token"], ["adding"]])
def test_wrong_ways_are_refused(config: Config, ways: list[str]) -> None:
    with pytest.raises(ValueError, match=r"objective\.transfusion\.time_input"):
        timed(config, ways)
