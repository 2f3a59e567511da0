"""Settings of a new run, each with its reason: rules over a look at the data, the machine and the minutes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np

from mmgen.config import Config
from mmgen.data.tools.sizes import choose_sizes, kept
from mmgen.image.resize import nearest_size
from mmgen.objective import build_layout
from mmgen.propose.look import Document, Look, Size

FILLED = 0.95
"""Typical share of a row that documents fill."""
FRAMING = 2
"""BOS and EOS."""
BRACKETS = 3
"""BOI, size token and EOI around the patches of an image."""
STEPS = (200, 100_000)
"""Fewest and most steps that are proposed."""
EPOCHS = 150
"""Most times that training reads each sample; more of them would teach a small set by heart."""


@dataclass(frozen=True)
class ModelSize:
    """One setting of the dial `--size`: depth, from which all else follows."""

    layers: int
    tokens: int
    """Positions in one optimiser step."""

    @property
    def width(self) -> int:
        """Width of the hidden states: 32 per layer in shallow models, 64 from 12 layers on."""
        return self.layers * (32 if self.layers < 12 else 64)

    @property
    def heads(self) -> int:
        """Attention heads of 32 numbers, or of 64 from a width of 512 on."""
        return self.width // (32 if self.width < 512 else 64)

    @property
    def learning_rate(self) -> float:
        """0.003 at a width of 128, falling with the square root of the width."""
        return float(f"{0.003 * math.sqrt(128 / self.width):.2g}")


SIZES = {
    "tiny": ModelSize(4, 2_560),
    "small": ModelSize(8, 8_192),
    "base": ModelSize(12, 65_536),
    "large": ModelSize(24, 262_144),
}


@dataclass(frozen=True)
class Machine:
    """What a run has: processors or a GPU, and a time."""

    gpu: bool
    minutes: float

    @property
    def pixels(self) -> int:
        """Largest area of an image that is proposed, in pixels."""
        return 64 * 64 if self.gpu else 32 * 32

    @property
    def size(self) -> str:
        """The size of model that learns most in this time."""
        if not self.gpu:
            return "tiny" if self.minutes < 240 else "small"
        return "small" if self.minutes < 120 else "base"


@dataclass(frozen=True)
class Choice:
    """One proposed setting."""

    name: str
    """Section and key, such as `data.row_length`."""
    value: Any
    why: str = ""


def vocabulary(captions: Sequence[str]) -> tuple[int, str]:
    """The number of tokens of a tokenizer that is trained on these captions, and why."""
    words = len({word for caption in captions for word in caption.lower().split()})
    for tokens, most in ((512, 1_000), (2_048, 10_000), (8_192, 50_000)):
        if words < most:
            return tokens, f"{words:,} different words"
    return 32_768, f"{words:,} different words"


def image_settings(look: Look, machine: Machine) -> tuple[list[Size], int, int, list[str]]:
    """Image sizes, patch size and channels, and the reasons."""
    counts = look.sizes
    if not counts:
        return [(16, 16)], 4, 3, ["no pictures: the size is that of mmgen's default"]
    areas = sorted(h * w for (h, w), n in counts.items() for _ in range(n))
    typical = areas[len(areas) // 2]
    area = min(typical, machine.pixels)
    side = math.sqrt(area)
    patch = 2 if side < 16 else 4
    same = len(counts) == 1 and typical <= machine.pixels
    ((height, width),) = counts if same else ((0, 0),)
    if same and height % patch == width % patch == 0:
        sizes, why = [(height, width)], f"all pictures are {height}x{width}"
    else:
        shape = math.exp(float(np.median([math.log(h / w) for (h, w), n in counts.items() for _ in range(n)])))
        one = [(_floor(side * math.sqrt(shape), patch), _floor(side / math.sqrt(shape), patch))]
        several = choose_sizes(counts, max(area, patch**2), patch, 3)
        share = {len(found): _kept(counts, found) for found in (several, one)}
        sizes = several if share[len(several)] - share[1] > 0.05 else one
        limit = "the typical picture" if area == typical else f"{machine.pixels:,} pixels, a size for this machine"
        why = f"no larger than {limit}; {share[len(sizes)]:.0%} of the pictures' area is kept, the rest is cropped"
    grids = ", ".join(f"{h // patch}x{w // patch}" for h, w in sizes)
    channels = 3 if look.coloured else 1
    return sizes, patch, channels, [why, f"patches of {patch}x{patch} pixels give grids of {grids}"]


def _floor(length: float, patch: int) -> int:
    """The largest whole number of patches in a length, at least one, in pixels."""
    return max(1, math.floor(length / patch + 1e-6)) * patch


def _kept(counts: Counter[Size], sizes: Sequence[Size]) -> float:
    shares = kept(np.array(list(counts)), sizes)
    return float(np.average(shares, weights=list(counts.values())))


def document_lengths(
    documents: Sequence[Document], sizes: Sequence[Size], patch: int, tokens: Callable[[str], int], config: Config
) -> list[int]:
    """Positions of each document in a row."""
    layout = build_layout(config.objective)
    found = []
    for document in documents:
        length = FRAMING + sum(map(tokens, document.texts))
        if document.pictures:
            for at in nearest_size(np.array(document.pictures), sizes):
                height, width = sizes[int(at)]
                length += BRACKETS + layout.copies * (layout.lead + (height // patch) * (width // patch))
        found.append(length)
    return found


def row_length(lengths: Sequence[int], without_text: Sequence[int] = ()) -> tuple[int, str]:
    """The length of a row that holds 99 of 100 documents, and all images of every document, and why."""
    ordered = sorted(lengths)
    longest = ordered[min(len(ordered) - 1, math.ceil(0.99 * len(ordered)) - 1)]
    row = max(64, *(-(-length // 8) * 8 for length in (longest, max(without_text, default=0))))
    cut = sum(length > row for length in lengths)
    why = f"99 of 100 documents have at most {longest:,} positions; the longest has {ordered[-1]:,}"
    return row, why + (f"; the text of {cut / len(lengths):.1%} is cut" if cut else "")


@dataclass(frozen=True)
class Names:
    """Where the files of a run are."""

    run: str
    train: str
    val: str
    test: str
    tokenizer: str


def new_backbone(size: str) -> list[Choice]:
    """Settings of a transformer that starts from random weights."""
    model = SIZES[size]
    backbone = {
        "hidden_size": model.width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.heads,
        "intermediate_size": model.width * 5 // 2,
    }
    return [
        Choice("model.backbone", backbone, f"--size {size}: {model.layers} layers; the width and all else follow"),
        Choice("train.optimizer", "muon", "learns in half the steps of adamw here; ZeRO stages need adamw"),
        Choice("train.lr", model.learning_rate),
        Choice("train.weight_decay", 0.2),
    ]


def pretrained_backbone(name: str) -> list[Choice]:
    """Settings of a transformer that continues from a pretrained decoder."""
    return [
        Choice("model.backbone", name, "pretrained; its tokenizer is used, with its own start, end and padding"),
        Choice("train.lr", 2e-4, "low, so that the language of the pretrained model is kept"),
        Choice("train.weight_decay", 0.0),
    ]


@dataclass(frozen=True)
class Proposal:
    """Proposed settings without the number of steps, and how many documents a step holds."""

    choices: list[Choice]
    documents_per_step: float


def propose(
    look: Look,
    machine: Machine,
    size: str,
    names: Names,
    tokens: Callable[[str], int],
    backbone: str | None = None,
) -> Proposal:
    """All proposed settings, with the name of a pretrained `backbone` or a new one."""
    model = SIZES[size]
    sizes, patch, channels, why = image_settings(look, machine)
    lengths = document_lengths(look.documents, sizes, patch, tokens, Config())
    silent = [replace(document, texts=()) for document in look.documents]
    row, row_why = row_length(lengths, document_lengths(silent, sizes, patch, tokens, Config()))
    rows = max(8, round(model.tokens / row / 8) * 8)
    found = [
        Choice("run.dir", names.run),
        Choice("run.seed", 0),
        Choice("data.train", [names.train]),
        Choice("data.val", [names.val], "never trained on: losses and prompts during training"),
        Choice("data.tokenizer", names.tokenizer),
        Choice("data.row_length", row, row_why),
        Choice("data.overlong", "truncate"),
        Choice("data.image_first", 0.4, "share of documents that teach captions: picture first, then text"),
        Choice("data.workers", 0 if not machine.gpu else 4),
        *(new_backbone(size) if backbone is None else pretrained_backbone(backbone)),
        Choice(
            "model.patcher",
            {"channels": channels, "patch_size": patch, "image_sizes": [list(pair) for pair in sizes]},
            "; ".join(why),
        ),
        Choice("objective.lambda_image", 4.0),
        Choice(
            "objective.time",
            {"distribution": "logit_normal", "mu": -1.0},
            "more draws at much noise, where a model decides what a picture shows",
        ),
        Choice("objective.transfusion", {"cap": 0.7}, "captions are learned from clear pictures"),
        Choice("train.batch_rows", rows, f"{rows * row:,} positions in a step"),
        Choice("train.compile", True),
    ]
    if not look.captions:
        found.append(Choice("data.captionless", "keep", "pictures without text are learned alone"))
    elif any(not document.texts for document in look.documents):
        found.append(Choice("data.captionless", "keep", "some pictures have no text"))
    found += [
        Choice("sample", {"solver": "dpmpp_2m", "steps": 16, "guidance_scale": 1.5}, "change them at any time"),
        Choice("eval.test", [names.test], "never trained on: what `mmgen eval` scores"),
    ]
    return Proposal(found, max(rows, rows * row / fmean(lengths) * FILLED))


def schedule(steps: int) -> list[Choice]:
    """The settings that follow from the number of steps."""
    every = max(1, steps // 5)
    return [
        Choice("train.warmup_steps", min(100, max(1, steps // 10))),
        Choice("train.ema_decay", min(0.9999, max(0.9, round(1 - 8 / steps, 4))), "averages the last eighth"),
        Choice("train.log_every", 50 if steps >= 500 else 10),
        Choice("train.save_every", every),
        Choice("train.sample_every", every),
        Choice("train.first_sample", min(60, every)),
    ]


def steps_for(seconds: float, seconds_per_step: float, samples: int, samples_per_step: float) -> tuple[int, str]:
    """The number of steps that fit in a time, and why; limited by how often each sample is read."""
    low, high = STEPS
    fitting = int(seconds / seconds_per_step)
    most = math.ceil(EPOCHS * samples / samples_per_step)
    steps = max(low, min(fitting, most, high))
    steps = steps // 10 * 10
    epochs = steps * samples_per_step / samples
    why = f"{seconds_per_step:.2g} s a step; each sample is read {epochs:.1f} times"
    if fitting < low:
        why += f"; the time is enough for {fitting} steps only, which teach little: give more minutes"
    elif most < fitting:
        why += f"; more than {EPOCHS} times would teach this set by heart, so the run ends early"
    return steps, why
