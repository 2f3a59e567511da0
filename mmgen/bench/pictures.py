"""The part of `mmgen bench data` that decodes photographs: the loader against the bare decoder, for each objective.

The pictures are 512x512 JPEG files with the power spectrum of photographs, made from a fixed seed. The loader reads
them for a model of 256x256 pixels in patches of 16x16, as in training: it picks documents, decodes, resizes, tokenizes,
draws t and masks, packs rows, and packs what it sends. Not counted is the copy of that into shared memory, by which
torch's DataLoader hands it over. The bare decoder only turns the bytes of a file into an array of 256x256 pixels, with
Pillow and the same resizing.
"""

from __future__ import annotations

import io
import itertools
import pickle
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmgen.config import Config
from mmgen.config_io import override
from mmgen.data.documents import Share, Step
from mmgen.data.loader import Corpus
from mmgen.image.resize import draft, fit
from mmgen.sequence.tokenizer import Tokenizer

OBJECTIVES = ("transfusion", "mar")
PICTURES = 64
SIDE, TRAINED_SIDE = 512, 256
QUALITY = 90


@dataclass(frozen=True)
class PictureTimes:
    """Speed and size of what a loader worker sends; dictionaries are by objective. Rates are of processor time."""

    images_per_s_per_core: dict[str, float]
    bare_images_per_s_per_core: float
    over_bare_decode: dict[str, float]
    """The rate of the loader over that of the bare decoder: the median over all pairs of timings."""
    megabytes_per_image: dict[str, float]
    """Bytes that a worker sends for each image, in units of 10^6."""


def photographs(count: int) -> Iterator[bytes]:
    """Yield JPEG files of noise whose amplitude falls with one over the frequency, as it does in photographs.

    Source of the spectrum: Field 1987. Brightness varies more than the two colour channels.
    """
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE))
    amplitude = 1 / np.maximum(frequency, 1 / SIDE)
    amplitude[0, 0] = 0
    for _ in range(count):
        phases = rng.standard_normal((3, *amplitude.shape, 2)) @ np.array([1, 1j])
        channels = np.fft.irfft2(amplitude * phases, s=(SIDE, SIDE))
        spread = np.array([40.0, 10.0, 10.0]) / channels.std(axis=(1, 2))
        values = np.clip(128 + spread[:, None, None] * channels, 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(values.transpose(1, 2, 0), "YCbCr").save(file, "JPEG", quality=QUALITY)
        yield file.getvalue()


def write_shard(path: Path, files: list[bytes]) -> None:
    """Write captioned JPEG files as a WebDataset shard."""
    with tarfile.open(path, "w") as tar:
        for number, file in enumerate(files):
            caption = f"a picture of something, number {number}".encode()
            for extension, data in (("jpg", file), ("txt", caption)):
                member = tarfile.TarInfo(f"{number:04d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def settings_of(config: Config, objective: str, shard: Path) -> Config:
    """The settings of a configuration, with this objective, this shard and a model of 256x256 pixels."""
    side = TRAINED_SIDE
    patcher = {"kind": "pixels", "channels": 3, "patch_size": 16, "image_sizes": [(side, side)], "projection": "linear"}
    data = {
        "train": [str(shard)], "row_length": 1152, "window": PICTURES, "cache_bytes": 0, "workers": 0, "streams": 0,
        "crop": "center", "image_first": 0.2,
    }  # fmt: skip
    return override(config, {
        "data": data, "model": {"patcher": patcher}, "train": {"batch_rows": 8, "micro_rows": None},
        "objective": {"kind": objective, "bidirectional": None},
    })  # fmt: skip


def steps_without_end(corpus: Corpus) -> Iterator[Step]:
    """Yield the steps of a run."""
    return corpus.steps(0, 2**31, corpus.start, Share())


def sent_bytes(step: Step) -> int:
    """Bytes that a worker sends for a step."""
    return sum(len(pickle.dumps(batch, pickle.HIGHEST_PROTOCOL)) for batch in step.micro)


def bare_decoder(config: Config) -> Callable[[bytes], Any]:
    """Return the function from a JPEG file to an array of pixels [H, W, 3] that a loader needs at least."""
    sizes = config.model.patcher.image_sizes

    def decode(file: bytes) -> Any:
        image = Image.open(io.BytesIO(file))
        draft(image, sizes)
        return np.asarray(fit(image, 3, sizes, config.data.resize))

    return decode


def bench_pictures(
    config: Config, rounds: int, report: Callable[[str], None], pictures: int = PICTURES
) -> PictureTimes:
    """Time the loader against the bare decoder in alternation, for about `pictures` images per round and objective.

    Each step of the loader is followed by the bare decoder on as many images, so that other load on the machine affects
    both; a figure is the median over all these pairs.
    """
    files = list(photographs(PICTURES))
    seconds: dict[str, list[float]] = {name: [] for name in OBJECTIVES}
    bare: dict[str, list[float]] = {name: [] for name in OBJECTIVES}
    sizes = {}
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "photographs.tar"
        write_shard(shard, files)
        sources = {}
        for name in OBJECTIVES:
            chosen = settings_of(config, name, shard)
            source = steps_without_end(Corpus(chosen.data.train, Tokenizer.of(chosen), chosen))
            first = [next(source) for _ in range(8)]
            sizes[name] = sum(map(sent_bytes, first)) / sum(step.images for step in first)
            sources[name] = source
        decode, following = bare_decoder(chosen), itertools.cycle(files)
        for number in range(rounds):
            done = dict.fromkeys(OBJECTIVES, 0)
            while min(done.values()) < pictures:
                for name, source in sources.items():
                    began = time.process_time()
                    step = next(source)
                    for batch in step.micro:
                        batch.__getstate__()
                    middle = time.process_time()
                    for file in itertools.islice(following, step.images):
                        decode(file)
                    seconds[name].append((middle - began) / step.images)
                    bare[name].append((time.process_time() - middle) / step.images)
                    done[name] += step.images
            shares = ", ".join(f"{name} {_ratio(bare[name], seconds[name]):.2f}" for name in OBJECTIVES)
            report(f"photographs, round {number + 1} of {rounds}: {shares} of the bare decoder's speed")
    return PictureTimes(
        images_per_s_per_core={name: 1 / statistics.median(times) for name, times in seconds.items()},
        bare_images_per_s_per_core=1 / statistics.median(itertools.chain(*bare.values())),
        over_bare_decode={name: _ratio(bare[name], seconds[name]) for name in OBJECTIVES},
        megabytes_per_image={name: size / 1e6 for name, size in sizes.items()},
    )


def _ratio(bare: list[float], seconds: list[float]) -> float:
    """Return the median of the bare decoder's seconds over the loader's."""
    return statistics.median(one / other for one, other in zip(bare, seconds, strict=True))
