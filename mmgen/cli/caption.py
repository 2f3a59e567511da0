"""The command `mmgen caption`: writes captions of images."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from mmgen.cli.flags import Json, RunSettings
from mmgen.cli.run import load_run
from mmgen.cli.show import print_json
from mmgen.config import Config

if TYPE_CHECKING:
    from PIL import Image

    from mmgen.image.patch import Patcher


def caption(
    *images: Annotated[Path, Parameter(help="Image files.")], config: RunSettings = Config(), as_json: Json = False
) -> int:
    """Write captions of images with a trained run.

    Example:
        mmgen caption --config configs/scenes.yaml samples/0000.png
    """
    from mmgen.generate.decoder import Decoder, Request

    if not images:
        raise ValueError("no image is given: name one or more image files")
    opened = [_opened(path) for path in images]
    trained = load_run(config)
    decoder = Decoder(trained.model, trained.tokenizer, config.sample)
    for path, image in zip(images, opened, strict=True):
        if changes := describe_changes(image, decoder.patcher):
            print(f"{path} {changes}", file=sys.stderr, flush=True)
    results = decoder.generate([Request([image], "text") for image in opened])
    captions = [{"image": str(path), "caption": result.text} for path, result in zip(images, results, strict=True)]
    if as_json:
        print_json({"captions": captions})
    else:
        for item in captions:
            print(f"{item['image']}: {item['caption']}")
    return 0


def describe_changes(image: Image.Image, patcher: Patcher) -> str:
    """Describe how an image is fitted to a declared size and to the model's colours; empty if it does not change."""
    from mmgen.image.resize import upright_size

    fitted = patcher.fit(image)
    (height, width), (new_height, new_width) = upright_size(image), (fitted.height, fitted.width)
    changes = []
    if (height, width) != (new_height, new_width):
        same_shape = height * new_width == width * new_height
        changes.append(f"{'scaled' if same_shape else 'scaled and cropped'} to {new_width}x{new_height}")
    if fitted.mode == "L" and image.mode not in ("1", "L", "LA", "La") and not image.mode.startswith("I"):
        changes.append("converted to grey")
    return f"is {width}x{height}; it was {' and '.join(changes)}" if changes else ""


def _opened(path: Path) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.copy()
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not an image: give a PNG, JPEG or another picture file") from None
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        why = (
            "does not exist: correct the path" if missing else f"cannot be read as an image: {error.strerror or error}"
        )
        raise ValueError(f"{path} {why}") from None
