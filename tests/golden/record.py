"""Records what small runs compute: `python -m tests.golden.record digits [--out FOLDER]`.

Each case trains a reduced version of a config in `configs/` for 20 steps on one thread in fp32 through the command
line, then draws ten images and generates ten captions. It uses only the command line, `metrics.jsonl` and the `--json`
outputs, so the same script can record any version of mmgen that is on `PYTHONPATH` (`tests.golden.compare` does that).
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

import contextlib
import hashlib
import importlib.metadata
import io
import json
import platform
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import cyclopts

FOLDER = Path(__file__).parent
STEPS, DRAWN = 20, 10
CASES = {
    "digits": "digits",
    "digits_mar": "digits_mar",
    "digits_mar_raster": "digits_mar_raster",
    "scenes": "scenes",
    "scenes_latent": "scenes_latent",
    "zero2": "digits",
    "zero3": "digits_mar",
    "parity": "digits",
    "shards": "scenes",
}
"""Maps the name of a case to the config that it reduces."""
PACKAGES = ("torch", "transformers", "diffusers", "deepspeed", "accelerate", "tokenizers", "numpy", "pillow", "scipy")
NAMES = ("loss", "loss/text", "loss/image", "grad_norm")


def environment() -> dict[str, object]:
    """All that the bits of a result depend on: the processor, its vector instructions, and versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    first = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]))
    flags = [flag for flag in first.get("flags", "").split() if flag.startswith(("avx", "amx", "fma", "sse4"))]
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "processor": first.get("model name", platform.processor()),
        "family": [first.get("cpu family"), first.get("model")],
        "flags": sorted(flags),
        "python": platform.python_version(),
        **versions,
    }


def mmgen(*words: str) -> str:
    """Run a command of mmgen in this process; returns its standard output, raises RuntimeError if it fails."""
    from mmgen.cli import main

    output, sys.argv = io.StringIO(), ["mmgen", *words]
    try:
        with contextlib.redirect_stdout(output):
            main()
    except SystemExit as stop:
        if stop.code:
            raise RuntimeError(f"mmgen {' '.join(words)} ended with code {stop.code}") from None
    return output.getvalue()


def python(*words: str) -> None:
    """Run a module in its own process; raises CalledProcessError if it fails."""
    subprocess.run([sys.executable, "-m", *words], check=True, stdout=subprocess.DEVNULL)


def prepare(data: Path, sources: Sequence[str], latent: bool) -> None:
    """Write shards and tokenizers of the sources; with `latent`, also an autoencoder with random weights."""
    for name in sources:
        words = ["--train", "300"] if name == "scenes" else []
        python(f"data_prep.{name}", "--out", str(data / name), *words)
        shard = str(data / name / "train-000000.tar")
        python("data_prep.tokenizer", "--out", str(data / name / "tokenizer.json"), shard)
    if not latent:
        return
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
    ).save_pretrained(data / "vae")
    written = json.loads((data / "vae" / "config.json").read_text())
    del written["scaling_factor"]  # so that the run measures its latents
    (data / "vae" / "config.json").write_text(json.dumps(written))


def source_of(case: str) -> str:
    """The name of the data that a case trains on."""
    return "digits" if CASES[case].startswith("digits") else "scenes"


def overrides(case: str, data: Path, run: Path) -> list[str]:
    """Command-line arguments that reduce the config of a case."""
    folder = data / source_of(case)
    words = [
        f"--run.dir={run}", f"--data.train={folder}/train-000000.tar", f"--data.val={folder}/test-000000.tar",
        f"--data.tokenizer={folder}/tokenizer.json", "--data.window=256", "--data.workers=0",
        "--model.backbone.hidden_size=32", "--model.backbone.num_hidden_layers=2",
        "--model.backbone.intermediate_size=64",
        f"--train.steps={STEPS}", "--train.batch_rows=8", "--train.warmup_steps=5", "--train.precision=fp32",
        "--train.no-compile", "--train.no-tensorboard", "--train.log_every=1", f"--train.save_every={STEPS}",
        "--train.sample_every=0", "--train.first_sample=0", "--train.peak_tflops=1",
        "--sample.steps=4", "--sample.max_new_tokens=12",
    ]  # fmt: skip
    if case == "scenes_latent":
        words.append(f"--model.patcher.vae.name={data / 'vae'}")
    return words


def digest(content: bytes) -> str:
    """The first 16 hexadecimal digits of the SHA-256."""
    return hashlib.sha256(content).hexdigest()[:16]


def members(shard: Path) -> list[tuple[str, bytes]]:
    """(name, content) of the members of a tar file, in order."""
    with tarfile.open(shard) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]


def trained(case: str, config: str, words: list[str], run: Path) -> list[list[float]]:
    """Train; returns the losses and the gradient norm of each step."""
    if case.startswith("zero"):
        stage = f"--train.zero_stage={case[-1]}"
        command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python", sys.executable]
        python(*command, "-m", "mmgen.cli", "train", "--config", config, *words, stage)
    else:
        mmgen("train", "--config", config, *words)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[line[name] for name in NAMES] for line in lines if "loss" in line]


def sampled(config: str, words: list[str], test: Path, folder: Path) -> dict[str, list[str]]:
    """Digests of images drawn from the first captions of a test shard, and of captions of its first images."""
    from PIL import Image

    found = members(test)[: 2 * DRAWN]
    captions = [json.loads(content)["caption"] for name, content in found if name.endswith(".json")]
    pictures = []
    for name, content in found:
        if name.endswith(".png"):
            pictures.append(str(folder / name))
            Path(pictures[-1]).write_bytes(content)
    drawn = json.loads(mmgen("sample", *captions, "--config", config, *words, "--out", str(folder), "--json"))
    captioned = json.loads(mmgen("caption", *pictures, "--config", config, *words, "--json"))
    return {
        "images": [digest(Image.open(item["image"]).tobytes()) for item in drawn["samples"]],
        "captions": [digest(item["caption"].encode()) for item in captioned["captions"]],
    }


def record(case: str, configs: Path = Path("configs")) -> dict[str, object]:
    """Run a case; returns its record. `configs` is the folder of the version that is recorded."""
    with tempfile.TemporaryDirectory() as name:
        data, run = Path(name) / "data", Path(name) / "run"
        prepare(data, ["digits", "scenes"] if case == "shards" else [source_of(case)], case == "scenes_latent")
        if case == "shards":
            shards = [data / "digits" / "judge-000000.tar", data / "digits" / "test-000000.tar"]
            shards += [data / "scenes" / f"{part}-000000.tar" for part in ("test", "heldout")]
            return {"shards": {f"{s.parent.name}/{s.name}": digest(repr(members(s)).encode()) for s in shards}}
        config, words = str(configs / f"{CASES[case]}.yaml"), overrides(case, data, run)
        if case == "parity":
            report = json.loads(mmgen("check", "parity", "--config", config, *words, "--json"))
            return {"environment": environment(), "parity": report}
        result = {"environment": environment(), "steps": trained(case, config, words, run)}
        test = data / source_of(case) / "test-000000.tar"
        return {**result, **sampled(config, words, test, Path(name))}


def differences(old: dict, new: dict, tolerance: float = 1e-4) -> list[str]:
    """Descriptions of all differences between two records.

    If the environments are equal, all bits must be equal. Else losses and norms must agree within a relative tolerance,
    and digests of images and captions are not compared, because one bit can change them.
    """
    same = old.get("environment") == new.get("environment")
    wrong = []
    for key in sorted(({*old, *new}) - {"environment"}):
        one, other = old.get(key), new.get(key)
        if same and one != other:
            wrong.append(f"{key}: {first_difference(one, other)}")
        elif not same and key == "steps":
            pairs = [(a, b) for row, column in zip(one, other, strict=True) for a, b in zip(row, column, strict=True)]
            wrong += [f"steps: {a} and {b}" for a, b in pairs if abs(a - b) > tolerance * max(abs(a), 1e-3)]
        elif not same and key == "parity" and (one["holds"], other["holds"]) != (True, True):
            wrong.append("parity: does not hold")
    return wrong


def first_difference(one: object, other: object) -> str:
    """The first pair of values in which two results of equal structure differ."""
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return next(
            f"[{i}] {first_difference(a, b)}" for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b
        )
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return next(f"{name}: {first_difference(one[name], other[name])}" for name in one if one[name] != other[name])
    return f"{one} and {other}"


def main(
    *cases: Annotated[str, cyclopts.Parameter(help=f"One of {', '.join(CASES)}; all by default.")],
    out: Annotated[Path | None, cyclopts.Parameter(help="Folder to write to; tests/golden by default.")] = None,
    configs: Path = Path("configs"),
) -> None:
    """Record cases and write them to files."""
    for case in cases or CASES:
        found = json.dumps(record(case, configs), indent=1).replace("\n   ", " ").replace("\n  ]", " ]")
        ((out or FOLDER) / f"{case}.json").write_text(found + "\n")
        print(case)


if __name__ == "__main__":
    cyclopts.run(main)
