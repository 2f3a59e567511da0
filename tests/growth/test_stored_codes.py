"""Adding a kind of patch: shards with codes instead of images, from the tar file to the loss of an objective."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mmgen.config import Config
from mmgen.config_io import override
from mmgen.data.loader import Corpus
from mmgen.generate.decoder import Decoder, Request
from mmgen.sequence.tokenizer import Tokenizer
from mmgen.train.checkpoint.read import load_model
from mmgen.train.loop import train
from tests.conftest import ready, write_tar
from tests.growth.test_objective import discrete  # noqa: F401 - a fixture


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.fixture
def stored(discrete: Config, tmp_path: Path) -> tuple[Config, dict[str, np.ndarray]]:  # noqa: F811
    """The settings of a run on a shard with twelve captioned arrays of codes, and the arrays by caption."""
    rng, arrays, members = np.random.default_rng(0), dict[str, np.ndarray](), dict[str, bytes]()
    for i in range(12):
        arrays[f"codes {i}"] = rng.integers(0, 8, (2, 2) if i % 3 else (3, 2))
        members[f"{i:02d}.npy"] = npy(arrays[f"codes {i}"])
        members[f"{i:02d}.json"] = json.dumps({"caption": f"codes {i}"}).encode()
    shard = str(write_tar(tmp_path / "codes.tar", members))
    return override(discrete, {"data": {"train": [shard], "val": [], "caption_drop": 0.0}}), arrays


def test_the_model_learns_the_codes_of_a_shard(stored: tuple[Config, dict[str, np.ndarray]]) -> None:
    config, arrays = stored
    tokenizer = Tokenizer.of(config)
    corpus = Corpus(config.data.train, tokenizer, config)
    (raw,) = corpus.first_step().micro
    assert raw.patches_UP.dtype == torch.int64
    batch = ready(corpus, raw)
    assert batch.x_IP.dtype == torch.int64
    found = []
    for image in batch.image_I.unique():
        rows, columns = (batch.cell_I2[batch.image_I == image].amax(0) + 1).tolist()
        found.append(batch.x_IP[batch.image_I == image].reshape(rows, columns).tolist())
    assert len(found) >= 4
    assert all(codes in [array.tolist() for array in arrays.values()] for codes in found)


def test_a_run_on_codes_memorises_them(stored: tuple[Config, dict[str, np.ndarray]]) -> None:
    config, arrays = stored
    config = override(
        config, {"train": {"steps": 250, "save_every": 250, "lr": 0.01}, "sample": {"guidance_scale": 1.0}}
    )
    assert train(config) == 0
    model, tokenizer = load_model(config.run.dir / "checkpoints" / "latest", "weight")
    decoder, drawn = Decoder(model, tokenizer, config.sample), []
    pictures = decoder.patcher.pictures
    decoder.patcher.pictures = lambda x_RNP, grid: drawn.extend(x_RNP) or pictures(x_RNP, grid)
    chosen = [caption for caption, array in arrays.items() if array.shape == (2, 2)]
    decoder.generate([Request([caption], "image", grid=(2, 2)) for caption in chosen])
    right = [
        codes.ravel().tolist() == arrays[caption].ravel().tolist() for caption, codes in zip(chosen, drawn, strict=True)
    ]
    assert sum(right) >= 0.75 * len(right)


def test_pixels_refuse_codes(stored: tuple[Config, dict[str, np.ndarray]]) -> None:
    config, _ = stored
    pixels = {"model": {"patcher": {"kind": "pixels", "patch_size": 2}}, "objective": {"kind": "transfusion"}}
    with pytest.raises(ValueError, match="holds codes, but model.patcher.kind is pixels"):
        Corpus(config.data.train, Tokenizer.of(config), override(config, pixels))
