"""The command `mmgen caption`: writes captions of images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from mmgen.cli.flags import Json, RunSettings
from mmgen.cli.run import load_run
from mmgen.cli.show import print_json
from mmgen.config import Config

if TYPE_CHECKING:
    from PIL import Image


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
    results = decoder.generate([Request([image], "text") for image in opened])
    captions = [{"image": str(path), "caption": result.text} for path, result in zip(images, results, strict=True)]
    if as_json:
        print_json({"captions": captions})
    else:
        for item in captions:
            print(f"{item['image']}: {item['caption']}")
    return 0


def _opened(path: Path) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.copy()
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not an image: give a PNG, JPEG or another picture file") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read as an image: {error.strerror or error}") from None
