"""Patches of latents: the patcher for a frozen autoencoder (diffusers' `AutoencoderKL`), and the registry of patchers.

A latent is the mean of the encoder's Gaussian, never a draw from it, so an image always has the same latent.
Loader workers send pixel values, and `mmgen.sequence.batch.prepare` encodes those of a whole batch on the
device of the model. Precomputed latents are normalised by the workers.

Suffixes: as in `mmgen.image.patch`, and h and w for the height and width of a latent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mmgen.config import PatcherConfig, choose
from mmgen.image.patch import Floats, Grid, Patcher, PixelPatcher, cut, joined, to_image

Device = torch.device | str


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of each channel of latents."""

    mean: list[float]
    std: list[float]


@dataclass(frozen=True)
class AutoencoderFacts:
    """The autoencoder of a run, as measured: a fingerprint of its weights, and the statistics of its latents.

    These are facts of a run, not settings. The configuration of the model and its checkpoints keep them.
    """

    fingerprint: str
    mean: list[float]
    std: list[float]

    @classmethod
    def of_settings(cls, patcher: Mapping[str, Any]) -> AutoencoderFacts | None:
        """The facts that earlier versions wrote into the settings of the patcher; None if there are none."""
        vae = patcher.get("vae") or {}
        if not isinstance(vae, Mapping) or not (vae.get("fingerprint") and vae.get("mean") and vae.get("std")):
            return None
        return cls(vae["fingerprint"], vae["mean"], vae["std"])


@dataclass(frozen=True)
class Autoencoder:
    """A loaded autoencoder."""

    module: Any
    fingerprint: str
    statistics: Statistics | None
    """The statistics of its latents in its own configuration; None if it has none."""


@lru_cache(maxsize=2)
def _load(name: str, subfolder: str, device: str) -> Autoencoder:
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ValueError(
            f"model.patcher.kind 'vae' needs the package diffusers, which cannot be imported: {error}"
        ) from None
    where = {"subfolder": subfolder} if subfolder else {}
    try:
        written = AutoencoderKL.load_config(name, **where)
        module = AutoencoderKL.from_pretrained(name, torch_dtype=torch.float32, **where)
    except (OSError, ValueError, TypeError, RuntimeError, KeyError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"model.patcher.vae.name '{name}' cannot be loaded as an AutoencoderKL: {first} "
            "(name a folder that diffusers or `python -m data_prep.train_vae` wrote, or a hub name)"
        ) from None
    module = module.eval().requires_grad_(False)
    statistics = _written_statistics(written, module.config.latent_channels)
    return Autoencoder(module.to(device), fingerprint(module), statistics)


def fingerprint(module: torch.nn.Module) -> str:
    """16 hexadecimal digits that identify the weights of an autoencoder, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _written_statistics(written: dict[str, Any], channels: int) -> Statistics | None:
    """Mean and std with which diffusers' pipelines scale latents as (x - mean) / std.

    They come from `latents_mean` and `latents_std`, or from the shift and scaling factors. Only values that the file
    contains are used, because the defaults of the class do not describe these weights.
    """
    scaling = written.get("scaling_factor")
    if written.get("latents_mean") and written.get("latents_std"):
        return Statistics(list(written["latents_mean"]), [std / (scaling or 1.0) for std in written["latents_std"]])
    if scaling is None:
        return None
    return Statistics([float(written.get("shift_factor") or 0.0)] * channels, [1.0 / scaling] * channels)


class LatentPatcher(Patcher):
    """Square patches of latents, normalised per channel. Values of a patch are ordered by row, column and channel."""

    stored = "latent"

    def __init__(self, settings: PatcherConfig, device: Device = "cpu", facts: AutoencoderFacts | None = None) -> None:
        super().__init__(settings)
        self.device = torch.device(device)
        self.facts = facts

    @cached_property
    def autoencoder(self) -> Autoencoder:
        """The autoencoder `model.patcher.vae`.

        Raises:
            ValueError: it cannot be loaded, or does not match the settings or the facts of the run.
        """
        vae = self.settings.vae
        loaded = _load(vae.name, vae.subfolder, str(self.device))
        config = loaded.module.config
        factor = 2 ** (len(config.block_out_channels) - 1)
        for setting, value, actual in (
            ("channels", self.settings.channels, config.in_channels),
            ("vae.channels", vae.channels, config.latent_channels),
            ("vae.factor", vae.factor, factor),
        ):
            if value != actual:
                raise ValueError(
                    f"model.patcher.{setting} is {value}, but that of the autoencoder '{vae.name}' is {actual}: "
                    f"set model.patcher.{setting} to {actual}"
                )
        if self.facts is not None and self.facts.fingerprint != loaded.fingerprint:
            raise ValueError(
                f"the weights of the autoencoder '{vae.name}' are not those that this model was trained with "
                f"(fingerprint {loaded.fingerprint}, expected {self.facts.fingerprint}): restore the old weights, or "
                "train a new model"
            )
        return loaded

    def load(self) -> None:
        _ = self.autoencoder

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the weights of the autoencoder."""
        return self.facts.fingerprint if self.facts is not None else self.autoencoder.fingerprint

    @cached_property
    def statistics(self) -> tuple[Floats, Floats]:
        """Mean and standard deviation [C]: those of the run, else of the settings, else of the autoencoder's files."""
        known = self.facts or known_statistics(self.settings, self.autoencoder)
        if known is None:
            raise ValueError(
                f"the configuration of the autoencoder '{self.settings.vae.name}' has neither scaling_factor nor "
                "latents_mean and latents_std: set model.patcher.vae.mean and model.patcher.vae.std, or train a model, "
                "which measures them"
            )
        return np.array(known.mean, dtype=np.float32), np.array(known.std, dtype=np.float32)

    def encode_stored(self, stored: NDArray[Any]) -> tuple[NDArray[Any], Grid]:
        """Normalised patches [N, P] of a precomputed latent [C, h, w], and the patch grid.

        Raises:
            ValueError: the latent has another number of channels, or cannot be cut into patches.
        """
        latent_Chw, channels = stored, self.settings.vae.channels
        if len(latent_Chw) != channels:
            raise ValueError(
                f"latent is {list(latent_Chw.shape)}, not of {channels} channels (model.patcher.vae.channels)"
            )
        mean, std = self.statistics
        return cut((latent_Chw.transpose(1, 2, 0) - mean) / std, self.settings.patch_size)

    @torch.no_grad()
    def latents(self, pixels_MCHW: Tensor) -> Tensor:
        """Latents [M, C, h, w] of pixel values 0..255 [M, C, H, W]: float32, not normalised, on `self.device`."""
        parts = []
        for part in pixels_MCHW.split(self.settings.vae.batch):
            pixels = part.to(self.device, non_blocking=True).float() / 127.5 - 1
            with torch.autocast(self.device.type, enabled=False):
                parts.append(self.autoencoder.module.encode(pixels).latent_dist.mode())
        return torch.cat(parts)

    def images(self, pixels_MNL: Tensor, grid: Grid) -> Tensor:
        """Join patches of pixel values [M, N, L] in raster order into images [M, C, H, W]."""
        return joined(pixels_MNL, grid, self.settings.side)

    @cached_property
    def _normal(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [C, 1, 1] on the device of the patcher."""
        mean, std = (torch.from_numpy(values).to(self.device).view(-1, 1, 1) for values in self.statistics)
        return mean, std

    @torch.no_grad()
    def encode_pixels(self, pixels_MNL: Tensor, grid: Grid) -> Tensor:
        """Patches [M, N, P] of normalised latents, from pixel values 0..255 [M, N, L] in raster order."""
        (rows, columns), patch, (mean, std) = grid, self.settings.patch_size, self._normal
        latents = (self.latents(self.images(pixels_MNL, grid)) - mean) / std
        blocks = latents.view(len(latents), -1, rows, patch, columns, patch)
        return blocks.permute(0, 2, 4, 3, 5, 1).reshape(len(latents), rows * columns, -1)

    @torch.no_grad()
    def pictures(self, x_RNP: Floats, grid: Grid) -> list[Image.Image]:
        mean, std = self._normal
        images: list[Image.Image] = []
        for part in torch.from_numpy(np.asarray(x_RNP, dtype=np.float32)).split(self.settings.vae.batch):
            latents = joined(part.to(self.device), grid, self.settings.patch_size) * std + mean
            with torch.autocast(self.device.type, enabled=False):
                pixels = self.autoencoder.module.decode(latents).sample
            images += [to_image(shown) for shown in pixels.permute(0, 2, 3, 1).cpu().numpy()]
        return images


def known_statistics(settings: PatcherConfig, autoencoder: Autoencoder) -> Statistics | None:
    """The statistics in the settings, else those in the configuration of the autoencoder; None if both lack them."""
    vae, written = settings.vae, autoencoder.statistics
    mean = vae.mean or (written.mean if written else None)
    std = vae.std or (written.std if written else None)
    return Statistics(mean, std) if mean and std else None


def _pixels(settings: PatcherConfig, device: Device, facts: AutoencoderFacts | None) -> Patcher:
    """Patches of pixels, scaled to [-1, 1]."""
    return PixelPatcher(settings)


PATCHERS: dict[str, Callable[[PatcherConfig, Device, AutoencoderFacts | None], Patcher]] = {
    "pixels": _pixels,
    "vae": LatentPatcher,
}
"""Name of a patcher, the value of `model.patcher.kind`, to the function that builds it."""


def build_patcher(settings: PatcherConfig, device: Device = "cpu", facts: AutoencoderFacts | None = None) -> Patcher:
    """The patcher `model.patcher.kind`. An autoencoder is loaded at first use.

    Raises:
        ValueError: the kind is unknown.
    """
    patcher: Patcher = choose(PATCHERS, settings.kind, "model.patcher.kind")(settings, device, facts)
    return patcher
