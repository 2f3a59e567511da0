"""The `mmgen` command. Every command takes `--config FILE.yaml` and dotted overrides such as `--train.steps 2000`."""

from __future__ import annotations

import inspect
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import cyclopts
from cyclopts import App, Parameter
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from mmgen import __version__
from mmgen.config import Config, SourceConfig
from mmgen.config_io import explain, override
from mmgen.config_io import load as load_config

if TYPE_CHECKING:
    from mmgen.sequence.tokenizer import Tokenizer

app = App(name="mmgen", version=__version__, help="Train and use one transformer over text and images.")
bench = App(name="bench", help="Measure speed against a floor, in one interleaved run.")
app.command(bench)
data = App(name="data", help="Index, check and show shards.")
app.command(data)
lab = App(name="lab", help="Small experiments with known answers that prove the flow toolbox.")
app.command(lab)
check = App(name="check", help="Checks that a configuration's parts fit each other.")
app.command(check)

Settings = Annotated[Config, Parameter(name="*")]
Json = Annotated[bool, Parameter(name="--json", help="Print one JSON document and nothing else.", negative="")]
Folder = Annotated[Path, Parameter(help="Folder for the images.")]
USAGE = 2


def tell(message: str) -> None:
    """One line for people, on standard error."""
    print(message, file=sys.stderr, flush=True)


@app.command
def train(
    *,
    config: Settings = Config(),
    dry_run: Annotated[bool, Parameter(help="Print the plan and run nothing.", negative="")] = False,
    as_json: Json = False,
) -> int:
    """Train a run, or continue it: the same command resumes from the last checkpoint.

    Ends with code 75 when Ctrl-C or SIGTERM stopped it after saving.
    """
    if dry_run:
        from mmgen.plan import plan

        show(plan(config), as_json)
        return 0
    from mmgen.train.loop import train as run

    return run(config)


@app.command
def sample(
    *prompts: Annotated[str, Parameter(help="Captions, one image each.")],
    config: Settings = Config(),
    out: Folder = Path("samples"),
    seed: Annotated[int, Parameter(help="Seed of the first image; the next ones count up.")] = 0,
    as_json: Json = False,
) -> int:
    """Draw images from captions with a trained run."""
    from mmgen.generate.decoder import Decoder, Request
    from mmgen.image import sheet

    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise ValueError('the prompt is empty: give at least one caption, such as "a red 7 top left"')
    model, tokenizer, _ = load(config)
    requests = [Request([prompt], "image", seed + i) for i, prompt in enumerate(prompts)]
    images = [result.images[0] for result in Decoder(model, tokenizer, config.sample).generate(requests)]
    paths = [out / f"{seed + i:04d}.png" for i in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        sheet.save(image, path)
    sheet.save(sheet.grid(images, prompts), out / "grid.png")
    drawn = [
        {"prompt": p, "seed": seed + i, "image": str(path)}
        for i, (p, path) in enumerate(zip(prompts, paths, strict=True))
    ]
    if as_json:
        print(json.dumps({"samples": drawn, "grid": str(out / "grid.png")}))
    else:
        for item in drawn:
            print(f"{item['image']}: {item['prompt']}")
        print(f"{out / 'grid.png'}: all of them, enlarged")
    return 0


@app.command
def caption(
    *images: Annotated[Path, Parameter(help="Image files.")], config: Settings = Config(), as_json: Json = False
) -> int:
    """Describe images with a trained run."""
    from PIL import Image, UnidentifiedImageError

    from mmgen.generate.decoder import Decoder, Request

    if not images:
        raise ValueError("no image is given: name at least one file")
    opened = []
    for path in images:
        try:
            with Image.open(path) as image:
                opened.append(image.copy())
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{path} cannot be read as an image: {error}") from None
    model, tokenizer, _ = load(config)
    results = Decoder(model, tokenizer, config.sample).generate([Request([image], "text") for image in opened])
    said = [{"image": str(path), "caption": result.text} for path, result in zip(images, results, strict=True)]
    if as_json:
        print(json.dumps({"captions": said}))
    else:
        for item in said:
            print(f"{item['image']}: {item['caption']}")
    return 0


@app.command(name="eval")
def evaluate(*, config: Settings = Config(), as_json: Json = False) -> int:
    """Score a trained run; writes report.json and samples/evaluation.png into its folder."""
    from mmgen.evaluate.report import evaluate as score

    model, tokenizer, trainer = load(config)
    show(score(model, tokenizer, config, trainer, tell).flat(), as_json)
    tell(f"report: {config.run.dir / 'report.json'}   pictures: {config.run.dir / 'samples' / 'evaluation.png'}")
    return 0


@app.command
def ablate(
    file: Annotated[Path, Parameter(help="YAML file: base, out, equal, seeds, arms, grid (see mmgen/ablate.py).")],
    *,
    as_json: Json = False,
) -> int:
    """Train and score a grid of settings times seeds, and compare them; the same command goes on where it stopped."""
    from mmgen.ablate import SCORES
    from mmgen.ablate import ablate as run

    found = run(file, tell)
    if as_json:
        print(json.dumps(found))
        return 0
    table = Table("", *found["arms"], title=f"equal {found['equal']}, seeds {found['seeds']}: mean ± 95% interval")
    for score in SCORES:
        cells = [arm.get(score, {"mean": "", "half_width": None}) for arm in found["arms"].values()]
        table.add_row(score, *(f"{rounded(c['mean'], 4)}{plus_minus(c['half_width'])}" for c in cells))
    for place, label in ((0, "first"), (-1, "last")):
        losses = [arm.get("val_loss_image_by_place") for arm in found["arms"].values()]
        shown = [f"{rounded(x['mean'][place], 4)}{plus_minus(x['half_width'][place])}" if x else "" for x in losses]
        table.add_row(f"val_loss_image, {label} place", *shown)
    print_table(table)
    return 0


@app.command
def export(
    *,
    config: Settings = Config(),
    out: Annotated[Path, Parameter(help="Folder to write.")] = Path("export"),
    as_json: Json = False,
) -> int:
    """Write a trained run as a Hugging Face folder, with the weights that `sample.weights` names."""
    from mmgen.train.checkpoint.export import export as write

    found, trainer = newest(config)
    write(config.run.dir, found, out, config.sample.weights)
    show({"folder": str(out), "step": trainer["step"], "weights": config.sample.weights}, as_json)
    return 0


@bench.command
def step(
    *,
    config: Settings = Config(),
    rounds: Annotated[int, Parameter(help="Interleaved repetitions.")] = 30,
    as_json: Json = False,
) -> int:
    """Time a training step over a bare loop with the same matrix products, eager and compiled."""
    from mmgen.bench.step import bench_step

    show(bench_step(config, rounds, tell), as_json)
    return 0


@bench.command
def generation(
    *,
    config: Settings = Config(),
    rounds: Annotated[int, Parameter(help="Interleaved repetitions.")] = 3,
    as_json: Json = False,
) -> int:
    """Time drawing with the cache against full recomputation, for each objective, at 64 and 256 patches."""
    from mmgen.bench.generation import bench_generation

    show(bench_generation(config, rounds), as_json)
    return 0


@bench.command(name="data")
def data_speed(
    *,
    config: Settings = Config(),
    rounds: Annotated[int, Parameter(help="Interleaved repetitions.")] = 5,
    samples: Annotated[int, Parameter(help="Samples read in each.")] = 2000,
    as_json: Json = False,
) -> int:
    """Time reading against webdataset's pipeline, and packing, waiting and resuming."""
    from mmgen.bench.data import bench_data

    show(bench_data(config, rounds, samples, tell), as_json)
    return 0


@bench.command
def samplers(*, rounds: Annotated[int, Parameter(help="Interleaved repetitions.")] = 15, as_json: Json = False) -> int:
    """Time what each sampler adds to the calls of a network of a millisecond or more."""
    from mmgen.bench.step import bench_samplers

    show(bench_samplers(rounds), as_json)
    return 0


@check.command
def parity(
    file: Annotated[Path | None, Parameter(help="YAML file; the same as --config.")] = None,
    *,
    config: Settings = Config(),
    inject: Annotated[str | None, Parameter(help="Break the decoder in a named way.")] = None,
    as_json: Json = False,
) -> int:
    """Compare what sampling computes with what training computes; ends with code 1 where they differ."""
    from mmgen.parity import check_parity

    results = check_parity(config if file is None else load_config(file), inject)
    holds = all(result["holds"] for result in results)
    if as_json:
        print(json.dumps({"holds": holds, "variants": results}))
        return 0 if holds else 1
    for result in results:
        largest = max(value for name, value in result.items() if name.startswith("largest"))
        tell(
            f"{'holds' if result['holds'] else 'FAILS'}  {result['variant']}: {result['positions']} positions, "
            f"largest relative difference {largest:.1e}{'; ' + result['first'] if result['first'] else ''}"
        )
    return 0 if holds else 1


Shards = Annotated[str, Parameter(help="Shards; by default those of data.train and data.val.")]
Workers = Annotated[int, Parameter(help="Processes; by default one per core.")]


@data.command(name="index")
def index_data(*shards: Shards, config: Settings = Config(), workers: Workers = 0, as_json: Json = False) -> int:
    """Write the index of every shard that has none; a second call goes on where a first one stopped."""
    from mmgen.data.tools.check import index_shards

    show(index_shards(*chosen_data(shards, config), config, workers or os.cpu_count() or 1, tell), as_json)
    return 0


@data.command(name="buckets")
def data_buckets(
    *shards: Shards,
    config: Settings = Config(),
    n: Annotated[int, Parameter(help="Most sizes.")] = 5,
    pixels: Annotated[str, Parameter(help="Height x width whose area no size exceeds.")] = "256x256",
    as_json: Json = False,
) -> int:
    """Propose `model.patcher.image_sizes`: those that crop least from the images of the index."""
    from mmgen.data.tools.sizes import propose

    sides = pixels.split("x")
    if len(sides) != 2 or not all(side.isdigit() and int(side) for side in sides) or n < 1:
        raise ValueError(f"--pixels {pixels} --n {n}: give a height and a width such as 256x256, and at least one size")
    show(propose(*chosen_data(shards, config), config, n, (int(sides[0]), int(sides[1]))), as_json)
    return 0


@data.command(name="check")
def check_data(
    *shards: Shards,
    config: Settings = Config(),
    decode: Annotated[bool, Parameter(help="Decode every image too.")] = True,
    world: Annotated[int, Parameter(help="Ranks whose shares are balanced.")] = 8,
    inject: Annotated[
        str | None, Parameter(help="Break the order: per_rank_seed, dropped_carry, off_by_one, duplicated_shard.")
    ] = None,
    workers: Workers = 0,
    as_json: Json = False,
) -> int:
    """Say what shards hold and lose, and whether the order keeps its promises; code 1 where anything is bad."""
    from mmgen.data.tools.check import check
    from mmgen.data.tools.check_streams import check_streams

    patterns, tokenizer = chosen_data(shards, config)
    if config.data.streams and not shards:
        report = check_streams(tokenizer, config, tell, decode, inject)
    else:
        report = check(patterns, tokenizer, config, tell, decode, inject, workers or os.cpu_count() or 1, world)
    if not as_json:
        for item in report.pop("bad_samples"):
            print(f"bad: {item['shard']}/{item['key']}: {item['reason']}")
        for key in report.pop("duplicate_keys"):
            print(f"duplicate: {key}")
        for path in report.pop("duplicate_shards", []):
            print(f"the same bytes as an earlier shard: {path}")
        for path in report.pop("unused_shards", []):
            print(f"unused: {path}")
    show(report, as_json)
    return 0 if report["holds"] else 1


@data.command(name="show")
def show_data(
    count: Annotated[int, Parameter(help="Rows.")] = 4,
    *shards: Shards,
    config: Settings = Config(),
    out: Folder = Path("runs/data"),
    as_json: Json = False,
) -> int:
    """Draw packed rows as the model sees them: mask, text, images."""
    from mmgen.data.loader import Corpus
    from mmgen.data.tools.show import show as draw_rows

    rows = draw_rows(Corpus(*chosen_data(shards, config), config), count, out)
    if as_json:
        print(json.dumps(rows))
    for row in [] if as_json else rows:
        print(f"{row['picture']}: {row['positions']} positions of {', '.join(row['samples'])}\n    {row['row']}")
    return 0


def chosen_data(shards: tuple[str, ...], config: Config) -> tuple[list[str | SourceConfig], Tokenizer]:
    """Patterns and tokenizer of a `data` command."""
    from mmgen.sequence.tokenizer import Tokenizer

    patterns: list[str | SourceConfig] = [*shards] or [*config.data.train, *config.data.val]
    return patterns, Tokenizer.load(config.data.tokenizer, config.model.patcher.grids)


@lab.command(name="list")
def list_experiments(*, as_json: Json = False) -> int:
    """Every experiment, its title, and the faults that turn it red."""
    from mmgen.lab.catalog import EXPERIMENTS

    rows = [{"name": e.name, "title": e.title, "faults": list(e.faults)} for e in EXPERIMENTS.values()]
    if as_json:
        print(json.dumps(rows))
        return 0
    table = Table("name", "what it shows", "faults", box=None)
    for row in rows:
        table.add_row(str(row["name"]), str(row["title"]), " ".join(row["faults"]))
    print_table(table)
    return 0


@lab.command(name="run")
def run_experiments(
    *names: Annotated[str, Parameter(help="Experiments, as `mmgen lab list` names them.")],
    everything: Annotated[bool, Parameter(name="--all", help="Run all of them.", negative="")] = False,
    fast: Annotated[bool, Parameter(help="Small sizes: minutes for all.", negative="")] = False,
    out: Annotated[Path, Parameter(help="Folder for a JSON and a PNG per experiment.")] = Path("runs/lab"),
    seed: int = 0,
    inject: Annotated[str | None, Parameter(help="Make the toolbox wrong: sign, half, minus_s2 or shifted_t.")] = None,
    jobs: Annotated[int, Parameter(help="Experiments at a time, one thread each.")] = os.cpu_count() or 1,
    as_json: Json = False,
) -> int:
    """Run experiments; ends with code 1 where a bound does not hold."""
    from mmgen.lab.catalog import EXPERIMENTS, Options, check, run_all

    everyone = [e.name for e in EXPERIMENTS.values() if inject is None or inject in e.faults]
    chosen = everyone if everything else list(names)
    for name in chosen:
        check(name, inject)
    if not chosen:
        raise ValueError("name an experiment, or say --all (`mmgen lab list` shows them)")
    results = []
    for result in run_all(chosen, jobs, Options(fast, seed, out, inject)):
        results.append(result)
        tell(f"{'holds' if result.holds else 'FAILS'}  {result.name}  {result.seconds} s  {result.picture}")
        for bound in result.bounds:
            tell(f"    {'  ' if bound.holds else '! '}{bound.figure}: {bound.value:.4g} ({bound.wanted})")
        for known in result.differences:
            tell(
                f"    ~ {known.figure}: {known.measured:.4g} (known difference, wanted {known.wanted}: {known.reason})"
            )
    if as_json:
        print(json.dumps([result.as_json() for result in results]))
    return 0 if all(result.holds for result in results) else 1


def load(config: Config) -> Any:
    """Model, tokenizer and trainer record of the run's newest checkpoint, on the best device."""
    import torch

    from mmgen.train.checkpoint import read as checkpoint

    found, trainer = newest(config)
    model, tokenizer = checkpoint.load_model(found, config.sample.weights)
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return model.to(device), tokenizer, trainer


def newest(config: Config) -> tuple[Path, dict[str, Any]]:
    """The newest whole checkpoint of a run and its record; its model must be the one of the settings."""
    from mmgen.data.latents import settled
    from mmgen.train.checkpoint import read as checkpoint

    found = checkpoint.newest_good(config.run.dir, tell)
    if found is None:
        raise FileNotFoundError(f"{config.run.dir} holds no checkpoint: train it first with `mmgen train --config ...`")
    checkpoint.check_same_model(found[1], settled(config, None, found[1]), found[0])
    return found


def show(values: dict[str, Any], as_json: bool) -> None:
    """A flat object as JSON or as a table."""
    if as_json:
        print(json.dumps(values))
        return
    table = Table(show_header=False, box=None)
    for name, value in values.items():
        for inner, number in value.items() if isinstance(value, dict) else [("", value)]:
            if isinstance(number, dict):
                text = "  ".join(f"{k} {rounded(v, 3)}" for k, v in number.items())
            else:
                text = rounded(number, 4)
            table.add_row(f"{name} {inner}".strip(), text)
    print_table(table)


def print_table(table: Table) -> None:
    """A table on standard output, its cells as they are: `E[x | z]` is no markup."""
    Console(markup=False).print(table)


def plus_minus(half_width: float | None) -> str:
    """An interval's half-width behind its mean."""
    return "" if half_width is None else f" ± {half_width:.2g}"


def rounded(value: object, digits: int) -> str:
    """A number with so many digits; anything else as it prints."""
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


@app.meta.default
def launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Annotated[Path | None, Parameter(help="YAML file of settings, all listed in mmgen/config.py.")] = None,
) -> int:
    """Read the YAML file, put the overrides on top, and run the command."""
    base = Config() if config is None else load_config(config)
    command, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
    if "config" in inspect.signature(command).parameters:
        given = bound.arguments.get("config")
        changes = given.model_dump(exclude_unset=True) if isinstance(given, Config) else {}
        bound.arguments["config"] = override(base, changes)
    return int(command(*bound.args, **bound.kwargs) or 0)


def main() -> None:
    """Entry point: errors of the user's making become one message and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _choose_accelerator()
    try:
        code = app.meta(exit_on_error=False, print_error=False, result_action="return_value")
    except cyclopts.CycloptsError as error:
        code = complain(str(error))
    except ValidationError as error:
        code = complain("\n".join(explain(item) for item in error.errors()))
    except (FloatingPointError, ChildProcessError) as error:
        code = complain(str(error), 1)
    except (ValueError, OSError, ImportError) as error:
        code = complain(str(error))
    sys.exit(code or 0)


def complain(message: str, code: int = USAGE) -> int:
    """Print an error for people and return the exit code."""
    tell(f"mmgen: error: {message}")
    return code


def _choose_accelerator() -> None:
    # DeepSpeed, imported by accelerate, warns at every start where it finds no GPU and was told nothing.
    if not Path("/dev/nvidiactl").exists() and sys.platform == "linux":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
