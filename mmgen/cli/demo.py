"""The command `mmgen demo`: draws a caption, captions the image and prints scores."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from mmgen.cli.flags import ConfigFile, Json, Uses
from mmgen.cli.run import load_run
from mmgen.cli.show import log, print_json
from mmgen.config import Config

DemoSettings = Annotated[Config, Uses(("run", "sample"))]
PROMPT = "a red 7 top left and a blue 3 bottom right"
MORE = ("a green 5 bottom left", "a cyan 2 top right and a yellow 8 bottom right")
SCORES = (
    "t2i_accuracy", "t2i_accuracy_heldout_combination", "i2t_accuracy", "within_class_variance_ratio",
    "t2i_accuracy_shuffled",
)  # fmt: skip


def demo(
    prompt: Annotated[str, Parameter(help="Caption of the image.")] = PROMPT,
    *,
    config: DemoSettings = Config(),
    config_file: ConfigFile = None,
    as_json: Json = False,
) -> int:
    """Draw a caption with a trained run, caption the image, print scores.

    It also prints where the files of the run are, and a command to try next. `make demo` ends with it.

    Example:
        mmgen demo --config configs/scenes.yaml "a green 5 bottom left"
    """
    if not prompt.strip():
        raise ValueError('the prompt is empty: give a caption, such as "a red 7 top left"')
    run = config.run.dir
    log(f"1 of 3: loading the newest checkpoint of {run}")
    from mmgen.generate.decoder import Decoder, Request  # after the line, because it imports torch
    from mmgen.image import sheet

    trained = load_run(config)
    decoder = Decoder(trained.model, trained.tokenizer, config.sample)
    log("2 of 3: drawing the caption, usually less than a minute")
    image = decoder.generate([Request([prompt], "image")])[0].images[0]
    picture = run / "demo" / "grid.png"
    sheet.save(image, picture.with_name("0000.png"))
    sheet.save(sheet.grid([image], [prompt]), picture)
    log("3 of 3: captioning the image, usually less than a minute")
    caption = decoder.generate([Request([image], "text")])[0].text
    scores = read_scores(run / "report.json")
    if as_json:
        print_json({"prompt": prompt, "image": str(picture), "caption": caption, "scores": scores})
        return 0
    program = sys.argv[0] if Path(sys.argv[0]).name == "mmgen" else "mmgen"
    options = f"--config {config_file}" if config_file else str(run)
    shown = "  ".join(f"{name} {value:.3f}" for name, value in scores.items())
    print(f"""
caption given:   {prompt}
image drawn:     {picture}
model's caption: {caption}
scores:          {shown or f"none yet: run {program} eval {options}"}
files:           {run}/report.json  {run}/samples/  {run}/metrics.jsonl  {run}/checkpoints/latest
try next:        {program} sample {options} {" ".join(f'"{caption}"' for caption in MORE)}""")
    return 0


def read_scores(report: Path) -> dict[str, float]:
    """The scores that the demo prints, from the report of `mmgen eval`; none if the run is not evaluated."""
    if not report.is_file():
        return {}
    scores = json.loads(report.read_text())
    return {name: scores[name] for name in SCORES if name in scores}
