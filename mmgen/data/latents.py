"""What a run must know of its autoencoder before it starts: whose latents these are, and how they are normalised."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from mmgen.config import Config
from mmgen.data.documents import DecodedImage
from mmgen.data.loader import Corpus
from mmgen.data.shards.samples import BadSample
from mmgen.image.latent import Autoencoder, AutoencoderFacts, LatentPatcher, Statistics, known_statistics
from mmgen.image.patch import join
from mmgen.sequence.tokenizer import Tokenizer

IMAGES = 512
"""Images whose latents are measured."""


def find_facts(config: Config, tokenizer: Tokenizer) -> AutoencoderFacts | None:
    """What a new run must know of its autoencoder; None for a run on pixels.

    The weights are read. Mean and standard deviation per channel come from the settings or from the autoencoder's
    configuration; where both are silent, they are measured on the first images that the run will see.

    Raises:
        ValueError: the autoencoder cannot be loaded, or does not fit the settings.
    """
    if config.model.patcher.kind != "vae":
        return None
    patcher = LatentPatcher(config.model.patcher, device())
    found = known_statistics(config.model.patcher, patcher.autoencoder)
    found = found or measure(config, tokenizer, patcher.autoencoder)
    return AutoencoderFacts(patcher.fingerprint, found.mean, found.std)


def device() -> str:
    """Where this process computes latents on its own."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def measure(config: Config, tokenizer: Tokenizer, autoencoder: Autoencoder, images: int = IMAGES) -> Statistics:
    """Mean and standard deviation per channel of the latents of the first images of a run.

    Raises:
        ValueError: no image of the training shards can be read.
    """
    channels, patch = config.model.patcher.vae.channels, config.model.patcher.patch_size
    plain = AutoencoderFacts(autoencoder.fingerprint, [0.0] * channels, [1.0] * channels)
    corpus = Corpus(config.data.train, tokenizer, config, plain)
    patcher = LatentPatcher(config.model.patcher, device(), plain)
    patcher.autoencoder = autoencoder
    found: list[NDArray[np.float64]] = []
    for image in islice(_images(corpus), images):
        ready = image.x_NP
        if ready.dtype == np.uint8:
            ready = patcher.encode_pixels(torch.from_numpy(ready)[None], image.grid)[0].cpu().numpy()
        found.append(join(ready, image.grid, patch).reshape(-1, channels).astype(np.float64))
    if not found:
        raise ValueError("latents cannot be measured: no image of data.train can be read")
    cells = np.concatenate(found)
    return Statistics(cells.mean(0).tolist(), np.maximum(cells.std(0), 1e-6).tolist())


def _images(corpus: Corpus) -> Iterator[DecodedImage]:
    """The images of an epoch in its order, those that cannot be read left out."""
    for row in corpus.plan.epoch_rows(0):
        for document in row:
            try:
                decoded = corpus.decoded(document.epoch, document.index)
            except BadSample:
                continue
            yield from (image for image in decoded.segments if isinstance(image, DecodedImage))
