"""Adding experts: every layer of the backbone receives the modality of every position."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmgen.backbone import attention_mask
from mmgen.config import Config
from mmgen.config_io import override
from mmgen.data.loader import Corpus
from mmgen.generate.decoder import Decoder, Request
from tests.conftest import awake, ready


class Experts(nn.Module):
    """One feed-forward network per modality."""

    def __init__(self, text: nn.Module, image: nn.Module) -> None:
        super().__init__()
        self.text, self.image = text, image
        self.modality: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.where(self.modality.unsqueeze(-1) > 0, self.image(hidden), self.text(hidden))


def layers_of(model: Any) -> nn.ModuleList:
    return model.backbone.get_decoder().layers


def watch(model: Any) -> list[Tensor]:
    """The modality that each layer receives, one tensor per call."""
    seen: list[Tensor] = []
    for layer in layers_of(model):
        layer.register_forward_pre_hook(lambda _, args, named: seen.append(named["modality"]), with_kwargs=True)
    return seen


@pytest.mark.parametrize("model_type", ["qwen3", "llama", "mistral", "gemma"])
def test_every_layer_receives_the_modality_of_every_position(config: Config, model_type: str) -> None:
    extra = {"sliding_window": "null"} if model_type == "mistral" else {}
    config = override(config, {"model": {"backbone": {"model_type": model_type, "extra": extra}}})
    model, tokenizer = awake(config, torch.float32)
    corpus = Corpus(config.data.train, tokenizer, config)
    batch = ready(corpus, corpus.step(1, [next(corpus.plan.epoch_rows(0))], corpus.start).micro[0])
    seen = watch(model)
    model(batch)
    assert len(seen) == model.backbone.config.num_hidden_layers
    at_patches = torch.zeros(batch.ids_BS.numel(), dtype=torch.long)
    at_patches[batch.at_I] = 1
    assert 0 < at_patches.sum() < len(at_patches)
    assert all(torch.equal(modality.flatten(), at_patches) for modality in seen)


def test_experts_separate_text_from_images(config: Config) -> None:
    """A change of the image expert does not change positions before the first image."""
    model, tokenizer = awake(config)
    for layer in layers_of(model):
        layer.mlp = Experts(layer.mlp, nn.Linear(32, 32).double())
        layer.register_forward_pre_hook(
            lambda layer, args, named: setattr(layer.mlp, "modality", named["modality"]), with_kwargs=True
        )
    corpus = Corpus(config.data.train, tokenizer, config)
    batch = ready(corpus, corpus.step(1, [next(corpus.plan.epoch_rows(0))], corpus.start).micro[0], torch.float64)

    def hidden() -> Tensor:
        with torch.no_grad():
            inputs, _ = model.embed(batch)
            return model.hidden(inputs, batch.position_BS, attention_mask(batch.sites), batch.modality)[0]

    before = hidden()
    with torch.no_grad():
        for layer in layers_of(model):
            layer.mlp.image.weight += 1
    changed = (hidden() - before).abs().amax(-1) > 1e-9
    image = batch.modality[0] > 0
    first = int(torch.nonzero(image)[0])
    assert not changed[:first].any()
    assert changed[image].all()


def test_the_decoder_passes_the_modality_too(config: Config) -> None:
    """While an image is drawn, its positions have the image modality, as in training."""
    model, tokenizer = awake(config, torch.float32)
    seen = watch(model)
    Decoder(model, tokenizer, config.sample).generate([Request(["ab"], "image", 1)])
    patches = {int(modality.sum(1).max()) for modality in seen}
    assert patches == {0, 4}
