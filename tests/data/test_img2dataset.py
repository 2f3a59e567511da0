"""Training on a folder that img2dataset wrote; the first case needs `pip install img2dataset`."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from data_prep.tokenizer import main as train_tokenizer
from mmgen.config import Config
from mmgen.config_io import override
from mmgen.data.shards.samples import BadRecord, read
from mmgen.train.loop import train
from tests.conftest import write_tar

COUNT, PER_SHARD = 240, 60
DOWNLOAD = """
import sys
from img2dataset import download

if __name__ == "__main__":
    download(
        url_list=sys.argv[1], output_folder=sys.argv[2], input_format="csv", caption_col="caption", thread_count=4,
        image_size=16, output_format="webdataset", number_sample_per_shard=int(sys.argv[3]), processes_count=1,
    )
"""
pytestmark = pytest.mark.slow


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def pictures() -> list[tuple[Image.Image, str]]:
    """Real handwritten digits, with captions."""
    digits = load_digits()
    values = np.rint(digits.images[:COUNT] * 255 / 16).astype(np.uint8)
    return [
        (Image.fromarray(image), f"a handwritten {label}") for image, label in zip(values, digits.target, strict=False)
    ]


def downloaded(folder: Path) -> Path:
    """A folder written by img2dataset from pictures on a local server; one address does not exist."""
    if importlib.util.find_spec("img2dataset") is None:
        pytest.skip("img2dataset is not installed")
    web, out = folder / "web", folder / "theirs"
    web.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(web)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with (folder / "list.csv").open("w") as file:
        lines = csv.writer(file)
        lines.writerow(["url", "caption"])
        for number, (picture, caption) in enumerate(pictures()):
            picture.save(web / f"{number}.png")
            lines.writerow([f"http://127.0.0.1:{server.server_port}/{number}.png", caption])
        lines.writerow([f"http://127.0.0.1:{server.server_port}/none.png", "nothing"])
    script = folder / "download.py"
    script.write_text(DOWNLOAD)
    command = [sys.executable, str(script), str(folder / "list.csv"), str(out), str(PER_SHARD)]
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"}
    try:
        subprocess.run(command, check=True, cwd=folder, timeout=600, capture_output=True, env=environment)
    finally:
        server.shutdown()
    return out


def imitated(folder: Path) -> Path:
    """The same layout, written by this test: NUMBER.tar with KEY.jpg, KEY.txt and KEY.json, and NUMBER_stats.json."""
    out = folder / "like-theirs"
    out.mkdir()
    shown = pictures()
    for shard in range(0, COUNT, PER_SHARD):
        members: dict[str, bytes] = {}
        for place, (picture, caption) in enumerate(shown[shard : shard + PER_SHARD]):
            buffer, key = io.BytesIO(), f"{shard // PER_SHARD:05d}{place:04d}"
            picture.convert("RGB").resize((16, 16)).save(buffer, format="JPEG", quality=95)
            meta = {
                "caption": caption, "url": f"http://localhost/{key}.png", "key": key, "status": "success",
                "error_message": None, "width": 16, "height": 16, "original_width": 8, "original_height": 8,
                "exif": "{}", "sha256": hashlib.sha256(buffer.getvalue()).hexdigest(),
            }  # fmt: skip
            members |= {f"{key}.jpg": buffer.getvalue(), f"{key}.txt": caption.encode()}
            members[f"{key}.json"] = json.dumps(meta, indent=4).encode()
        write_tar(out / f"{shard // PER_SHARD:05d}.tar", members)
        (out / f"{shard // PER_SHARD:05d}_stats.json").write_text(
            json.dumps({"count": PER_SHARD, "successes": PER_SHARD})
        )
    return out


@pytest.mark.parametrize("streams", [0, 2])
@pytest.mark.parametrize("made", [downloaded, imitated])
def test_a_folder_of_img2dataset_trains(tmp_path: Path, made: object, streams: int) -> None:
    """Only the path is set; captions, pictures and keys are those of the source, and the loss falls."""
    folder = made(tmp_path)  # type: ignore[operator]
    shards = str(folder / "*.tar")
    bad: list[BadRecord] = []
    samples = list(read([shards], bad))
    assert not bad
    assert sorted(sample.caption for sample in samples) == sorted(caption for _, caption in pictures())
    assert all(sample.meta["status"] == "success" and sample.meta["key"] == sample.key for sample in samples)
    train_tokenizer(shards, out=tmp_path / "tokenizer.json")
    settings = {
        "run": {"dir": str(tmp_path / "run")},
        "data": {"train": [shards], "tokenizer": str(tmp_path / "tokenizer.json"), "streams": streams},
        "train": {"steps": 20, "log_every": 1, "tensorboard": False, "sample_every": 0, "warmup_steps": 5},
    }
    assert train(override(Config(), settings)) == 0
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 20
    assert np.isfinite(losses).all()
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])
    assert not (tmp_path / "run" / "quarantine.jsonl").exists()
