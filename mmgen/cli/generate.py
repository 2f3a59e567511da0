"""The command `mmgen generate`: continues any mix of text and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from mmgen.cli.flags import Folder, Json, RunSettings, at_least
from mmgen.cli.pictures import SUFFIXES, is_file, is_folder, note_changes, opened
from mmgen.cli.run import load_run
from mmgen.cli.show import print_json
from mmgen.config import Config


def generate(
    *parts: Annotated[str, Parameter(help="Texts and picture files, in order.")],
    config: RunSettings = Config(),
    mode: Annotated[
        Literal["auto", "text", "image"], Parameter(help="What follows: the model's choice, text, or one image.")
    ] = "auto",
    out: Folder = Path("samples"),
    seed: Annotated[int, Parameter(help="Seed of the random numbers.", validator=at_least(0))] = 0,
    as_json: Json = False,
) -> int:
    """Continue a document of texts and pictures with a trained model.

    A path of a picture file is a picture, any other argument is text. Text is printed and images are written, in
    the order in which they come. The first argument may be the model: a run folder, a checkpoint or an exported folder.

    Example:
        mmgen generate runs/scenes "a green 5 bottom left" --mode image
    """
    from mmgen.generate.decoder import Decoder, Request
    from mmgen.image import sheet

    if not parts:
        raise ValueError("no part is given: write texts and picture files, in order")
    if not all(part.strip() for part in parts):
        raise ValueError("a part is empty: give texts and picture files")
    prompt = [opened(Path(part)) if is_picture(part) else part for part in parts]
    trained = load_run(config)
    decoder = Decoder(trained.model, trained.tokenizer, config.sample)
    for part, piece in zip(parts, prompt, strict=True):
        if not isinstance(piece, str):
            note_changes(Path(part), piece, decoder.patcher)
    result = decoder.generate([Request(prompt, mode, seed)])[0]
    segments: list[dict[str, str]] = []
    for segment in result.segments:
        if isinstance(segment, str):
            segments.append({"text": segment})
        else:
            target = out / f"{seed:04d}-{sum('image' in done for done in segments)}.png"
            sheet.save(segment, target)
            segments.append({"image": str(target)})
    if as_json:
        print_json({"segments": segments, "finished": result.finished})
    else:
        for described in segments:
            print(described["text"] if "text" in described else described["image"])
        if not result.finished:
            print("(not finished: raise sample.max_new_tokens or sample.max_images)")
    return 0


def is_picture(part: str) -> bool:
    """Whether a part of a prompt is a path: a file or folder that exists, or a name that ends as picture files do."""
    return is_file(part) or is_folder(part) or part.lower().endswith(SUFFIXES)
