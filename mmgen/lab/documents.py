"""Experiments on documents with several images, each learned: copy, edit and continue, on 8x8 digits.

One model per context policy of Transfusion, and per order of MAR, is trained on a mixture of the three tasks. The three
experiments share these models: one call trains each of them once.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from mmgen.config import Config
from mmgen.config_io import merged
from mmgen.generate import Decoder, Request, Result
from mmgen.lab import draw
from mmgen.lab.core import Options, Run, experiment
from mmgen.lab.data import digits
from mmgen.lab.faults import injected
from mmgen.train.checkpoint.read import load_model
from mmgen.train.loop import train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Pixels = NDArray[np.uint8]
"""A grey picture [8, 8] of values in 0..255."""
Piece = str | Pixels

EDITS: Mapping[str, Callable[[Pixels], Pixels]] = {
    "mirror": lambda picture: picture[:, ::-1],
    "invert": lambda picture: 255 - picture,
    "turn": lambda picture: np.rot90(picture),
}
"""The word that asks for an edit, and the edit."""
MADE: Mapping[str, Callable[[Pixels], Pixels]] = {"copy": lambda picture: picture, **EDITS}
"""Each word of the tasks copy and edit, and what it makes of a picture."""
WORDS = (*MADE, *"0123456789")

LOGIT_NORMAL = {"distribution": "logit_normal"}
TWICE = 172
"""The row length for policies that write an image twice, so that a step holds as many documents as with 128."""


def transfusion(context: str, batch_rows: int = 16, row_length: int = 128, optimizer: str = "adamw") -> dict[str, Any]:
    """Settings of Transfusion with a context policy."""
    return {
        "objective": {"transfusion": {"context": context}, "time": LOGIT_NORMAL},
        "model": {"backbone": {"num_attention_heads": 2, "num_key_value_heads": 2}},
        "train": {"lr": 0.003, "batch_rows": batch_rows, "optimizer": optimizer},
        "data": {"row_length": row_length},
    }


def mar(order: str, row_length: int = 128) -> dict[str, Any]:
    """Settings of MAR with an order.

    A low rate matters: after 900 steps, `masked` without cell and entry norm has 0.10 of the copies right with a rate
    of 0.003, and 0.32 with 0.0015. With them and 0.0008 it has 0.99. Muon learns to copy later: after 1,500 steps with
    this rate, `raster` has 0.61 of the copies right, and 1.00 with AdamW.
    """
    section = {
        "order": order, "head": {"depth": 2, "width": 128, "cell": True}, "draws_per_patch": 2, "entry_norm": True,
    }  # fmt: skip
    return {
        "objective": {"kind": "mar", "mar": section, "time": {**LOGIT_NORMAL, "mu": -1.0}},
        "model": {"backbone": {"num_attention_heads": 4, "num_key_value_heads": 4}},
        "train": {"lr": 0.0008, "batch_rows": 16},
        "data": {"row_length": row_length},
    }


POLICIES: Mapping[str, Mapping[str, Any]] = {
    # Only some of its given pictures have little noise, so it needs more documents per step. With AdamW, 0.27 of its
    # copies are right after 1,500 steps, with Muon 0.81.
    "noisy": transfusion("noisy", batch_rows=32, optimizer="muon"),
    "capped": transfusion("capped"),
    "clean_copy": transfusion("clean_copy", row_length=TWICE, optimizer="muon"),
    "masked": mar("masked", row_length=TWICE),
    "raster": mar("raster"),
    "random": mar("random"),
}
"""Each context policy of Transfusion and each order of MAR, as settings next to those that all share."""
FAST = ("capped", "masked")
"""The policies of a fast run."""


@dataclass(frozen=True)
class Split:
    """Digits of one part of the data set."""

    pictures: Pixels
    """[R, 8, 8]."""
    labels: NDArray[np.int64]
    """[R]."""

    def of(self, digit: int) -> Pixels:
        """All pictures of a digit."""
        chosen: Pixels = self.pictures[self.labels == digit]
        return chosen


@cache
def parts() -> tuple[Split, Split]:
    """The training digits (1,400) and the held-out ones (397)."""
    x, y = digits()
    order = np.random.default_rng(0).permutation(len(x))
    pictures = ((x.numpy() + 1) * 127.5).round().astype(np.uint8).reshape(-1, 8, 8)
    return tuple(Split(pictures[part], y.numpy()[part]) for part in (order[:1400], order[1400:]))  # type: ignore[return-value]


def documents(count: int, seed: int) -> Iterator[list[Piece]]:
    """Training documents: five of seven are a picture, a word, and what the word makes of the picture.

    Two of these five are copies, and one is each edit. The other two documents are three digits that count up: the name
    of each and a picture of it. Either all their pictures are inverted, or none.
    """
    rng, seen, words = np.random.default_rng(seed), parts()[0], ["copy", *MADE]
    for number in range(count):
        if number % 7 < len(words):
            word, picture = words[number % 7], seen.pictures[rng.integers(len(seen.pictures))]
            yield [picture, word, MADE[word](picture)]
        else:
            yield counting(seen, int(rng.integers(10)), bool(rng.integers(2)), 3, rng)


def counting(split: Split, first: int, inverted: bool, count: int, rng: np.random.Generator) -> list[Piece]:
    """`count` digits that count up from `first` (9 is followed by 0): the name of each, and a picture of it."""
    pieces: list[Piece] = []
    for digit in ((first + i) % 10 for i in range(count)):
        pictures = split.of(digit)
        picture = pictures[rng.integers(len(pictures))]
        pieces += [str(digit), EDITS["invert"](picture) if inverted else picture]
    return pieces


def write_shard(path: Path, samples: Iterator[list[Piece]]) -> None:
    """Write samples as interleaved documents: a JSON list of texts and of names of PNG files."""
    with tarfile.open(path, "w") as tar:
        for number, pieces in enumerate(samples):
            files = {
                f"{number:06d}.{i}.png": _png(piece) for i, piece in enumerate(pieces) if not isinstance(piece, str)
            }
            listed = [{"text": p} if isinstance(p, str) else {"image": f"{i}.png"} for i, p in enumerate(pieces)]
            for name, data in {f"{number:06d}.json": json.dumps(listed).encode(), **files}.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def _png(picture: Pixels) -> bytes:
    buffer = io.BytesIO()
    picture_of(picture).save(buffer, "PNG")
    return buffer.getvalue()


def picture_of(picture: Pixels) -> Image.Image:
    """The picture as an image of PIL."""
    return Image.fromarray(np.ascontiguousarray(picture))


def settings(policy: str, folder: Path, steps: int, seed: int) -> Config:
    """The settings of a model of the digits' size: width 128 and four layers, as in `configs/digits.yaml`."""
    shared = {
        "run": {"dir": folder, "seed": seed},
        "data": {
            "train": [str(folder.parent / "train-000000.tar")],
            "tokenizer": folder.parent / "tokenizer.json",
            "workers": 0,
        },
        "model": {
            "backbone": {"hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 320},
            "patcher": {"channels": 1, "patch_size": 2, "image_sizes": [[8, 8]]},
        },
        "train": {
            "steps": steps, "warmup_steps": 100, "weight_decay": 0.2,
            "ema_decay": 0.99, "save_every": steps, "sample_every": 0, "log_every": 50, "tensorboard": False,
            "compile": True,
        },
        "sample": {
            "solver": "dpmpp_2m", "steps": 16, "guidance_scale": 1.0, "unmask_steps": 8, "max_images": 1,
        },
    }  # fmt: skip
    return Config.model_validate(merged(shared, POLICIES[policy]))


def prepare_data(folder: Path, seed: int) -> None:
    """Write the training shard and the tokenizer into a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_shard(folder / "train-000000.tar", documents(6000, seed))
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(("?", *WORDS))}, "?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))


def train_policy(policy: str, folder: Path, steps: int, options: Options) -> Path:
    """Train one model with one thread and return its checkpoint; what training prints goes to `train.log`."""
    torch.set_num_threads(1)
    config = settings(policy, folder / policy, steps, options.seed)
    config.run.dir.mkdir(parents=True)
    with ExitStack() as stack:
        log = stack.enter_context((config.run.dir / "train.log").open("w"))
        stack.enter_context(redirect_stdout(log))
        stack.enter_context(redirect_stderr(log))
        stack.enter_context(injected(options.inject))
        train(config)
    return config.run.dir / "checkpoints" / "latest"


@cache
def models_of(options: Options) -> Mapping[str, Path]:
    """The checkpoint of each policy, trained at the first call; `options.jobs` models are trained at a time."""
    policies, steps = (FAST, 900) if options.fast else (tuple(POLICIES), 1500)
    folder = options.stem("documents")
    prepare_data(folder, options.seed)
    with ProcessPoolExecutor(min(options.jobs, len(policies)), get_context("spawn")) as pool:
        trained = [pool.submit(train_policy, policy, folder, steps, options) for policy in policies]
        return {policy: future.result() for policy, future in zip(policies, trained, strict=True)}


@dataclass(frozen=True)
class Asked:
    """Requests of one task, and how a result is judged."""

    requests: Sequence[Request]
    right: Callable[[Sequence[Result]], NDArray[np.bool_]]
    """Which results are right, [R]."""


def made(results: Sequence[Result]) -> Pixels:
    """The first picture of each result, [R, 8, 8]; black where there is none."""
    blank = np.zeros((8, 8), np.uint8)
    pictures = [np.asarray(result.images[0].convert("L")) if result.images else blank for result in results]
    return np.stack(pictures)


def nearest(pictures: Pixels, candidates: Pixels) -> NDArray[np.int64]:
    """The index of the candidate [C, 8, 8] that is nearest to each picture [R, 8, 8], by squared pixel distance."""
    flat = torch.from_numpy(pictures.reshape(len(pictures), -1)).double()
    found: NDArray[np.int64] = (
        torch.cdist(flat, torch.from_numpy(candidates.reshape(len(candidates), -1)).double()).argmin(1).numpy()
    )
    return found


def digit_judge() -> Callable[[Pixels], NDArray[np.int64]]:
    """Names the digit of each picture [R, 8, 8]: a support vector machine that is trained on the training digits."""
    from sklearn.svm import SVC

    seen = parts()[0]
    judge = SVC(C=10).fit(seen.pictures.reshape(-1, 64) / 255, seen.labels)
    return lambda pictures: np.asarray(judge.predict(pictures.reshape(-1, 64) / 255))


def upright(pictures: Pixels) -> Pixels:
    """Pictures [R, 8, 8] with a dark ground: bright ones are inverted."""
    bright = pictures.mean((1, 2), keepdims=True) > 127.5
    return np.where(bright, 255 - pictures, pictures)


def ask_copy(count: int) -> Asked:
    """Copy a held-out digit: right if the nearest held-out digit is the one that was shown."""
    shown = parts()[1].pictures
    requests = [Request([picture_of(picture), "copy"], "image", i) for i, picture in enumerate(shown[:count])]
    return Asked(requests, lambda results: nearest(made(results), shown) == np.arange(count))


def ask_edit(count: int) -> Asked:
    """Edit a held-out digit: right if the nearest of all edits of all held-out digits is the one that was asked."""
    shown, words = parts()[1].pictures, [*EDITS]
    candidates = np.concatenate([np.stack([EDITS[word](picture) for picture in shown]) for word in words])
    asked = [i % len(words) for i in range(count)]
    requests = [Request([picture_of(shown[i]), words[k]], "image", i) for i, k in enumerate(asked)]
    wanted = np.array([k * len(shown) + i for i, k in enumerate(asked)])
    return Asked(requests, lambda results: nearest(made(results), candidates) == wanted)


def ask_continue(count: int) -> Asked:
    """Continue after two digits: right if the text names the next digit, and a picture of it in the same style follows.

    The digit is recognised by `digit_judge`.
    """
    held_out, judge = parts()[1], digit_judge()
    rng = np.random.default_rng(5)
    cases = [(i % 10, bool(i // 10 % 2)) for i in range(count)]
    prompts = [counting(held_out, digit, inverted, 2, rng) for digit, inverted in cases]
    requests = [
        Request([p if isinstance(p, str) else picture_of(p) for p in prompt], "auto", i)
        for i, prompt in enumerate(prompts)
    ]
    following, inverted = np.array([(digit + 2) % 10 for digit, _ in cases]), np.array([case[1] for case in cases])

    def right(results: Sequence[Result]) -> NDArray[np.bool_]:
        pictures = made(results)
        style = (pictures.mean((1, 2)) > 127.5) == inverted
        drawn = judge(np.where(inverted[:, None, None], 255 - pictures, pictures)) == following
        named = np.array([result.text == str(digit) for result, digit in zip(results, following, strict=True)])
        correct: NDArray[np.bool_] = style & drawn & named
        return correct

    return Asked(requests, right)


def answer(run: Run, asked: Asked, at_least: float) -> Figure:
    """Give the requests to every model, record the share that is right, and draw the first pictures."""
    shares, rows, labels = {}, [], []
    for policy, checkpoint in models_of(run.options).items():
        model, tokenizer = load_model(checkpoint)
        config = settings(policy, checkpoint, 1, run.seed)
        results = Decoder(model, tokenizer, config.sample).generate(asked.requests)
        shares[policy] = float(asked.right(results).mean())
        figure = f"share right, {policy}"
        run.bound(figure, shares[policy], at_least=at_least)
        shown = [
            np.asarray(piece)
            for request in asked.requests[:12]
            for piece in request.prompt
            if not isinstance(piece, str)
        ]
        columns = len(shown) // 12
        for column in range(columns):
            rows.append(np.stack(shown[column::columns]))
            labels.append(f"{policy}, given")
        rows.append(made(results[:12]))
        labels.append(f"{policy}, drawn")
    run.note(requests=len(asked.requests))
    return draw.images(torch.from_numpy(np.stack(rows)).float() / 127.5 - 1, labels)


@experiment("Copying the picture before, asked by a word: 8x8 digits", faults=("shared_t", "blind"), shared="documents")
def image_copy(run: Run) -> Figure:
    """Does a model learn to repeat a picture that it is shown?

    The share of held-out digits whose copy is nearest to the digit itself among all held-out digits, at guidance 1.
    """
    return answer(run, ask_copy(run.pick(300, 120)), run.pick(0.95, 0.5))


@experiment("Editing the picture before, as a word asks: 8x8 digits", faults=("blind",), shared="documents")
def image_edit(run: Run) -> Figure:
    """Does a model learn to mirror, invert or turn a picture, as a word asks?

    The share of held-out digits whose edit is nearest to the edit that was asked, among all edits of all digits.
    """
    return answer(run, ask_edit(run.pick(300, 120)), run.pick(0.95, 0.5))


@experiment("Continuing a document of captions and pictures: 8x8 digits", faults=("blind",), shared="documents")
def image_continue(run: Run) -> Figure:
    """Does a model continue with the third caption and picture, in the style of the two before?

    The share of documents of held-out digits whose third caption and picture are right in digit and style.
    """
    return answer(run, ask_continue(run.pick(300, 120)), run.pick(0.9, 0.5))
