"""Latents of the images of shards, as new shards: `python -m data_prep.latents --config FILE --out FOLDER [SHARD...]`.

Shard names and keys are kept, and therefore the order and the noise of a run: training on the latents equals training
on the images. Each image becomes a `.safetensors` member with the tensor `latent` [C, h, w], not normalised, and the
fingerprint of the autoencoder in its header; text is copied. The same command resumes after an interruption, because a
shard gets its name only when it is complete.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import cyclopts
import numpy as np
import torch
from safetensors.numpy import save
from webdataset import TarWriter

from data_prep import log, run, writable
from data_prep.shards import read_note
from mmgen.config import Config, SourceConfig
from mmgen.config_io import load
from mmgen.data.latents import device
from mmgen.data.progress import Progress
from mmgen.data.shards import store
from mmgen.data.shards.index import find
from mmgen.data.shards.pictures import open_image
from mmgen.data.shards.samples import ARRAYS, IMAGES, BadRecord, BadSample, Group, damage, groups
from mmgen.data.shards.tar import Damaged
from mmgen.data.tools.findings import folded_bad
from mmgen.image.latent import LatentPatcher
from mmgen.image.resize import draft, fit
from mmgen.train.checkpoint.read import differences

AHEAD = 8
"""Number of batches that are read before they are encoded, so that images of equal size are encoded together."""
Sample = dict[str, Any]
"""The key and the members by extension; an image that is not encoded yet is an array [H, W, C]."""


def main(
    *shards: Annotated[str, cyclopts.Parameter(help="Shards of images; by default those of data.train and data.val.")],
    config: Annotated[Path, cyclopts.Parameter(help="YAML file of the run that will read the latents.")],
    out: Annotated[Path, cyclopts.Parameter(help="Folder to write.")],
    half: Annotated[bool, cyclopts.Parameter(help="Store 16 instead of 32 bits per number.", negative="")] = False,
) -> None:
    """Write the latents of shards of images as new shards of the same names and keys; repeat the command to resume."""
    settings = load(config)
    patterns: list[str | SourceConfig] = [*shards] or [*settings.data.train, *settings.data.val]
    sources = list(dict.fromkeys(store.expand(patterns)))
    targets = {out / plain(store.name(shard)): shard for shard in sources}
    if len(targets) < len(sources):
        raise ValueError("two shards have the same name: encode them in two commands with different --out folders")
    if not settings.model.patcher.latent:
        raise ValueError(f"{config} trains on pixels: set model.patcher.kind to vae and name the autoencoder")
    if settings.data.crop != "center":
        raise ValueError("data.crop is random, but a stored latent has one crop: set data.crop to center")
    patcher = LatentPatcher(settings.model.patcher, device())
    _same_as_before(out, settings, patcher, half)
    bad = 0
    for number, (target, shard) in enumerate(targets.items(), 1):
        if target.exists():
            log(f"{target}: exists ({number} of {len(targets)})")
            continue
        bad += write(target, shard, settings, patcher, half)
        log(f"{target}: written ({number} of {len(targets)})")
    print(f"{len(targets)} shards of latents in {out}" + (f"; {bad} samples left out" if bad else ""))


def plain(name: str) -> str:
    """The name of a shard without the ending of its compression."""
    return re.sub(r"(\.tar)?\.(gz|tgz|zst)$", ".tar", name)


def _same_as_before(out: Path, config: Config, patcher: LatentPatcher, half: bool) -> None:
    """Store the settings of the latents in their folder; raises ValueError if it holds latents of other settings."""
    patch = config.model.patcher
    made = {
        "vae": patch.vae.name,
        "fingerprint": patcher.autoencoder.fingerprint,
        "image_sizes": [list(size) for size in patch.image_sizes],
        "resize": config.data.resize,
        "half": half,
    }
    note = writable(out) / "latents.json"
    changed = differences(made, read_note(note)) if note.exists() else []
    if [item for item in changed if not item.startswith("vae ")]:
        raise ValueError(
            f"{out} holds latents that were made with other settings: {'; '.join(changed)}. Choose another --out"
        )
    note.write_text(json.dumps(made, indent=1) + "\n")


def write(target: Path, shard: str, config: Config, patcher: LatentPatcher, half: bool) -> int:
    """Write one shard of latents; returns the number of samples that were left out."""
    part, bad, index = target.with_name(target.name + ".part"), list[BadRecord](), find(shard, config.data)
    source = samples(shard, config, bad)
    progress = Progress(f"encoding {store.name(shard)}", "images", index.meta.pictures if index else None)
    with (
        progress,
        part.open("wb") as file,
        TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT") as sink,
    ):
        while chunk := list(islice(source, AHEAD * config.model.patcher.vae.batch)):
            encode(chunk, patcher, half, progress)
            for sample in chunk:
                sink.write(sample)
    part.rename(target)
    for line in folded_bad(bad):
        log(f"left out: {line}")
    return len(bad)


def samples(shard: str, config: Config, bad: list[BadRecord]) -> Iterator[Sample]:
    """The samples of a shard, with images as they enter the autoencoder; unreadable samples are appended to `bad`."""
    name = store.name(shard)
    with store.stream(shard, config.data.limits) as file:
        try:
            for group in groups(file, config.data.limits):
                try:
                    yield {"__key__": group.key, **opened(group, config)}
                except BadSample as error:
                    bad.append(BadRecord(name, group.key, str(error)))
        except Damaged as error:
            bad.append(BadRecord(name, error.key, damage(error)))


def opened(group: Group, config: Config) -> Sample:
    """The members of a group with their new extensions, images as arrays [H, W, C]; raises `BadSample`."""
    if group.reason or not group.members:
        raise BadSample(group.reason or f"neither an image nor text among members {sorted(group.others)}")
    patch, contents = config.model.patcher, dict(group.data)
    if any(kind(name) in ARRAYS for name in contents):
        raise BadSample("it holds a precomputed array already")
    first = next((name for name in IMAGES if name in contents), None)
    sample: Sample = {}
    for name, data in contents.items():
        if kind(name) not in IMAGES:
            sample[name] = data
        elif name == first or "." in name:  # readers use the first of several unnamed images
            image = open_image(data, config.data.limits, lambda image: draft(image, patch.image_sizes))
            fitted = np.asarray(fit(image, patch.channels, patch.image_sizes, config.data.resize))
            sample[renamed(name)] = fitted.reshape(*fitted.shape[:2], -1)
    if "json" in sample:
        sample["json"] = relisted(sample["json"])
    return sample


def kind(name: str) -> str:
    """The last part of an extension: `png` for `0.png`."""
    return name.rsplit(".", 1)[-1]


def renamed(name: str) -> str:
    """The extension of the latent of an image with this extension."""
    return ".".join([*name.split(".")[:-1], "safetensors"])


def relisted(data: bytes) -> bytes:
    """A list of segments with its images renamed; any other JSON is returned unchanged."""
    try:
        listed = json.loads(data)
    except (ValueError, RecursionError):
        return data
    if not isinstance(listed, list):
        return data
    changed = [
        {**item, "image": renamed(item["image"])}
        if isinstance(item, dict) and isinstance(item.get("image"), str)
        else item
        for item in listed
    ]
    return json.dumps(changed).encode()


def encode(chunk: list[Sample], patcher: LatentPatcher, half: bool, progress: Progress) -> None:
    """Replace each image by the bytes of its latent; images of equal size are encoded in one batch."""
    sizes: dict[tuple[int, ...], list[tuple[Sample, str]]] = defaultdict(list)
    for sample in chunk:
        for name, value in sample.items():
            if isinstance(value, np.ndarray):
                sizes[value.shape].append((sample, name))
    note, size = {"vae": patcher.fingerprint}, patcher.settings.vae.batch
    for images in sizes.values():
        for batch in (images[i : i + size] for i in range(0, len(images), size)):
            pixels = np.stack([sample[name] for sample, name in batch])
            latents = patcher.latents(torch.from_numpy(pixels).permute(0, 3, 1, 2)).cpu().numpy()
            for (sample, name), latent in zip(batch, latents.astype(np.float16 if half else np.float32), strict=True):
                sample[name] = save({"latent": np.ascontiguousarray(latent)}, metadata=note)
            progress.done += len(batch)


if __name__ == "__main__":
    run(main)
