"""The command `mmgen sample`: draws images from captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from mmgen.cli.flags import Folder, Json, RunSettings, at_least
from mmgen.cli.pictures import is_file, is_folder, numbered
from mmgen.cli.run import batches, load_run
from mmgen.cli.show import log, print_json
from mmgen.config import Config

if TYPE_CHECKING:
    from mmgen.image.patch import Grid

SHOWN = 60
"""Number of images, the first ones, that the sheet shows."""


def sample(
    *captions: Annotated[str, Parameter(help="Captions.")],
    config: RunSettings = Config(),
    prompts: Annotated[Path | None, Parameter(help="Text file with one caption per line.")] = None,
    n: Annotated[int, Parameter(name=["--n", "-n"], help="Images per caption.", validator=at_least(1))] = 1,
    size: Annotated[str | None, Parameter(help="WIDTHxHEIGHT, one of the sizes of the model.")] = None,
    negative: Annotated[str | None, Parameter(help="Text that guidance moves away from.")] = None,
    out: Folder = Path("samples"),
    seed: Annotated[
        int, Parameter(help="Seed of the first image; image i has this seed + i.", validator=at_least(0))
    ] = 0,
    as_json: Json = False,
) -> int:
    """Draw images from captions with a trained model.

    The first argument may be the model: a run folder, a checkpoint or an exported folder.

    Example:
        mmgen sample runs/scenes "a green 5 bottom left" "a red 7" --n 2
    """
    from mmgen.generate.decoder import Decoder, Request
    from mmgen.image import sheet

    texts = [caption for caption in [*captions, *(read_lines(prompts) if prompts else [])] for _ in range(n)]
    check_captions(texts)
    grid = grid_of(config, size)
    trained = load_run(config)
    decoder = Decoder(trained.model, trained.tokenizer, config.sample)
    requests = [Request([text], "image", seed + i, grid=grid, negative_prompt=negative) for i, text in enumerate(texts)]
    paths = numbered(out, seed, len(texts))
    shown = []
    for some in batches(range(len(texts)), "images drawn"):
        for i, result in zip(some, decoder.generate([requests[i] for i in some]), strict=True):
            sheet.save(result.images[0], paths[i])
            shown += result.images[:1] if i < SHOWN else []
    sheet.save(sheet.grid(shown, texts[:SHOWN]), out / "grid.png")
    drawn = [
        {"prompt": text, "seed": seed + i, "image": str(path)}
        for i, (text, path) in enumerate(zip(texts, paths, strict=True))
    ]
    if as_json:
        print_json({"samples": drawn, "grid": str(out / "grid.png")})
    else:
        for item in drawn:
            print(f"{item['image']}: {item['prompt']}")
        print(f"{out / 'grid.png'}: {'all of them' if len(drawn) <= SHOWN else f'the first {SHOWN}'}, enlarged")
    return 0


def check_captions(texts: Sequence[str]) -> None:
    """Raise ValueError if there is no caption, or if one is empty or the name of a file or folder."""
    if not texts:
        raise ValueError('no caption is given: write one or more, such as "a red 7 top left"')
    for text in texts:
        if not text.strip():
            raise ValueError('a caption is empty: write one such as "a red 7 top left"')
        if is_folder(text):
            raise ValueError(
                f"the caption '{text}' is a folder, and it holds no trained model: give a run folder, a checkpoint or "
                "an exported folder first, or other words"
            )
        if is_file(text):
            raise ValueError(
                f"the caption '{text}' is a file: give a file of captions as `--prompts {text}`, and use "
                "`mmgen caption` to caption pictures"
            )


def read_lines(path: Path) -> list[str]:
    """The captions of a text file, one per line, in order and with repeats; empty lines are left out.

    Raises:
        ValueError: the file does not exist, is not text or has no caption.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError:
        raise ValueError(f"--prompts {path} is not a text file in UTF-8: give one caption per line") from None
    except OSError as error:
        raise ValueError(f"--prompts {path} cannot be read: {error.strerror}") from None
    captions = [line for line in lines if line]
    if not captions:
        raise ValueError(f"--prompts {path} holds no caption: write one per line")
    if len(captions) < len(lines):
        log(f"{path}: {len(lines) - len(captions)} empty lines are left out")
    return captions


def grid_of(config: Config, size: str | None) -> Grid | None:
    """The patch grid of an image size `WIDTHxHEIGHT`; None, the first size of the model, if no size is given.

    Raises:
        ValueError: the text is no size, or the model has no such size.
    """
    if size is None:
        return None
    patcher = config.model.patcher
    sizes = {
        f"{width}x{height}": grid for (height, width), grid in zip(patcher.image_sizes, patcher.grids, strict=True)
    }
    if size not in sizes:
        raise ValueError(f"--size {size} is no size of the model: give one of {', '.join(sizes)} (width x height)")
    return sizes[size]
