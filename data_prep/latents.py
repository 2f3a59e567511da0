"""Latents of the images of shards, as new shards: `python -m data_prep.latents --config FILE --out FOLDER [SHARD...]`.

Names of shards and keys stay, and with them a run's order and noise: training on the latents is the run that training
on the images is. Each image becomes a `.safetensors` member `latent` [C, h, w], not normalised, whose header names the
autoencoder; text stays. The same command goes on where it stopped: a shard has its name only when it is complete.
"""

from __future__ import annotations

import json
import re
import time
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

from data_prep import run, tell
from mmgen.config import Config
from mmgen.config_io import load
from mmgen.data.latents import device
from mmgen.data.shards import store
from mmgen.data.shards.pictures import open_image
from mmgen.data.shards.samples import ARRAYS, IMAGES, BadSample, Group, groups
from mmgen.data.shards.tar import Damaged
from mmgen.image.latent import LatentPatcher
from mmgen.image.resize import draft, fit
from mmgen.train.checkpoint.read import differences

AHEAD = 8
"""Batches of images that are read before they are encoded, so that those of one size meet."""
Sample = dict[str, Any]
"""Its key, and its members by extension; an array [H, W, C] in place of an image that is still to be encoded."""


def main(
    *shards: Annotated[str, cyclopts.Parameter(help="Shards; by default those of data.train and data.val.")],
    config: Annotated[Path, cyclopts.Parameter(help="YAML file of the run that will read them.")],
    out: Annotated[Path, cyclopts.Parameter(help="Folder to write.")],
    half: Annotated[bool, cyclopts.Parameter(help="Store 16 instead of 32 bits.", negative="")] = False,
) -> None:
    """Write the latents of shards of images as new shards of the same names and keys."""
    settings = load(config)
    patterns = [*shards] or [*settings.data.train, *settings.data.val]
    sources = list(dict.fromkeys(store.expand(patterns)))
    targets = {out / plain(store.name(shard)): shard for shard in sources}
    if len(targets) < len(sources):
        raise ValueError("two shards have one name: write them to different folders")
    if not settings.model.patcher.latent:
        raise ValueError(f"{config} trains on pixels: set model.patcher.kind to vae and name the autoencoder")
    if settings.data.crop != "center":
        raise ValueError("data.crop is random, but a stored latent has one crop: set it to center")
    patcher = LatentPatcher(settings.model.patcher, device())
    _same_as_before(out, settings, patcher, half)
    bad = 0
    for number, (target, shard) in enumerate(targets.items(), 1):
        if target.exists():
            tell(f"{target}: is there ({number} of {len(targets)})")
            continue
        bad += write(target, shard, settings, patcher, half)
        tell(f"{target}: written ({number} of {len(targets)})")
    print(f"{len(targets)} shards of latents in {out}" + (f"; {bad} samples left out" if bad else ""))


def plain(name: str) -> str:
    """The name of a shard that is not compressed."""
    return re.sub(r"(\.tar)?\.(gz|tgz|zst)$", ".tar", name)


def _same_as_before(out: Path, config: Config, patcher: LatentPatcher, half: bool) -> None:
    """Note in the folder how its latents are made; raises ValueError where some were made in another way."""
    patch = config.model.patcher
    made = {
        "vae": patch.vae.name,
        "fingerprint": patcher.autoencoder.fingerprint,
        "image_sizes": [list(size) for size in patch.image_sizes],
        "resize": config.data.resize,
        "half": half,
    }
    note = out / "latents.json"
    changed = differences(made, json.loads(note.read_text())) if note.exists() else []
    if [item for item in changed if not item.startswith("vae ")]:
        raise ValueError(
            f"{out} holds latents that were made in another way: {'; '.join(changed)}. Choose another --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(made, indent=1) + "\n")


def write(target: Path, shard: str, config: Config, patcher: LatentPatcher, half: bool) -> int:
    """One shard of latents; returns how many samples were left out."""
    part, lost = target.with_name(target.name + ".part"), list[str]()
    done, began, said = 0, time.monotonic(), time.monotonic()
    source = samples(shard, config, lost)
    with part.open("wb") as file, TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT") as sink:
        while chunk := list(islice(source, AHEAD * config.model.patcher.vae.batch)):
            encode(chunk, patcher, half)
            for sample in chunk:
                sink.write(sample)
            done += len(chunk)
            if time.monotonic() - said > 5:
                said = time.monotonic()
                tell(f"{target}: {done} samples, {done / (said - began):.0f} a second")
    part.rename(target)
    for reason in lost:
        tell(f"left out: {reason}")
    return len(lost)


def samples(shard: str, config: Config, lost: list[str]) -> Iterator[Sample]:
    """The samples of a shard, their images as they enter the autoencoder; `lost` gets those that cannot be read."""
    with store.stream(shard, config.data.limits) as file:
        try:
            for group in groups(file, config.data.limits):
                try:
                    yield {"__key__": group.key, **opened(group, config)}
                except BadSample as error:
                    lost.append(f"{shard}/{group.key}: {error}")
        except Damaged as error:
            lost.append(f"{shard}/{error.key} and what follows: {error}")


def opened(group: Group, config: Config) -> Sample:
    """The members of a group under their new extensions, images as arrays [H, W, C]; raises `BadSample`."""
    if group.reason or not group.members:
        raise BadSample(group.reason or "neither an image nor text")
    patch, found = config.model.patcher, dict(group.data)
    if any(kind(name) in ARRAYS for name in found):
        raise BadSample("it holds a precomputed array already")
    first = next((name for name in IMAGES if name in found), None)
    sample: Sample = {}
    for name, data in found.items():
        if kind(name) not in IMAGES:
            sample[name] = data
        elif name == first or "." in name:  # of several images without a name of their own, readers take the first
            image = open_image(data, config.data.limits, lambda image: draft(image, patch.image_sizes))
            fitted = np.asarray(fit(image, patch.channels, patch.image_sizes, config.data.resize))
            sample[renamed(name)] = fitted.reshape(*fitted.shape[:2], -1)
    if "json" in sample:
        sample["json"] = relisted(sample["json"])
    return sample


def kind(name: str) -> str:
    """The last part of an extension."""
    return name.rsplit(".", 1)[-1]


def renamed(name: str) -> str:
    """What an image's name or extension becomes."""
    return ".".join([*name.split(".")[:-1], "safetensors"])


def relisted(data: bytes) -> bytes:
    """A list of segments with its images renamed; any other JSON stays as it is."""
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


def encode(chunk: list[Sample], patcher: LatentPatcher, half: bool) -> None:
    """Put the bytes of a latent in the place of each image, those of one size in one batch."""
    sizes: dict[tuple[int, ...], list[tuple[Sample, str]]] = defaultdict(list)
    for sample in chunk:
        for name, value in sample.items():
            if isinstance(value, np.ndarray):
                sizes[value.shape].append((sample, name))
    note = {"vae": patcher.fingerprint}
    for places in sizes.values():
        pixels = np.stack([sample[name] for sample, name in places])
        latents = patcher.latents(torch.from_numpy(pixels).permute(0, 3, 1, 2)).cpu().numpy()
        for (sample, name), latent in zip(places, latents.astype(np.float16 if half else np.float32), strict=True):
            sample[name] = save({"latent": np.ascontiguousarray(latent)}, metadata=note)


if __name__ == "__main__":
    run(main)
