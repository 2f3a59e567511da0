"""What a run must know of its autoencoder before it starts: whose latents these are, and how they are normalised."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmgen.config import Config, VAEConfig
from mmgen.data.loader import Corpus
from mmgen.data.shards.samples import BadSample
from mmgen.image.latent import Autoencoder, LatentPatcher, Statistics
from mmgen.image.patch import Grid, join
from mmgen.sequence.tokenizer import Tokenizer

IMAGES = 512
"""Images whose latents are measured."""


def settled(config: Config, tokenizer: Tokenizer | None, trainer: dict[str, Any] | None = None) -> Config:
    """The configuration with fingerprint and normalisation of its autoencoder filled in where they are left out.

    They are those of a checkpoint's record `trainer`, where there is one. For a new run the weights are read, and mean
    and standard deviation per channel come from the autoencoder's configuration or, where it has none, from the first
    images that the run will see.

    Raises:
        ValueError: the autoencoder cannot be loaded, or does not fit the settings.
    """
    vae = config.model.patcher.vae
    if not config.model.patcher.latent or (vae.fingerprint and vae.mean and vae.std):
        return config
    if trainer is not None:
        stored = trainer["config"]["model"]["patcher"].get("vae") or {}
        facts = {name: stored.get(name) for name in ("fingerprint", "mean", "std")}
    else:
        patcher = LatentPatcher(config.model.patcher, device())
        statistics = patcher.autoencoder.statistics
        if statistics is None and not (vae.mean and vae.std):
            assert tokenizer is not None
            statistics = measure(config, tokenizer, patcher.autoencoder)
        mean, std = statistics or (None, None)
        facts = {"fingerprint": patcher.fingerprint, "mean": mean, "std": std}
    missing = {name: value for name, value in facts.items() if getattr(vae, name) is None}
    return _with_vae(config, vae.model_copy(update=missing))


def _with_vae(config: Config, vae: VAEConfig) -> Config:
    patcher = config.model.patcher.model_copy(update={"vae": vae})
    return config.model_copy(update={"model": config.model.model_copy(update={"patcher": patcher})})


def device() -> str:
    """Where this process computes latents on its own."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def measure(config: Config, tokenizer: Tokenizer, autoencoder: Autoencoder, images: int = IMAGES) -> Statistics:
    """Mean and standard deviation per channel of the latents of the first images of a run.

    Raises:
        ValueError: no image of the training shards can be read.
    """
    channels, patch = config.model.patcher.vae.channels, config.model.patcher.patch_size
    plain = {"mean": [0.0] * channels, "std": [1.0] * channels, "fingerprint": autoencoder.fingerprint}
    config = _with_vae(config, config.model.patcher.vae.model_copy(update=plain))
    corpus, patcher = Corpus(config.data.train, tokenizer, config), LatentPatcher(config.model.patcher, device())
    patcher.autoencoder = autoencoder
    found: list[NDArray[np.float64]] = []
    for x, grid in islice(_images(corpus), images):
        ready = x if x.dtype == np.float32 else patcher.encode_rows(torch.from_numpy(x)[None], grid)[0].cpu().numpy()
        found.append(join(ready, grid, patch).reshape(-1, channels).astype(np.float64))
    if not found:
        raise ValueError("latents cannot be measured: no image of data.train can be read")
    cells = np.concatenate(found)
    return cells.mean(0).tolist(), np.maximum(cells.std(0), 1e-6).tolist()


def _images(corpus: Corpus) -> Iterator[tuple[NDArray[Any], Grid]]:
    """Rows of the images of an epoch in its order, those that cannot be read left out."""
    for row in corpus.plan.epoch_rows(0):
        for document in row:
            try:
                _, decoded = corpus.decoded(document.epoch, document.index)
            except BadSample:
                continue
            yield from (segment for segment in decoded if isinstance(segment, tuple))
