"""Helpers that many tests share: tiny configurations, models, pictures and shards. Nothing is downloaded."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from tokenizers import Tokenizer as TextTokenizer
from tokenizers import decoders, models, pre_tokenizers

from mmgen import cli
from mmgen.config import Config, PatcherConfig
from mmgen.config_io import override
from mmgen.data.loader import Documents
from mmgen.image.patch import Patches, PixelPatcher
from mmgen.model import MMGenConfig, MMGenModel
from mmgen.sequence.batch import Batch, RawBatch, RowFormat, collate, prepare
from mmgen.sequence.document import Block
from mmgen.sequence.tokenizer import Tokenizer
from mmgen.train.loop import train

torch.set_num_threads(1)
GRIDS = [(2, 2), (3, 2)]


def text_tokenizer() -> TextTokenizer:
    """A tokenizer whose tokens are bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = TextTokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def tiny(tmp: Path, **changes: dict) -> Config:
    """Settings of a model of a few thousand parameters on 4x4 and 6x4 RGB pictures with 2x2 patches."""
    text_tokenizer().save(str(tmp / "tokenizer.json"))
    base = {
        "run": {"dir": str(tmp / "run"), "seed": 3},
        "data": {"tokenizer": str(tmp / "tokenizer.json"), "row_length": 48, "window": 16, "workers": 0},
        "model": {
            "backbone": {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "intermediate_size": 48,
            },
            "patcher": {"patch_size": 2, "image_sizes": [[4, 4], [6, 4]]},
        },
        "train": {
            "steps": 6, "batch_rows": 4, "warmup_steps": 2, "precision": "fp32", "tensorboard": False,
            "log_every": 1, "save_every": 3, "sample_every": 0,
        },
        "sample": {"steps": 4, "max_new_tokens": 6},
    }  # fmt: skip
    config = override(Config(), base)
    return override(config, changes) if changes else config


def awake(config: Config, dtype: torch.dtype = torch.float64) -> tuple[MMGenModel, Tokenizer]:
    """A model whose zero-initialised weights are random, so that no error is hidden by a zero."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.of(config)
    model = MMGenModel(MMGenConfig.of(config, len(tokenizer))).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval(), tokenizer


def packed(
    rows: list,
    length: int,
    tokenizer: Tokenizer,
    nothing: Block,
    patch_length: int,
    dtype: torch.dtype | None = None,
    noise_draws: int = 1,
) -> Batch:
    """Documents whose patches are final values, packed into rows and prepared for the model."""
    raw = collate(rows, RowFormat(length, tokenizer, nothing, Patches(patch_length, np.float32), noise_draws))
    return prepare(raw, PixelPatcher(PatcherConfig()), "cpu", dtype)


def ready(corpus: Documents, raw: RawBatch, dtype: torch.dtype | None = None) -> Batch:
    """A batch of the loader, prepared for the model."""
    return prepare(raw, corpus.patcher, "cpu", dtype)


def picture(rng: np.random.Generator, size: tuple[int, int] = (4, 4)) -> Image.Image:
    """A random RGB picture of (height, width)."""
    return Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    """Write a plain tar file with Python's library, not with ours."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pairs(count: int, seed: int = 0) -> dict[str, bytes]:
    """The members of a shard of captioned pictures: file name to bytes."""
    rng = np.random.default_rng(seed)
    members: dict[str, bytes] = {}
    for i in range(count):
        members[f"{i:04d}.png"] = png(picture(rng, (4, 4) if i % 3 else (6, 4)))
        members[f"{i:04d}.json"] = json.dumps({"caption": f"picture {i}"}).encode()
    return members


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the tests of several processes, the longest ones, so that none of them runs alone at the end."""
    items.sort(key=lambda item: item.path.name != "test_scale.py")


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> None:
    """Reset accelerate, which holds one precision per process, because tests use several."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    shard = write_tar(tmp_path / "train-000.tar", pairs(40))
    return tiny(tmp_path, data={"train": [str(shard)], "val": [str(shard)]})


@pytest.fixture(scope="session")
def six_steps(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The settings of a run of six steps on 4x4 and 6x4 pictures. Tests must not change its folder."""
    folder = tmp_path_factory.mktemp("trained")
    shard = write_tar(folder / "train-000.tar", pairs(40))
    config = tiny(folder, data={"train": [str(shard)], "val": [str(shard)]})
    assert train(config) == 0
    return config


def run(capsys: pytest.CaptureFixture, *words: object) -> tuple[int, str, str]:
    """Run the command `mmgen` in this process; returns exit code, standard output and standard error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["mmgen", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
    captured = capsys.readouterr()
    return int(stop.value.code), captured.out, captured.err
