"""Facts of an autoencoder that a run needs before it starts: its fingerprint and the statistics of its latents."""

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
from mmgen.data.progress import Progress
from mmgen.data.shards.samples import BadSample
from mmgen.image.latent import Autoencoder, AutoencoderFacts, LatentPatcher, Statistics, known_statistics
from mmgen.image.patch import join
from mmgen.sequence.tokenizer import Tokenizer

IMAGES = 512
"""Number of images whose latents are measured."""


def find_facts(config: Config, tokenizer: Tokenizer) -> AutoencoderFacts | None:
    """The facts of the autoencoder of a new run; None for a run on pixels.

    The weights are loaded. Mean and standard deviation per channel come from the settings or from the autoencoder's
    configuration. If neither has them, they are measured on the first images of the run.

    Raises:
        ValueError: the autoencoder cannot be loaded, or does not fit the settings.
    """
    if config.model.patcher.kind != "vae":
        return None
    patcher = LatentPatcher(config.model.patcher, device())
    statistics = known_statistics(config.model.patcher, patcher.autoencoder)
    statistics = statistics or measure(config, tokenizer, patcher.autoencoder)
    return AutoencoderFacts(patcher.fingerprint, statistics.mean, statistics.std)


def device() -> str:
    """The device on which this process computes latents."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def measure(config: Config, tokenizer: Tokenizer, autoencoder: Autoencoder, images: int = IMAGES) -> Statistics:
    """Mean and standard deviation per channel of the latents of the first `images` images of a run.

    Raises:
        ValueError: no image of the training shards can be read.
    """
    channels, patch = config.model.patcher.vae.channels, config.model.patcher.patch_size
    plain = AutoencoderFacts(autoencoder.fingerprint, [0.0] * channels, [1.0] * channels)
    corpus = Corpus(config.data.train, tokenizer, config, plain)
    patcher = LatentPatcher(config.model.patcher, device(), plain)
    patcher.autoencoder = autoencoder
    measured: list[NDArray[np.float64]] = []
    with Progress("measuring latents", "images", images, quiet=True) as progress:
        for image in progress.each(islice(_images(corpus), images)):
            latent = image.x_NP
            if latent.dtype == np.uint8:
                latent = patcher.encode_pixels(torch.from_numpy(latent)[None], image.grid)[0].cpu().numpy()
            measured.append(join(latent, image.grid, patch).reshape(-1, channels).astype(np.float64))
    if not measured:
        raise ValueError(
            "latents cannot be measured: no image of data.train can be read. `mmgen data check` lists the reasons"
        )
    cells = np.concatenate(measured)
    return Statistics(cells.mean(0).tolist(), np.maximum(cells.std(0), 1e-6).tolist())


def _images(corpus: Corpus) -> Iterator[DecodedImage]:
    """The images of the first epoch in its order; images that cannot be read are skipped."""
    for row in corpus.plan.epoch_rows(0):
        for document in row:
            try:
                decoded = corpus.decoded(document.epoch, document.index)
            except BadSample:
                continue
            yield from (image for image in decoded.segments if isinstance(image, DecodedImage))
