"""Real handwritten digits as shards: `python -m data_prep.digits --out data/digits`.

The 1,797 images of 8x8 pixels of scikit-learn's `load_digits` (Alpaydin and Kaynak 1998) in a fixed stratified split
into disjoint train, val, judge and test shards. Each sample is a PNG and a JSON with caption and label. `val` is for
choosing settings, `test` for reported scores, and the judge of `mmgen eval` is trained on `judge`.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated, Any

import cyclopts
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from webdataset import ShardWriter

from data_prep import run, writable

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a {digit}",
    "the digit {digit}",
    "a handwritten {digit}",
    "an image of a {digit}",
    "a drawing of the number {digit}",
    "{digit}",
)
SHARES = {"train": 0.7, "judge": 0.18, "test": 0.12}
VALIDATION = 0.1
"""Share of the train part that becomes `val`."""
SPLIT_SEED = 20
Split = dict[str, tuple[NDArray[np.uint8], NDArray[np.int64]]]


def split() -> Split:
    """Name of a part to (images [n, 8, 8] with pixel values in 0..255, labels [n]); the parts share no image."""
    data = load_digits()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)
    index = np.arange(len(images))
    train, rest = train_test_split(index, train_size=SHARES["train"], stratify=data.target, random_state=SPLIT_SEED)
    judge, test = train_test_split(
        rest,
        train_size=SHARES["judge"] / (1 - SHARES["train"]),
        stratify=data.target[rest],
        random_state=SPLIT_SEED,
    )
    train, val = train_test_split(train, test_size=VALIDATION, stratify=data.target[train], random_state=SPLIT_SEED)
    # Captions are drawn in this order, so judge and test do not depend on the share of `val`.
    parts = {"train": train, "val": val, "judge": judge, "test": test}
    return {name: (images[part], data.target[part].astype(np.int64)) for name, part in parts.items()}


def png(pixels: NDArray[np.uint8]) -> bytes:
    """PNG bytes of a grey [H, W] or RGB [H, W, 3] picture."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def write(out: Path, name: str, samples: list[dict[str, Any]], per_shard: int) -> None:
    """Write one part as `NAME-000000.tar`, ...; a file gets its final name only when it is complete."""
    writable(out)
    with ShardWriter(str(out / f"{name}-%06d.tar.part"), maxcount=per_shard, verbose=0, encoder=True) as sink:
        for i, sample in enumerate(samples):
            sink.write({"__key__": f"{name}-{i:06d}", **sample})
    for part in sorted(out.glob(f"{name}-*.tar.part")):
        part.rename(part.with_suffix(""))


def caption(digit: int, rng: np.random.Generator) -> str:
    """One of the templates, with the digit as a numeral or a word."""
    name = str(digit) if rng.random() < 0.5 else WORDS[digit]
    return TEMPLATES[int(rng.integers(len(TEMPLATES)))].format(digit=name)


def main(*, out: Annotated[Path, cyclopts.Parameter(help="Folder to write.")] = Path("data/digits")) -> None:
    """Write train, val, judge and test shards of handwritten digits."""
    rng = np.random.default_rng(SPLIT_SEED)
    for name, (images, labels) in split().items():
        samples = [
            {"png": png(image), "json": {"caption": caption(int(label), rng), "objects": [{"digit": int(label)}]}}
            for image, label in zip(images, labels, strict=True)
        ]
        write(out, name, samples, per_shard=1000)
        print(f"{name}: {len(samples)} digits in {out}")


if __name__ == "__main__":
    run(main)
