"""Images as latents of a frozen autoencoder: patch rows are cut out of what diffusers' `AutoencoderKL` makes of them.

A latent is the mean of the encoder's Gaussian, never a draw, so that an image has one latent wherever and whenever it
is computed. Loader workers send pixels, one row per patch; `encoded` turns those of a whole batch into latents on the
model's device. Rows of precomputed latents come ready.

Suffixes: as in `patch`, and M images, C channels, h and w cells of a latent.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmgen.config import PatcherConfig
from mmgen.image.patch import Floats, Grid, Patcher, PixelPatcher, cut, to_image

Device = torch.device | str
Statistics = tuple[list[float], list[float]]
"""Mean and standard deviation per channel."""


@dataclass(frozen=True)
class Autoencoder:
    """A loaded autoencoder and what is known of it."""

    module: Any
    fingerprint: str
    statistics: Statistics | None
    """What its own configuration says of its latents."""


@lru_cache(maxsize=2)
def _load(name: str, subfolder: str, device: str) -> Autoencoder:
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ValueError(f"model.patcher.kind 'vae' needs the package diffusers: {error}") from None
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
    """16 hexadecimal digits that stand for the weights of an autoencoder, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _written_statistics(written: dict[str, Any], channels: int) -> Statistics | None:
    """(x - mean) / std as diffusers' pipelines scale: by `latents_mean` and `latents_std`, or shift and scaling factor.

    Defaults that a configuration does not spell out say nothing of these weights and are not taken.
    """
    scaling = written.get("scaling_factor")
    if written.get("latents_mean") and written.get("latents_std"):
        return list(written["latents_mean"]), [std / (scaling or 1.0) for std in written["latents_std"]]
    if scaling is None:
        return None
    return [float(written.get("shift_factor") or 0.0)] * channels, [1.0 / scaling] * channels


class LatentPatcher(Patcher):
    """Latents, normalised per channel and cut into square patches; within a patch the order is row, column, channel."""

    def __init__(self, settings: PatcherConfig, device: Device = "cpu") -> None:
        super().__init__(settings)
        self.device = torch.device(device)

    @cached_property
    def autoencoder(self) -> Autoencoder:
        """The autoencoder of the settings; raises ValueError where it cannot be loaded or is another one."""
        vae = self.settings.vae
        loaded = _load(vae.name, vae.subfolder, str(self.device))
        found = loaded.module.config
        factor = 2 ** (len(found.block_out_channels) - 1)
        for setting, said, is_ in (
            ("channels", self.settings.channels, found.in_channels),
            ("vae.channels", vae.channels, found.latent_channels),
            ("vae.factor", vae.factor, factor),
        ):
            if said != is_:
                raise ValueError(
                    f"model.patcher.{setting} is {said}, but that of the autoencoder '{vae.name}' is {is_}"
                )
        if vae.fingerprint not in (None, loaded.fingerprint):
            raise ValueError(
                f"the weights of the autoencoder '{vae.name}' are not those that this model was trained with "
                f"(fingerprint {loaded.fingerprint}, wanted {vae.fingerprint}): put the old ones back, or train anew"
            )
        return loaded

    def load(self) -> None:
        _ = self.autoencoder

    @property
    def fingerprint(self) -> str:
        """Of the autoencoder's weights."""
        return self.settings.vae.fingerprint or self.autoencoder.fingerprint

    @cached_property
    def statistics(self) -> tuple[Floats, Floats]:
        """Mean and standard deviation [C]: those of the settings, else of the autoencoder's configuration."""
        vae = self.settings.vae
        written = None if vae.mean and vae.std else self.autoencoder.statistics
        mean, std = vae.mean or (written and written[0]), vae.std or (written and written[1])
        if not mean or not std:
            raise ValueError(
                f"the configuration of the autoencoder '{vae.name}' has neither scaling_factor nor latents_mean and "
                "latents_std: a training run measures them, else set model.patcher.vae.mean and .std"
            )
        return np.array(mean, dtype=np.float32), np.array(std, dtype=np.float32)

    def rows(self, latent_Chw: Floats) -> tuple[Floats, Grid]:
        """Patch rows [N, P] of a precomputed latent and their grid; raises ValueError for a wrong shape."""
        channels = self.settings.vae.channels
        if len(latent_Chw) != channels:
            raise ValueError(
                f"latent is {list(latent_Chw.shape)}, not of {channels} channels (model.patcher.vae.channels)"
            )
        mean, std = self.statistics
        return cut((latent_Chw.transpose(1, 2, 0) - mean) / std, self.settings.patch_size)

    @torch.no_grad()
    def latents(self, pixels_MCHW: Tensor) -> Tensor:
        """Latents [M, C, h, w], not normalised, of pixels 0..255 on any device; float32 on this patcher's device."""
        parts = []
        for part in pixels_MCHW.split(self.settings.vae.batch):
            pixels = part.to(self.device, non_blocking=True).float() / 127.5 - 1
            with torch.autocast(self.device.type, enabled=False):
                parts.append(self.autoencoder.module.encode(pixels).latent_dist.mode())
        return torch.cat(parts)

    def pixels(self, levels_MNL: Tensor, grid: Grid) -> Tensor:
        """Images [M, C, H, W] of rows of pixels in raster order."""
        return _joined(levels_MNL, grid, self.settings.side)

    @cached_property
    def _normal(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [C, 1, 1] on this patcher's device."""
        mean, std = (torch.from_numpy(values).to(self.device).view(-1, 1, 1) for values in self.statistics)
        return mean, std

    @torch.no_grad()
    def encode_rows(self, levels_MNL: Tensor, grid: Grid) -> Tensor:
        """Rows of pixels 0..255 in raster order, as `levels` gives them, to patch rows [M, N, P]."""
        (rows, columns), patch, (mean, std) = grid, self.settings.patch_size, self._normal
        latents = (self.latents(self.pixels(levels_MNL, grid)) - mean) / std
        blocks = latents.view(len(latents), -1, rows, patch, columns, patch)
        return blocks.permute(0, 2, 4, 3, 5, 1).reshape(len(latents), rows * columns, -1)

    def encode(self, image: Image.Image) -> tuple[Floats, Grid]:
        levels_NL, grid = self.levels(image)
        return self.encode_rows(torch.from_numpy(levels_NL)[None], grid)[0].cpu().numpy(), grid

    @torch.no_grad()
    def pictures(self, x_RNP: Floats, grid: Grid) -> list[Image.Image]:
        mean, std = self._normal
        images: list[Image.Image] = []
        for part in torch.from_numpy(np.asarray(x_RNP, dtype=np.float32)).split(self.settings.vae.batch):
            latents = _joined(part.to(self.device), grid, self.settings.patch_size) * std + mean
            with torch.autocast(self.device.type, enabled=False):
                pixels = self.autoencoder.module.decode(latents).sample
            images += [to_image(shown) for shown in pixels.permute(0, 2, 3, 1).cpu().numpy()]
        return images


def _joined(rows_MNP: Tensor, grid: Grid, side: int) -> Tensor:
    """Patch rows [M, N, P] in raster order to [M, C, H, W]: what `patch.join` does, for a batch on any device."""
    (rows, columns), m = grid, len(rows_MNP)
    blocks = rows_MNP.view(m, rows, columns, side, side, -1).permute(0, 5, 1, 3, 2, 4)
    return blocks.reshape(m, -1, rows * side, columns * side)


def build_patcher(settings: PatcherConfig, device: Device = "cpu") -> Patcher:
    """The patcher that `model.patcher.kind` names; nothing is loaded before it is needed."""
    return LatentPatcher(settings, device) if settings.latent else PixelPatcher(settings)
