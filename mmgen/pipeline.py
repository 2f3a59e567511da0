"""`MMGenPipeline`: images from captions, with the arguments that users of diffusers know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from mmgen.config import SampleConfig
from mmgen.generate import Decoder, Inpaint, Request
from mmgen.generate.request import BATCH
from mmgen.image.patch import Grid
from mmgen.train.checkpoint.trained import Trained, load_folder, stored_settings


@dataclass(frozen=True)
class MMGenPipelineOutput:
    """What a call of the pipeline returns."""

    images: list[Image.Image]
    """`num_images_per_prompt` images of the first prompt, then those of the next one."""


class MMGenPipeline:
    """Draws images with a trained model.

    ```
    from mmgen import MMGenPipeline
    pipeline = MMGenPipeline.from_pretrained("exported")
    pipeline("a red 7 top left").images[0].save("seven.png")
    ```
    """

    def __init__(self, trained: Trained, sample: SampleConfig) -> None:
        self.model, self.tokenizer = trained.model, trained.tokenizer
        self.sample = sample
        """The settings of sampling that calls use unless their arguments change them."""

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> MMGenPipeline:
        """Load a model to the GPU if there is one, else to the CPU.

        Args:
            folder: what `mmgen export` wrote, a run folder or a checkpoint. Its stored settings of sampling are used.

        Raises:
            ValueError: the folder holds no model, or a file is damaged.
        """
        sample = stored_settings(Path(folder)).sample
        return cls(load_folder(Path(folder), sample.weights).on_best_device(), sample)

    def to(self, device: str | torch.device) -> MMGenPipeline:
        """Move the model to a device; returns the pipeline."""
        self.model.to(torch.device(device))
        return self

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        image: Image.Image | None = None,
        mask_image: Image.Image | None = None,
        strength: float = 0.8,
    ) -> MMGenPipelineOutput:
        """Draw images.

        Args:
            prompt: one or more captions.
            negative_prompt: text that guidance moves away from, for all captions or one for each.
            num_inference_steps: solver steps; by default those of the stored settings.
            guidance_scale: scale of guidance, 1 for none; by default that of the stored settings.
            generator: its `initial_seed()` is the seed of the first image, and image i has this seed + i; a second call
                with the same generator repeats the images. Or one generator per image. Without one, the seed is drawn
                from torch's global generator.
            num_images_per_prompt: images per caption.
            height: height of the images in pixels; together with `width`, one of the sizes of the model.
            width: width of the images in pixels.
            image: a picture to start from, or to repaint with `mask_image`.
            mask_image: white where `image` is redrawn, of the same size.
            strength: how much of `image` changes without a mask: 0 keeps it, 1 forgets it.

        Raises:
            ValueError: there is no prompt, the size is none of the model's, or arguments contradict each other.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or num_images_per_prompt < 1:
            raise ValueError("nothing to draw: give at least one prompt, and num_images_per_prompt of at least 1")
        if mask_image is not None and image is None:
            raise ValueError("mask_image needs the picture that it belongs to: give it as `image`")
        if not 0 <= strength <= 1:
            raise ValueError(f"strength lies between 0 (the picture) and 1 (noise), got {strength}")
        if num_inference_steps is not None and num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
        for name, picture in (("image", image), ("mask_image", mask_image)):
            if picture is not None and not isinstance(picture, Image.Image):
                raise ValueError(f"{name} must be one PIL image, got {type(picture).__name__}")
        texts = [text for text in prompts for _ in range(num_images_per_prompt)]
        negatives = self._negatives(negative_prompt, len(prompts), num_images_per_prompt)
        seeds = self._seeds(generator, len(texts))
        changes = {"steps": num_inference_steps, "guidance_scale": guidance_scale}
        changed = {name: value for name, value in changes.items() if value is not None}
        sample = SampleConfig.model_validate({**self.sample.model_dump(), **changed})
        decoder = Decoder(self.model, self.tokenizer, sample)
        start, inpaint = image, None
        if image is not None and mask_image is not None:
            start, inpaint = None, Inpaint.of_mask(image, mask_image, decoder.patcher)
        grid = self._grid(height, width)
        requests = [
            Request(
                [text],
                "image",
                seed,
                grid=grid,
                negative_prompt=negative,
                image=start,
                strength=strength,
                inpaint=inpaint,
            )
            for text, negative, seed in zip(texts, negatives, seeds, strict=True)
        ]
        images: list[Image.Image] = []
        for begin in range(0, len(requests), BATCH):
            images += [result.images[0] for result in decoder.generate(requests[begin : begin + BATCH])]
        return MMGenPipelineOutput(images)

    @staticmethod
    def _negatives(negative: str | Sequence[str] | None, prompts: int, images: int) -> list[str | None]:
        """The negative prompt of each image."""
        if negative is None or isinstance(negative, str):
            return [negative] * (prompts * images)
        if len(negative) != prompts:
            raise ValueError(f"negative_prompt has {len(negative)} texts for {prompts} prompts: give one or {prompts}")
        return [text for text in negative for _ in range(images)]

    @staticmethod
    def _seeds(generator: torch.Generator | Sequence[torch.Generator] | None, images: int) -> list[int]:
        """The seed of each image."""
        if generator is None or isinstance(generator, torch.Generator):
            first = int(torch.randint(2**31, ())) if generator is None else generator.initial_seed()
            return [first + i for i in range(images)]
        if len(generator) != images:
            raise ValueError(f"generator has {len(generator)} entries for {images} images: give one, or one per image")
        return [one.initial_seed() for one in generator]

    def _grid(self, height: int | None, width: int | None) -> Grid | None:
        if height is None and width is None:
            return None
        patcher = self.model.patcher
        if (height, width) not in patcher.image_sizes:
            sizes = ", ".join(f"{high}x{wide}" for high, wide in patcher.image_sizes)
            raise ValueError(f"the model has no size of height {height} and width {width}: give one of {sizes}")
        return patcher.grids[patcher.image_sizes.index((height, width))]  # type: ignore[arg-type]
