"""The command `mmgen edit`: draws a new version of a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from mmgen.cli.flags import Folder, Json, RunSettings, at_least
from mmgen.cli.pictures import note_changes, numbered, opened
from mmgen.cli.run import batches, load_run
from mmgen.cli.sample import check_captions
from mmgen.cli.show import print_json
from mmgen.config import Config


def edit(
    *words: Annotated[str, Parameter(help="A picture file, then the text.")],
    config: RunSettings = Config(),
    mask: Annotated[Path | None, Parameter(help="Picture that is white where the picture is redrawn.")] = None,
    strength: Annotated[
        float | None, Parameter(help="Start from the picture with noise: 0 keeps it, 1 forgets it.")
    ] = None,
    n: Annotated[int, Parameter(name=["--n", "-n"], help="Number of versions.", validator=at_least(1))] = 1,
    out: Folder = Path("edited"),
    seed: Annotated[
        int, Parameter(help="Seed of the first image; image i has this seed + i.", validator=at_least(0))
    ] = 0,
    as_json: Json = False,
) -> int:
    """Draw a new version of a picture, as a text asks.

    Without `--mask` and `--strength`, the picture and the text are the prompt, as in documents of edits (picture, word,
    picture) that the model was trained on. With one of them the text is a caption of the new image, and any model of
    captioned images will do. The first argument may be the model: a run folder, a checkpoint or an exported folder.

    Example:
        mmgen edit runs/scenes samples/0000.png "a red 7 top left" --strength 0.6
    """
    from mmgen.generate import Decoder, Inpaint, Request
    from mmgen.image import sheet

    if len(words) != 2:
        raise ValueError(f'edit takes a picture file and a text, got {len(words)} of them: picture.png "a red 7"')
    if mask is not None and strength is not None:
        raise ValueError("--mask keeps a part of the picture and --strength changes all of it: give one of them")
    path, text = Path(words[0]), words[1]
    check_captions([text])
    paths = numbered(out, seed, n)
    for target in [*paths, out / "grid.png"]:
        if target.exists() and target.resolve() in [given.resolve() for given in (path, mask) if given]:
            raise ValueError(f"{target} is an input and would be overwritten: name another folder with --out")
    picture, mask_picture = opened(path), opened(mask) if mask else None
    trained = load_run(config)
    decoder = Decoder(trained.model, trained.tokenizer, config.sample)
    note_changes(path, picture, decoder.patcher)
    inpaint = Inpaint.of_mask(picture, mask_picture, decoder.patcher) if mask_picture else None
    grid = None if inpaint else decoder.patcher.pixels(picture)[1]
    requests = [
        Request([text], "image", seed + i, inpaint=inpaint)
        if inpaint
        else Request([text], "image", seed + i, image=picture, strength=strength)
        if strength is not None
        else Request([picture, text], "image", seed + i, grid=grid)
        for i in range(n)
    ]
    images = []
    for some in batches(requests, "versions drawn"):
        images += [result.images[0] for result in decoder.generate(some)]
    for image, target in zip(images, paths, strict=True):
        sheet.save(image, target)
    sheet.save(sheet.grid([decoder.patcher.fit(picture), *images], [path.name, *[text] * n]), out / "grid.png")
    if as_json:
        edits = [{"seed": seed + i, "image": str(target)} for i, target in enumerate(paths)]
        print_json({"picture": str(path), "prompt": text, "edits": edits, "grid": str(out / "grid.png")})
    else:
        for target in paths:
            print(f"{target}: {text}")
        print(f"{out / 'grid.png'}: {path} and all of them, enlarged")
    return 0
