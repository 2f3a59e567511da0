"""MAR: masking, layouts, losses, causality and drawing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from mmgen.config import Config, MaskRatioConfig, SampleConfig
from mmgen.config_io import override
from mmgen.data.loader import Corpus
from mmgen.generate.decoder import Decoder, Request
from mmgen.model import MMGenModel, build_model
from mmgen.objective import Given, ImageSite, ImageSpec
from mmgen.objective.mar import MARLayout, guidance_at, mask_ratio, unmask_counts
from mmgen.plan import plan
from mmgen.sequence.attention import dense_visible
from mmgen.sequence.batch import Batch
from mmgen.sequence.document import TextSegment, Writer
from mmgen.sequence.tokenizer import Tokenizer
from mmgen.train.checkpoint import read as checkpoint
from mmgen.train.loop import train
from tests.conftest import awake, packed, ready

ORDERS = ("masked", "random", "raster")


def mar(config: Config, order: str = "masked", shared: dict | None = None, **own: object) -> Config:
    """A MAR configuration with own settings (`own`) and settings that all objectives share (`shared`)."""
    section = {"order": order, "head": {"width": 24}, **own}
    return override(config, {"objective": {"kind": "mar", "mar": section, **(shared or {})}})


def first_batch(config: Config, tokenizer: Tokenizer, rows: int = 3) -> Batch:
    config = override(config, {"train": {"batch_rows": rows}})
    corpus = Corpus(config.data.train, tokenizer, config)
    return ready(corpus, corpus.first_step().micro[0], torch.float64)


@given(st.floats(0, 1, exclude_max=True), st.floats(0.7, 1.0), st.floats(0.1, 0.5), st.floats(0, 0.9))
@example(0.0, 0.75390625, 0.1015625, 0.0)
def test_mask_ratio_is_scipys_truncated_normal(u: float, mean: float, std: float, low: float) -> None:
    oracle = stats.truncnorm((low - mean) / std, (1 - mean) / std, loc=mean, scale=std).ppf(u)
    assert mask_ratio(u, MaskRatioConfig(mean=mean, std=std, low=low)) == pytest.approx(oracle, abs=1e-6)


@given(st.integers(1, 300), st.integers(1, 300))
def test_unmasking_follows_the_cosine(hidden: int, steps: int) -> None:
    counts = unmask_counts(hidden, steps)
    assert sum(counts) == hidden
    assert min(counts) >= 1
    assert len(counts) == min(hidden, steps)
    stay = hidden - np.cumsum(counts)
    cosine = np.floor(hidden * np.cos(np.pi / 2 * (np.arange(len(counts)) + 1) / len(counts)))
    free = (cosine < np.concatenate([[hidden], stay[:-1]])) & (cosine >= len(counts) - 1 - np.arange(len(counts)))
    assert (stay[free][:-1] == cosine[free][:-1]).all()


def test_the_guidance_ramp() -> None:
    assert [guidance_at(share, SampleConfig(), 3.0) for share in (0, 0.5, 1)] == [1, 2, 3]
    assert guidance_at(0.1, SampleConfig(guidance_ramp="constant"), 3.0) == 3


def test_the_masked_layout(config: Config) -> None:
    settings = mar(config).objective
    for quantile in (0.0, 0.5, 0.999):
        site = ImageSite((4, 5), True, True, quantile, key=3)
        noised, clean = MARLayout(settings).blocks(site, np.random.default_rng(0))
        masked = noised.draws["masked"] > 0
        assert masked.sum() == int(np.ceil(20 * mask_ratio(quantile, settings.mar.mask_ratio)))
        assert (noised.noised, clean.noised) == (True, False)
        assert (noised.bidirectional, clean.bidirectional) == (True, True)
        assert (noised.loss == masked).all()
        assert clean.loss is False
        assert noised.key == 3
        assert not clean.draws["masked"].any()
        # Times of one image fill the unit interval evenly, in random order.
        t = np.sort(noised.draws["t"].ravel())
        assert np.allclose(np.diff(t), 1 / t.size, atol=1e-6)
        assert not (np.diff(noised.draws["t"].ravel()) > 0).all()


def test_causal_layouts(config: Config) -> None:
    site = ImageSite((3, 3), True, False, 0.5, key=3)
    (raster,) = MARLayout(mar(config, "raster").objective).blocks(site, np.random.default_rng(0))
    (random,) = MARLayout(mar(config, "random").objective).blocks(site, np.random.default_rng(0))
    assert list(raster.order_N) == list(range(9)) == sorted(random.order_N) != list(random.order_N)
    for block in (raster, random):
        assert (block.bidirectional, block.noised, block.loss, block.key) == (False, False, True, 3)


@pytest.mark.parametrize("kind", [{"kind": "mar"}, {"kind": "transfusion", "transfusion": {"context": "clean_copy"}}])
def test_a_noisy_copy_is_hidden_from_all_other_positions(config: Config, kind: dict) -> None:
    config = override(config, {"objective": kind})
    _, tokenizer = awake(config)
    batch = first_batch(config, tokenizer)
    seen, noised, block = dense_visible(batch.sites), batch.noised_BS, batch.block_BS
    assert noised.any()
    for b, k in torch.nonzero(noised).tolist():
        assert (block[b][seen[b, :, k]] == block[b, k]).all()
    added = plan(config).positions_added_by_copies
    assert added == [4, 6]
    # Each image has a noisy copy, and a clean one unless it is the last segment of its document.
    following = batch.ids_BS.flatten()[[int(batch.at_I[batch.image_I == i].max()) + 2 for i in batch.image_I.unique()]]
    hidden = [bool(noised.flatten()[batch.at_I[batch.image_I == i]].all()) for i in batch.image_I.unique()]
    found = {(int(after) == tokenizer.eos, noisy) for after, noisy in zip(following, hidden, strict=True)}
    assert found == {(True, True), (False, True), (False, False)}, "no clean copy is the last segment"


@pytest.mark.parametrize("order", ORDERS)
def test_the_inputs_of_the_backbone_have_no_noise(config: Config, order: str) -> None:
    """The inputs of the backbone depend neither on the times nor on the noise of the loss."""
    config = mar(config, order)
    model, tokenizer = awake(config)
    batch = first_batch(config, tokenizer)
    inputs, _ = model.embed(batch)
    draws = {**batch.draws, "t": torch.rand_like(batch.draws["t"])}
    again, _ = model.embed(replace(batch, draws=draws, eps_JKP=torch.randn_like(batch.eps_JKP)))
    assert torch.equal(inputs, again)
    moved, _ = model.embed(replace(batch, x_IP=batch.x_IP + 1))
    assert not torch.equal(inputs, moved), "clean patches are seen"


@pytest.mark.parametrize("order", ORDERS)
def test_the_loss_is_flow_matching_of_each_patch(config: Config, order: str) -> None:
    """It equals a loop over patches and draws, with v-prediction on the linear path."""
    config = mar(config, order)
    model, tokenizer = awake(config)
    batch = first_batch(config, tokenizer, 1)
    with torch.no_grad():
        found = model(batch)
        inputs, embedded = model.embed(batch)
        from mmgen.backbone import attention_mask

        hidden = model.hidden(inputs, batch.position_BS, attention_mask(batch.sites), batch.modality).flatten(0, 1)
        head, total = model.objective.head, 0.0
        at = batch.at_I[batch.loss_at_J]
        expected_reads = at if order == "masked" else at - 1
        assert torch.equal(embedded.read_at_J, expected_reads)
        for j, (i, read) in enumerate(zip(batch.loss_at_J.tolist(), expected_reads.tolist(), strict=True)):
            x, errors = batch.x_IP[i], []
            for t, eps in zip(batch.draws["t"][i], batch.eps_JKP[j], strict=True):
                v = head(t * x + (1 - t) * eps, t, head.state(hidden[read]))
                errors.append((v - (x - eps)).square().mean())
            total += torch.stack(errors).mean()
    torch.testing.assert_close(found.image, total, rtol=1e-6, atol=0)
    assert found.image_count == len(at)


@pytest.mark.parametrize("order", ["random", "raster"])
def test_causal_orders_leak_nothing(config: Config, order: str) -> None:
    """The state that predicts a patch depends on the patch's cell and on all earlier patches, and on no later patch."""
    config = mar(config, order)
    model, tokenizer = awake(config)
    batch = first_batch(config, tokenizer, 1)

    def read(batch: Batch) -> Tensor:
        from mmgen.backbone import attention_mask

        with torch.no_grad():
            inputs, embedded = model.embed(batch)
            hidden = model.hidden(inputs, batch.position_BS, attention_mask(batch.sites), batch.modality)
        return hidden.flatten(0, 1)[embedded.read_at_J]

    base = read(batch)
    image = torch.nonzero(batch.image_I == 0).flatten().tolist()
    for i in image:
        moved = replace(batch, x_IP=batch.x_IP.clone())
        moved.x_IP[i] += 1
        changed = (read(moved) - base).abs().amax(1) > 1e-12
        assert not changed[: i + 1].any()
        assert changed[i + 1 : len(image)].all()
        elsewhere = replace(batch, cell_I2=batch.cell_I2.clone(), first_M2=batch.first_M2.clone())
        elsewhere.cell_I2[i] += 5
        if i == 0:
            elsewhere.first_M2[0] += 5
        assert (read(elsewhere)[i] - base[i]).abs().max() > 1e-12, "the input holds the cell of the predicted patch"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("head", ["flow", "mse"])
def test_every_parameter_takes_part_without_images(config: Config, order: str, head: str) -> None:
    config = mar(config, order, head={"kind": head})
    model, tokenizer = awake(config)
    nothing = model.objective.layout.context((0, 0))
    strip = Writer(tokenizer, "shared").document([TextSegment(tokenizer.encode("words"))])
    batch = packed([[strip]], len(strip), tokenizer, nothing, model.patcher.patch_length, torch.float64, 4)
    losses = model(batch)
    (losses.text + losses.image).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def with_exact_head(model: MMGenModel, prediction: str, target_RNP: Tensor, flat: Tensor) -> None:
    """Make the head exact for one picture. Its hidden states contain the index of the patch (see `answers`)."""

    def head(z: Tensor, t: Tensor, state: Tensor) -> Tensor:
        x = flat[state[..., 0].round().long()].expand(
            *torch.broadcast_shapes(z.shape, (*state.shape[:-1], z.shape[-1]))
        )
        t = t if t.ndim == 0 else t.unsqueeze(-1)
        return {"x": x, "eps": (z - t * x) / (1 - t), "v": (x - z) / (1 - t)}[prediction]

    model.objective.head.forward = head
    model.objective.head.state.forward = lambda hidden: hidden


def drawn_by(model: MMGenModel, spec: ImageSpec, order: str) -> Tensor:
    """Drive a drawing with hidden states that contain the index of the patch that they predict."""
    n = spec.noise_RNP.shape[1]
    index = torch.arange(n, dtype=torch.float64)
    drawing, calls = model.objective.generate(spec), 0
    with torch.no_grad():
        try:
            next(drawing)
            while True:
                calls += 1
                if order == "masked":
                    names = index.expand(1, len(spec.noise_RNP), n)
                else:
                    names = spec.order_RN[:, calls : calls + 1].double().unsqueeze(0)
                drawing.send(names.unsqueeze(-1).expand(-1, -1, -1, 32))
        except StopIteration as stop:
            return stop.value


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("prediction", ["x", "eps", "v"])
@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2m", "ancestral", "euler_maruyama"])
@pytest.mark.parametrize("painting", [False, True])
def test_an_exact_head_draws_its_picture(
    config: Config, order: str, prediction: str, solver: str, painting: bool
) -> None:
    config = override(
        mar(config, order, shared={"prediction": prediction}),
        {"sample": {"steps": 6, "solver": solver, "unmask_steps": 3}},
    )
    model, _ = awake(config)
    length, rng = model.patcher.patch_length, torch.Generator().manual_seed(0)
    flat = torch.linspace(-1, 1, 6 * length, dtype=torch.float64).view(6, length)
    with_exact_head(model, prediction, flat, flat)
    noise = torch.randn(3, 6, length, dtype=torch.float64, generator=rng)
    orders = torch.stack(
        [torch.from_numpy(MARLayout(config.objective).order((3, 2), np.random.default_rng(r))) for r in range(3)]
    )
    opening = orders[:, :1].double().expand(3, 32).unsqueeze(0)
    known = None
    expected = flat.expand(3, -1, -1)
    if painting:
        mask = torch.tensor([[1, 0, 0, 1, 0, 0], [0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1]]).bool()
        other = torch.full_like(expected, 0.25)
        known, expected = Given(mask, other), torch.where(mask.unsqueeze(-1), other, expected)
    spec = ImageSpec((3, 2), noise, config.sample, opening, orders, given=known)
    torch.testing.assert_close(drawn_by(model, spec, order), expected, rtol=1e-9, atol=1e-9)


def test_the_regression_head_draws_one_picture(config: Config) -> None:
    """The picture does not depend on the seed, because only the order is random."""
    for kind, count in (("mse", 1), ("flow", 3)):
        config_ = mar(config, "raster", head={"kind": kind})
        model, tokenizer = awake(config_)
        results = Decoder(model, tokenizer, config_.sample).generate(
            [Request(["a"], "image", seed) for seed in range(3)]
        )
        assert len({result.images[0].tobytes() for result in results}) == count


def test_the_regression_head_learns_from_the_hidden_state(config: Config) -> None:
    """The head learns: on a few pictures its loss is far below that of the best constant."""
    config = mar(config, "raster", head={"kind": "mse", "width": 48})
    tokenizer = Tokenizer.of(config)
    torch.manual_seed(0)
    model = build_model(config, len(tokenizer))
    batch = first_batch(config, tokenizer, 2).to("cpu", torch.float32)
    x_JP = batch.x_IP[batch.loss_at_J]
    constant = (x_JP - x_JP.mean(0)).square().mean()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        losses = model(batch)
        (losses.image / losses.image_count).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses.image / losses.image_count < 0.5 * constant


def test_learning_and_drawing_from_shards(config: Config) -> None:
    for order in ORDERS:
        config_ = mar(config, order)
        model, tokenizer = awake(config_, torch.float32)
        batch = first_batch(config_, tokenizer).to("cpu", torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        history = []
        for _ in range(40):
            losses = model(batch)
            image = losses.image / losses.image_count
            (losses.text / losses.text_count + image).backward()
            optimizer.step()
            optimizer.zero_grad()
            history.append(image.item())
        assert history[-1] < 0.8 * history[0], order
        requests = [Request(["picture 1"], "image", 1), Request(["picture 2"], "image", 2, (3, 2))]
        results = Decoder(model, tokenizer, config_.sample).generate(requests)
        assert [result.images[0].size for result in results] == [(4, 4), (4, 6)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "mar", "context": "capped"}, "write it as objective.transfusion.context"),
        ({"kind": "transfusion", "order": "raster"}, "write it as objective.mar.order"),
        ({"kind": "transfusion", "transfusion": {"context": "clean"}}, "objective.transfusion.context"),
        ({"kind": "transfusion", "mar": {"order": "spiral"}}, "objective.mar.order"),
        ({"kind": "mar", "mar": {"order": "random"}, "bidirectional": True}, "would attend to itself"),
        ({"others": {"tokens": {}}}, "no such objective"),
    ],
)
def test_contradictory_settings_are_rejected(config: Config, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        override(config, {"objective": settings})


def test_an_unknown_projection_is_refused(config: Config) -> None:
    with pytest.raises(ValueError, match="unknown model.patcher.projection 'uneet', did you mean 'unet'"):
        awake(override(mar(config), {"model": {"patcher": {"projection": "uneet"}}}))


def test_a_temperature_without_noise_is_refused(config: Config) -> None:
    model, tokenizer = awake(mar(config))
    cold = config.sample.model_copy(update={"noise_temperature": 0.9})
    with pytest.raises(ValueError, match="'euler' adds no noise"):
        Decoder(model, tokenizer, cold).generate([Request(["a"], "image")])
    stochastic = cold.model_copy(update={"solver": "ancestral"})
    frozen = stochastic.model_copy(update={"noise_temperature": 0.0})
    drawn = [
        Decoder(model, tokenizer, s).generate([Request(["a"], "image")])[0].images[0].tobytes()
        for s in (stochastic, frozen)
    ]
    assert drawn[0] != drawn[1]


def test_checkpoints_of_the_other_objective_are_refused(config: Config) -> None:
    train(mar(config))
    with pytest.raises(ValueError, match=r"objective\.kind \('transfusion' here, 'mar' there\)"):
        train(config)
    found = checkpoint.latest(config.run.dir)
    assert found is not None
    with pytest.raises(ValueError, match=r"objective\.kind \('transfusion' here, 'mar' there\)"):
        checkpoint.check_same_model(checkpoint.Checkpoint(found, checkpoint.read_trainer(found)), config)
