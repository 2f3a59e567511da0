"""The command `mmgen sample`: draws images from captions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from mmgen.cli.flags import Folder, Json, RunSettings, at_least
from mmgen.cli.run import load_run
from mmgen.cli.show import print_json
from mmgen.config import Config


def sample(
    *prompts: Annotated[str, Parameter(help="Captions; one image is drawn for each.")],
    config: RunSettings = Config(),
    out: Folder = Path("samples"),
    seed: Annotated[
        int, Parameter(help="Seed of the first image; image i has this seed + i.", validator=at_least(0))
    ] = 0,
    as_json: Json = False,
) -> int:
    """Draw images from captions with a trained run.

    Example:
        mmgen sample --config configs/scenes.yaml "a green 5 bottom left" "a red 7"
    """
    from mmgen.generate.decoder import Decoder, Request
    from mmgen.image import sheet

    if not prompts:
        raise ValueError('no caption is given: write one or more, such as "a red 7 top left"')
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError('a caption is empty: write one such as "a red 7 top left"')
    trained = load_run(config)
    requests = [Request([prompt], "image", seed + i) for i, prompt in enumerate(prompts)]
    decoder = Decoder(trained.model, trained.tokenizer, config.sample)
    images = [result.images[0] for result in decoder.generate(requests)]
    paths = [out / f"{seed + i:04d}.png" for i in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        sheet.save(image, path)
    sheet.save(sheet.grid(images, prompts), out / "grid.png")
    drawn = [
        {"prompt": p, "seed": seed + i, "image": str(path)}
        for i, (p, path) in enumerate(zip(prompts, paths, strict=True))
    ]
    if as_json:
        print_json({"samples": drawn, "grid": str(out / "grid.png")})
    else:
        for item in drawn:
            print(f"{item['image']}: {item['prompt']}")
        print(f"{out / 'grid.png'}: all of them, enlarged")
    return 0
