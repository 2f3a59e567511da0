"""Validation losses where the answer is known: of simple models, of transformers, and of documents alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForCausalLM

from mmgen.config import Config
from mmgen.config_io import override
from mmgen.data.views import GRID, KINDS, TEXT, Views
from mmgen.model import Losses, build_model
from mmgen.objective.transfusion import Noised, TransfusionLayout
from mmgen.sequence.batch import Batch, RawBatch, prepare
from mmgen.sequence.tokenizer import Tokenizer
from tests.conftest import awake, pairs, picture, png, tiny, write_tar
from tests.train.test_validate import OBJECTIVES, corpus_of, documents, flat, run_on_documents


@pytest.fixture
def mixed(tmp_path: Path) -> Config:
    return run_on_documents(tmp_path)


def mean_square(config: Config) -> float:
    """Mean square of the pixel values of all pictures, scaled to [-1, 1], from the files alone."""
    import io
    import tarfile

    with tarfile.open(config.data.val[0]) as tar:
        images = [tar.extractfile(m).read() for m in tar if m.name.endswith(".png")]
    values = np.concatenate([np.asarray(Image.open(io.BytesIO(one)), dtype=np.float64).ravel() for one in images])
    return float(np.mean((values / 127.5 - 1) ** 2))


@pytest.mark.parametrize("objective", ["transfusion", "raster", "random"])
def test_a_model_that_predicts_zero_has_the_known_loss_at_each_time(mixed: Config, objective: str) -> None:
    """Prediction x = 0, error in v: (x - 0)^2 / (1 - t)^2 whatever the noise is."""
    spaces = {"prediction": "x", "loss_space": "v"}
    config = override(mixed, {"objective": {**OBJECTIVES[objective], **spaces}})
    found = flat(build_model(config, len(Tokenizer.of(config))), config)
    square = mean_square(config)
    assert [found[f"image_fixed_t{t:g}"] for t in GRID] == pytest.approx(
        [square / (1 - t) ** 2 for t in GRID], rel=1e-5
    )
    assert found["image_fixed_t"] == pytest.approx(np.mean([square / (1 - t) ** 2 for t in GRID]), rel=1e-5)


def test_the_best_linear_field_has_the_known_loss_at_each_time(mixed: Config) -> None:
    """For Gaussian data of variance s^2, E|v - v*|^2 = s^2 / (t^2 s^2 + (1 - t)^2); it follows from second moments."""
    shard = str(write_tar(mixed.run.dir.parent / "many.tar", pairs(150)))
    config = override(mixed, {"data": {"val": [shard]}, "train": {"batch_rows": 128}})
    model = build_model(config, len(Tokenizer.of(config)))
    square = mean_square(config)

    def best(hidden_JD: Tensor, noised: Noised) -> Tensor:
        batch, j = noised.batch, noised.batch.loss_at_J
        x, eps, t = batch.x_IP[j], batch.eps_JKP[:, 0], noised.t_I[j].unsqueeze(1)
        z = t * x + (1 - t) * eps
        clean = t * square * z / (t**2 * square + (1 - t) ** 2)
        return ((clean - z) / (1 - t) - (x - eps)).square().mean(1)

    model.objective.loss = best
    found = flat(model, config)
    known = np.array([square / (t**2 * square + (1 - t) ** 2) for t in GRID])
    near = np.array([found[f"image_fixed_t{t:g}"] for t in GRID])
    half = np.array([found[f"image_fixed_t{t:g}_high"] for t in GRID]) - near
    assert (np.abs(near - known) < 2 * half).all()  # four standard errors
    assert (half < 0.15 * known).all()
    assert (np.abs(near - known) < half).sum() >= 6


def test_noise_of_each_time_and_image_is_its_own(mixed: Config) -> None:
    corpus = corpus_of(mixed)
    keys = [
        k for b in Views(corpus, corpus.patcher).batches(range(len(corpus.samples)), 4) for k in learned_keys(b.raw)
    ]
    assert len(keys) == len(set(keys)) == (9 + 6) * len(GRID)


def learned_keys(raw: RawBatch) -> list[int]:
    return raw.noise_key_C[raw.image_I[raw.loss_at_J].unique()].tolist()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_text_sees_clean_images_only(mixed: Config, objective: str) -> None:
    """And so does an image: all images before it are clean. `capped` would cap t of an image that text follows."""
    config = override(mixed, {"objective": {"time": {"distribution": "logit_normal"}, **OBJECTIVES[objective]}})
    corpus = corpus_of(config)
    seen = 0
    for views_ in Views(corpus, corpus.patcher).batches(range(len(corpus.samples)), 4):
        batch: Batch = prepare(views_.raw, corpus.patcher)
        context = torch.ones(len(batch.at_I), dtype=torch.bool)
        learned = batch.image_I[batch.loss_at_J].unique()
        context[torch.isin(batch.image_I, learned)] = False
        seen += int(context.sum())
        assert (batch.draws["t"][context] == 1).all()
        if "masked" in batch.draws:
            assert not batch.draws["masked"][context].any()
        times = batch.draws["t"][batch.loss_at_J].flatten().double().unique()
        assert torch.isin(times, torch.tensor(GRID, dtype=torch.float64)).all()
        # Nothing is scored after a learned image, which is the last in its document.
        assert not batch.noised_BS.any() or objective in ("masked",)
    assert seen


def test_a_context_of_noise_changes_the_text_after_images_alone(mixed: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = awake(mixed, torch.float32)
    clean = flat(model, mixed)
    context = TransfusionLayout.context

    def noisy(self, grid):
        block = context(self, grid)
        return replace(block, draws={"t": np.full_like(block.draws["t"], 0.4)})

    monkeypatch.setattr(TransfusionLayout, "context", noisy)
    peeked = flat(model, mixed)
    for name in ("text_before_image", "text_plain"):
        assert peeked[name] == pytest.approx(clean[name], rel=1e-6)
    assert abs(peeked["text_after_image"] - clean["text_after_image"]) > 1e-4


def test_text_losses_are_those_of_transformers(tmp_path: Path) -> None:
    """The loss that the backbone's own class computes, document by document."""
    texts = ["a red 7", "blue", "some longer words"]
    rng = np.random.default_rng(0)
    members: dict[str, bytes] = {}
    for i, text in enumerate(texts):
        members |= {f"{i}.png": png(picture(rng)), f"{i}.json": json.dumps({"caption": text}).encode()}
        members[f"p{i}.json"] = json.dumps({"caption": text[::-1]}).encode()
    config = tiny(tmp_path, data={"val": [str(write_tar(tmp_path / "a.tar", members))]})
    model, tokenizer = awake(config, torch.float32)
    plain = AutoModelForCausalLM.from_config(model.backbone.config, attn_implementation="eager").eval()
    plain.load_state_dict(model.backbone.state_dict())

    def reference(words: list[str]) -> float:
        total = 0.0
        for text in words:
            ids = torch.tensor([[tokenizer.bos, *tokenizer.encode(text)]])
            total += plain(input_ids=ids, labels=ids).loss.item() * len(text)
        return total / sum(map(len, words))

    found = flat(model, config)
    assert found["text_before_image"] == pytest.approx(reference(texts), rel=1e-5)
    assert found["text_plain"] == pytest.approx(reference([text[::-1] for text in texts]), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("objective", ["transfusion", "masked", "random"])
def test_losses_after_images_are_those_of_documents_alone(mixed: Config, objective: str) -> None:
    """Packing, batches and the sums over them change nothing: each view alone in a row has the same losses."""
    shard = str(write_tar(mixed.run.dir.parent / "few.tar", documents(1)))
    config = override(mixed, {"objective": OBJECTIVES[objective], "data": {"val": [shard]}})
    model, _ = awake(config, torch.float32)
    found = flat(model, config)
    corpus = corpus_of(config)
    made = Views(corpus, corpus.patcher)
    sums, counts = np.zeros(KINDS), np.zeros(KINDS)
    for index in range(len(corpus.samples)):
        for view in made.of_sample(0, index):
            losses: Losses = model(prepare(made._batch([[view]], 1).raw, corpus.patcher))
            kinds = np.array(view.kind_S)
            image = kinds[(kinds >= len(TEXT)) & (kinds < KINDS)]
            if len(image):
                sums[image[0]] += float(losses.image)
                counts[image[0]] += losses.image_count
                continue
            batch = made._batch([[view]], 1).raw
            for at, loss in zip(batch.label_at_L.tolist(), losses.text_L.tolist(), strict=True):
                sums[kinds[at + 1]] += loss
                counts[kinds[at + 1]] += 1
    names = (*TEXT, *(f"image_fixed_t{t:g}" for t in GRID))
    assert [found[name] for name in names] == pytest.approx((sums / counts).tolist(), rel=1e-5)


def test_mar_draws_the_same_masks_at_every_time(mixed: Config) -> None:
    config = override(mixed, {"objective": OBJECTIVES["masked"]})
    corpus = corpus_of(config)
    made = [view for view in Views(corpus, corpus.patcher).of_sample(0, 0) if KINDS in view.kind_S]
    masks = [view.strip.blocks[-1].block.draws["masked"] for view in made]
    assert len(masks) == len(GRID)
    assert all((mask == masks[0]).all() for mask in masks)
