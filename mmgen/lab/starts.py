"""An experiment on images that start from a picture: strength, inversion and interpolation, on 8x8 digits.

It uses the models of Transfusion that the experiments on documents train.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from mmgen.generate import Decoder, Request
from mmgen.lab import draw
from mmgen.lab.core import Run, experiment
from mmgen.lab.documents import Pixels, digit_judge, made, models_of, nearest, parts, picture_of, settings, upright
from mmgen.train.checkpoint.read import load_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KEPT, DRAWN = 0.25, 1.0
"""A strength that keeps the picture, and the one that draws a new picture."""
STRENGTHS = (KEPT, 0.5, 0.75, DRAWN)


@experiment(
    "Starting from a picture: strength, inversion and interpolation", faults=("lost_start",), shared="documents"
)
def image_start(run: Run) -> Figure:
    """Does the picture from which an image starts decide what is drawn, and when does the caption decide?

    Each held-out digit starts an image whose caption names another digit. At strength 0.25 the image must be nearest to
    its own start; at strength 1 it must show the digit of the caption. The start is inverted under its own caption and
    drawn from its noise: the result must be nearest to the start. A path between two pictures of a digit must begin and
    end at them and show the digit half-way. MAR has no noisy image, so it takes no part.
    """
    count = run.pick(120, 60)
    shown, labels = parts()[1].pictures[:count], parts()[1].labels[:count]
    others = (labels + 1 + np.arange(len(labels)) % 9) % 10
    judge, curves = digit_judge(), {}
    rows: list[Pixels] = [shown[:12]]
    names = ["start"]
    for policy, checkpoint in models_of(run.options).items():
        config = settings(policy, checkpoint, 1, run.seed)
        if config.objective.kind != "transfusion":
            continue
        decoder = Decoder(*load_model(checkpoint), config.sample)
        captions = [Request([str(digit)], "image", i) for i, digit in enumerate(others)]
        started = [replace(one, image=picture_of(start)) for one, start in zip(captions, shown, strict=True)]
        drawn = {s: drawings(decoder, [replace(one, strength=s) for one in started]) for s in STRENGTHS}
        curves[policy] = [float((judge(upright(drawn[s])) == others).mean()) for s in STRENGTHS]
        run.note(**{f"share of captions, {policy}": curves[policy]})
        run.bound(f"start kept, {policy}", own(drawn[KEPT]), at_least=0.95)
        run.bound(f"caption drawn, {policy}", curves[policy][-1], at_least=run.pick(0.85, 0.6))

        named = [replace(one, prompt=[str(digit)]) for one, digit in zip(started, labels, strict=True)]
        inverted = decoder.generate([replace(one, invert=True) for one in named])
        again = [replace(one, image=None, latents=i.latents) for one, i in zip(named, inverted, strict=True)]
        run.bound(f"inverted and drawn, {policy}", own(drawings(decoder, again)), at_least=0.95)
        noise = np.stack([i.latents for i in inverted if i.latents is not None])
        run.note(**{f"deviation of the noise, {policy}": float(noise.std())})

        ways, ends = paths(decoder, named[: count // 4], labels)
        right = [nearest(ways[:, k], parts()[1].pictures) == ends[:, k] for k in (0, 1)]
        run.bound(f"ends of a path, {policy}", float(np.mean(right)), at_least=0.95)
        digits = judge(upright(ways[:, 2]))
        run.bound(f"half-way, {policy}", float((digits == labels[: len(ways)]).mean()), at_least=0.85)
        rows += [*(drawn[s][:12] for s in (KEPT, 0.5, DRAWN)), ways[:12, 2]]
        names += [f"{policy}, {what}" for what in ("strength 0.25", "strength 0.5", "strength 1", "half-way")]
    run.note(strengths=list(STRENGTHS), starts=len(shown))
    return draw.images(torch.from_numpy(np.stack(rows)).float() / 127.5 - 1, names)


def drawings(decoder: Decoder, requests: Sequence[Request]) -> Pixels:
    """The picture [8, 8] of each request."""
    return made(decoder.generate(requests))


def own(pictures: Pixels) -> float:
    """The share of pictures [R, 8, 8] whose nearest held-out digit is the one at the same place."""
    return float((nearest(pictures, parts()[1].pictures) == np.arange(len(pictures))).mean())


def paths(decoder: Decoder, starts: Sequence[Request], labels: NDArray[np.int64]) -> tuple[Pixels, NDArray[np.int64]]:
    """Interpolate from the picture of each request to the next held-out one of the same digit.

    Returns:
        The images at shares 0, 1 and 1/2, [R, 3, 8, 8], and the numbers of the two held-out digits, [R, 2].
    """
    held_out, drawn, ends = parts()[1], [], []
    for i, start in enumerate(starts):
        same = np.flatnonzero(held_out.labels == labels[i])
        other = int(same[(np.searchsorted(same, i) + 1) % len(same)])
        images = decoder.interpolate(start, picture_of(held_out.pictures[other]), [0.0, 1.0, 0.5])
        drawn.append([np.asarray(image.convert("L")) for image in images])
        ends.append((i, other))
    return np.array(drawn), np.array(ends)
