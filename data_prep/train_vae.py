"""A small AutoencoderKL, trained on the images of shards: `python -m data_prep.train_vae --config FILE`.

Image sizes, colours, latent channels and factor are those of `model.patcher` in the configuration, and the result is
saved under its `vae.name`. The loss is the mean squared error of pixels in [-1, 1] plus `--kl` times the mean KL
divergence of a latent's numbers from a standard normal (Kingma and Welling 2014, equation 10). The same command resumes
after an interruption: the images of step n depend on the seed and n alone. At the end, mean and standard deviation per
channel are measured and written into the folder's config.json (`latents_mean`, `latents_std`).
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import cyclopts
import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_prep import log, run, writable
from mmgen.config import Config
from mmgen.config_io import load, override
from mmgen.data.documents import DecodedImage
from mmgen.data.latents import device, measure
from mmgen.data.loader import Corpus
from mmgen.data.progress import Progress
from mmgen.data.shards.samples import BadSample
from mmgen.image.latent import Autoencoder, AutoencoderFacts, LatentPatcher, fingerprint
from mmgen.image.patch import Grid
from mmgen.sequence.tokenizer import Tokenizer
from mmgen.train.checkpoint.read import differences

STATE = "training.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")


@cyclopts.Parameter(name="*")
@dataclass(frozen=True)
class Settings:
    """Architecture and training of the autoencoder."""

    steps: int = 2000
    """Training steps."""
    batch: int = 64
    """Images per step."""
    lr: float = 1e-3
    """Peak learning rate."""
    kl: float = 1e-4
    """Weight of the KL divergence."""
    width: int = 32
    """Channels at full resolution; doubled at each halving, up to four times."""
    layers: int = 1
    """Residual blocks at each resolution."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "lr", "width", "layers"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name} is {getattr(self, name)}: it must be greater than 0")


class Batches(Dataset[dict[Grid, Tensor]]):
    """The images of each step by grid: pixel values 0..255 as patches [m, N, L]. Step n depends on seed and n alone."""

    def __init__(self, corpus: Corpus, settings: Settings) -> None:
        self.corpus, self.settings = corpus, settings

    def __len__(self) -> int:
        return self.settings.steps

    def __getitem__(self, step: int) -> dict[Grid, Tensor]:
        rng = np.random.Generator(np.random.Philox(key=[self.settings.seed, step]))
        grids: dict[Grid, list[Tensor]] = defaultdict(list)
        missing = self.settings.batch
        for index in rng.integers(len(self.corpus.samples), size=4 * missing).tolist():
            if not missing:
                break
            try:
                decoded = self.corpus.decoded(step, index)
            except BadSample:
                continue
            images = [segment for segment in decoded.segments if isinstance(segment, DecodedImage)]
            if images:
                image = images[int(rng.integers(len(images)))]
                grids[image.grid].append(torch.from_numpy(image.x_NP))
                missing -= 1
        return {grid: torch.stack(images) for grid, images in sorted(grids.items())}


def build(config: Config, settings: Settings) -> Any:
    """A new AutoencoderKL with the channels and the factor of the configuration; raises ValueError."""
    patch = config.model.patcher
    halvings = patch.vae.factor.bit_length() - 1
    if 2**halvings != patch.vae.factor:
        raise ValueError(
            f"model.patcher.vae.factor is {patch.vae.factor}, but each level halves the image: set it to a power of 2"
        )
    widths = tuple(settings.width * min(2**i, 4) for i in range(halvings + 1))
    torch.manual_seed(settings.seed)
    return AutoencoderKL(
        in_channels=patch.channels,
        out_channels=patch.channels,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=settings.layers,
        latent_channels=patch.vae.channels,
        norm_num_groups=math.gcd(settings.width, 32),
        sample_size=max(patch.image_sizes[0]),
        scaling_factor=1.0,
    )


class Trainer:
    """An autoencoder in training, its optimizer and its step."""

    def __init__(self, config: Config, settings: Settings, out: Path, data: str) -> None:
        self.settings, self.path = settings, out / STATE
        self.made = {**asdict(settings), "data": data, "patcher": config.model.patcher.model_dump(mode="json")}
        self.device = torch.device(device())
        self.module = build(config, settings).to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.module.parameters(), lr=settings.lr, betas=(0.9, 0.99), weight_decay=0.0
        )
        self.step = self._restore() if self.path.exists() else 0

    def learn(self, pixels_by_grid: dict[Grid, Tensor], patcher: LatentPatcher) -> tuple[float, float]:
        """Train one step; returns the mean squared error and the KL divergence per number."""
        settings = self.settings
        warm = min(1.0, (self.step + 1) / 100)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * warm * (0.52 + 0.48 * math.cos(math.pi * self.step / settings.steps))
        generator = torch.Generator(self.device).manual_seed(settings.seed * 2**32 + self.step)
        total = sum(map(len, pixels_by_grid.values()))
        errors = torch.zeros(2, device=self.device)
        for grid, pixels_MNL in pixels_by_grid.items():
            x = patcher.images(pixels_MNL, grid).to(self.device).float() / 127.5 - 1
            gaussian = self.module.encode(x).latent_dist
            shown = self.module.decode(gaussian.sample(generator)).sample
            kl = 0.5 * (gaussian.mean.square() + gaussian.var - 1 - gaussian.logvar).mean()
            parts = torch.stack([(shown - x).square().mean(), kl]) * (len(x) / total)
            (parts[0] + settings.kl * parts[1]).backward()
            errors += parts.detach()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        error, kl_error = errors.tolist()
        if not math.isfinite(error + kl_error):
            raise ValueError(
                f"step {self.step} has error {error} and KL {kl_error}: lower --lr, and remove {self.path}"
            )
        return error, kl_error

    def save(self) -> None:
        """Write weights, moments and settings atomically."""
        tensors = {f"weight.{name}": p.detach().contiguous() for name, p in self.module.named_parameters()}
        for name, p in self.module.named_parameters():
            for moment in MOMENTS:
                tensors[f"{moment}.{name}"] = self.optimizer.state[p][moment]
        temporary = self.path.with_suffix(".part")
        save_file(tensors, temporary, metadata={"step": str(self.step), "settings": json.dumps(self.made)})
        os.replace(temporary, self.path)

    def _restore(self) -> int:
        try:
            opened = safe_open(self.path, "pt")
        except Exception as error:  # safetensors has an error of its own
            raise ValueError(f"{self.path} is damaged ({error}): remove it to start again") from None
        with opened as file:
            note = file.metadata()
            before = {**json.loads(note["settings"]), "steps": self.settings.steps}
            if changed := "; ".join(differences(self.made, before)):
                raise ValueError(f"{self.path} was started with other settings: {changed}. Restore them, or remove it")
            step = int(note["step"])
            with torch.no_grad():
                for name, p in self.module.named_parameters():
                    p.copy_(file.get_tensor(f"weight.{name}"))
                    moments = {moment: file.get_tensor(f"{moment}.{name}").to(p.device) for moment in MOMENTS}
                    self.optimizer.state[p] = {"step": torch.tensor(float(step)), **moments}
        return step


def main(
    *shards: Annotated[str, cyclopts.Parameter(help="Shards of images; by default those of data.train.")],
    config: Annotated[Path, cyclopts.Parameter(help="YAML file of the run that will use the autoencoder.")],
    out: Annotated[Path | None, cyclopts.Parameter(help="Folder to write; by default model.patcher.vae.name.")] = None,
    save_every: Annotated[int, cyclopts.Parameter(help="Steps between saves.")] = 500,
    settings: Settings = Settings(),
) -> None:
    """Train a small AutoencoderKL, measure its latents, and save it in diffusers' format; repeat to resume."""
    loaded = load(config)
    if not loaded.model.patcher.latent:
        raise ValueError(f"{config} trains on pixels: set model.patcher.kind to vae, its channels and its factor")
    loaded = override(loaded, {"data": {"train": [*shards] or loaded.data.train}})
    out = out or Path(loaded.model.patcher.vae.name)
    if save_every < 1:
        raise ValueError(f"--save-every is {save_every}: it must be at least 1")
    writable(out)
    tokenizer = Tokenizer.of(loaded)
    corpus = Corpus(loaded.data.train, tokenizer, loaded)
    if not corpus.unencoded:
        raise ValueError("these shards hold latents, but the autoencoder is trained on images: name shards of images")
    trainer = Trainer(loaded, settings, out, corpus.dataset.fingerprint)
    patcher = LatentPatcher(loaded.model.patcher, trainer.device)
    parameters = sum(p.numel() for p in trainer.module.parameters())
    log(f"{out}: steps {trainer.step + 1} to {settings.steps}, {len(corpus.samples)} samples, {parameters} parameters")
    with Progress("training", "steps", settings.steps, done=trainer.step) as progress:
        for pixels in progress.each(batches(corpus, settings, trainer.step)):
            error, kl = trainer.learn(pixels, patcher)
            losses = f"error {error:.5f}, kl {kl:.3f}"
            progress.detail = partial(str, losses)
            if trainer.step % save_every == 0 or trainer.step == settings.steps:
                trainer.save()
    finish(loaded, tokenizer, trainer, out)


def batches(corpus: Corpus, settings: Settings, first: int) -> Iterator[dict[Grid, Tensor]]:
    """The images of steps `first`, `first + 1`, ..., prefetched by `data.workers` processes."""
    workers = corpus.config.data.workers
    source = Batches(corpus, settings)
    yield from DataLoader(source, batch_size=None, sampler=range(first, settings.steps), num_workers=workers)


def finish(config: Config, tokenizer: Tokenizer, trainer: Trainer, out: Path) -> None:
    """Measure the latents, write the folder, and print the quality of the reconstruction."""
    module = trainer.module.eval().requires_grad_(False)
    autoencoder = Autoencoder(module, fingerprint(module), None)
    statistics = measure(config, tokenizer, autoencoder, 4096)
    mean, std = statistics.mean, statistics.std
    module.register_to_config(latents_mean=mean, latents_std=std)
    module.save_pretrained(out)
    facts = AutoencoderFacts(autoencoder.fingerprint, mean, std)
    patcher = LatentPatcher(config.model.patcher, trainer.device, facts)
    patcher.autoencoder = autoencoder
    shown, shards = ("data.val", config.data.val) if config.data.val else ("data.train", config.data.train)
    decibels = quality(Corpus(shards, tokenizer, config), patcher)
    print(
        f"{out}: fingerprint {autoencoder.fingerprint}, {decibels:.1f} dB PSNR on {shown}; "
        f"latents' mean {[round(x, 3) for x in mean]}, standard deviation {[round(x, 3) for x in std]}"
    )


def quality(corpus: Corpus, patcher: LatentPatcher, images: int = 512) -> float:
    """PSNR in decibels between images (pixel values 0..255) and their reconstructions."""
    squares, count = 0.0, 0
    for grid, pixels_MNL in Batches(corpus, Settings(batch=images))[0].items():
        pixels = patcher.images(pixels_MNL, grid).permute(0, 2, 3, 1).numpy()
        shown = patcher.pictures(patcher.encode_pixels(pixels_MNL, grid).cpu().numpy(), grid)
        back = np.stack([np.asarray(image) for image in shown]).reshape(pixels.shape)
        squares, count = squares + float(((pixels.astype(np.float64) - back) ** 2).sum()), count + pixels.size
    return 10 * math.log10(255**2 / max(squares / count, 1e-12))


if __name__ == "__main__":
    run(main)
