"""The command `mmgen caption`: writes captions of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from mmgen.cli.flags import Json, RunSettings
from mmgen.cli.pictures import files, note_changes, opened
from mmgen.cli.run import batches, load_run
from mmgen.cli.show import print_json
from mmgen.config import Config


def caption(
    *images: Annotated[Path, Parameter(help="Picture files, and folders of them.")],
    config: RunSettings = Config(),
    as_json: Json = False,
) -> int:
    """Write captions of pictures with a trained model.

    The first argument may be the model: a run folder, a checkpoint or an exported folder.

    Example:
        mmgen caption runs/scenes samples/0000.png
    """
    from mmgen.generate.decoder import Decoder, Request

    if not images:
        raise ValueError("no image is given: name picture files, or folders of them")
    paths = files(images)
    for path in paths:
        opened(path)  # before the model is loaded, so that a wrong path is reported at once
    trained = load_run(config)
    decoder = Decoder(trained.model, trained.tokenizer, config.sample)
    captions = []
    for some in batches(paths, "pictures captioned"):
        pictures = [opened(path) for path in some]
        for path, picture in zip(some, pictures, strict=True):
            note_changes(path, picture, decoder.patcher)
        results = decoder.generate([Request([picture], "text") for picture in pictures])
        new = [{"image": str(path), "caption": result.text} for path, result in zip(some, results, strict=True)]
        captions += new
        if not as_json:
            for item in new:
                print(f"{item['image']}: {item['caption']}", flush=True)
    if as_json:
        print_json({"captions": captions})
    return 0
