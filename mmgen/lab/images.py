"""Experiments with trained networks on 8x8 digits: attention inside an image, the diffusion head, memorisation."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from mmgen.evaluate.distances import frechet, within_class_variance
from mmgen.flow.loss import FlowLoss
from mmgen.flow.schedule import LinearPath
from mmgen.flow.solvers import runge_kutta, solve
from mmgen.flow.time import uniform_grid
from mmgen.lab import draw
from mmgen.lab.core import Run, experiment
from mmgen.lab.data import digits
from mmgen.lab.nets import MLP, Recipe, Sampling, TimeFeatures, UNet, fit, mistakes, sample_field, train_field

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PATH = LinearPath()
PATCHES, LENGTH, BATCH = 16, 4, 64


def cut(x: Tensor) -> Tensor:
    """Cut images [R, 64] into 2x2 patches, [R, 16, 4]."""
    return x.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, PATCHES, LENGTH)


def join(patches: Tensor) -> Tensor:
    """The inverse of `cut`."""
    return patches.view(-1, 4, 4, 2, 2).transpose(2, 3).reshape(-1, 64)


def split(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (train images, train labels, held-out images, held-out labels): 1,400 and 397 digits."""
    x, y = digits()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return x[order[:1400]], y[order[:1400]], x[order[1400:]], y[order[1400:]]


class PatchTransformer(nn.Module):
    """A small pre-norm transformer over the 16 patches of a labelled digit."""

    def __init__(self, width: int = 96, depth: int = 4, causal: bool = False) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(LENGTH, width), nn.Linear(width, LENGTH)
        self.cell, self.label = nn.Embedding(PATCHES, width), nn.Embedding(10, width)
        self.time, self.by_time = TimeFeatures(), nn.Linear(32, width)
        self.masked = nn.Parameter(torch.zeros(width))
        layer = nn.TransformerEncoderLayer(width, 4, 3 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        mask = torch.full((PATCHES, PATCHES), -torch.inf).triu(1) if causal else torch.zeros(PATCHES, PATCHES)
        self.register_buffer("mask", mask)
        nn.init.zeros_(self.leave.weight)

    def hidden(self, patches: Tensor, label: Tensor, t: Tensor | None = None, hidden_N: Tensor | None = None) -> Tensor:
        """Return hidden states [R, 16, W]; `hidden_N` [R, 16] marks patches that the mask vector replaces."""
        h = self.enter(patches)
        if hidden_N is not None:
            h = torch.where(hidden_N.unsqueeze(2), self.masked, h)
        h = h + self.cell.weight + self.label(label).unsqueeze(1)
        if t is not None:
            h = h + self.by_time(self.time(t.reshape(-1, 1))).unsqueeze(1)
        out: Tensor = self.norm(self.body(h, mask=self.mask))
        return out

    def forward(self, patches: Tensor, label: Tensor, t: Tensor) -> Tensor:
        """Return the velocity, [R, 16, 4]."""
        out: Tensor = self.leave(self.hidden(patches, label, t))
        return out


def spread(images: Tensor, labels: Tensor) -> float:
    """The within-class variance of labelled images [R, 64]."""
    return within_class_variance({k: np.asarray(images[labels == k].double()) for k in range(10)})


def distance(made: Tensor, real: Tensor) -> float:
    """The Fréchet distance of the pixels of two sets of images [R, 64]."""
    return float(frechet(np.asarray(made.double()), np.asarray(real.double())))


@experiment("Attention inside an image: bidirectional against causal, Transfusion on 8x8 digits")
def transfusion_mask(run: Run) -> Figure:
    """Does bidirectional attention inside an image beat causal attention?

    The held-out v loss on fixed noise, by line of patches, and the pixel Fréchet distance of samples.
    """
    x, y, x_test, y_test = split(run.seed)
    g = torch.Generator().manual_seed(run.seed + 1)
    losses, scores, shown = {}, {}, []
    count, repeats = run.pick(1000, 400), run.pick(16, 4)
    label, noise = torch.arange(count) % 10, torch.randn(count, PATCHES, LENGTH, generator=g)
    shuffled = torch.randperm(len(x_test) * repeats, generator=g)
    t = (shuffled + 0.5) / len(shuffled)  # stratified: evenly spaced times in random order
    eps = torch.randn(len(t), PATCHES, LENGTH, generator=g)
    for name, causal in (("bidirectional", False), ("causal", True)):
        torch.manual_seed(run.seed)
        net = PatchTransformer(causal=causal)

        def loss_of(net: PatchTransformer = net) -> Tensor:
            chosen = torch.randint(len(x), (BATCH,))
            clean, time = cut(x[chosen]), torch.rand(BATCH)
            e = torch.randn_like(clean)
            v = net(PATH.mix(clean, e, time.view(-1, 1, 1)), y[chosen], time)
            loss: Tensor = (v - (clean - e)).square().mean()
            return loss

        fit(net.parameters(), run.pick(3000, 500), 2e-3, loss_of)
        with torch.no_grad():
            clean = cut(x_test).repeat(repeats, 1, 1)
            v = net(PATH.mix(clean, eps, t.view(-1, 1, 1)), y_test.repeat(repeats), t)
            losses[name] = (v - (clean - eps)).square().mean((0, 2)).view(4, 4).mean(1)
            made = solve(runge_kutta(noise, uniform_grid(25)), partial(_of_label, net, label))
        scores[name] = distance(join(made), x_test)
        shown.append(join(made)[:10].view(10, 8, 8))
    gap = losses["causal"] - losses["bidirectional"]
    mean = {name: float(by_line.mean()) for name, by_line in losses.items()}
    run.bound_when_trained(
        "held-out v loss, bidirectional over causal", mean["bidirectional"] / mean["causal"], at_most=0.97
    )
    run.bound_when_trained(
        "pixel Frechet distance, causal over bidirectional", scores["causal"] / scores["bidirectional"], at_least=1.5
    )
    run.bound("gap of the first row of patches over the last row's", float(gap[0] / gap[3].clamp(min=1e-9)), at_least=2)
    run.note(v_loss=mean, frechet=scores, by_row={name: by_line.tolist() for name, by_line in losses.items()})
    return draw.images(torch.stack(shown), list(losses))


class DiffusionHead(nn.Module):
    """A residual AdaLN network that predicts the velocity of one patch from its hidden state (Li et al. 2024, MAR)."""

    def __init__(self, width: int = 96, depth: int = 3) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(LENGTH, width), nn.Linear(width, LENGTH)
        self.time, self.by_time = TimeFeatures(), nn.Linear(32, width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)) for _ in range(depth)
        )
        self.shifts = nn.ModuleList(nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width)) for _ in range(depth))
        for parameter in self.shifts.parameters():
            nn.init.zeros_(parameter)
        nn.init.zeros_(self.leave.weight)

    def forward(self, z: Tensor, hidden: Tensor, t: Tensor) -> Tensor:
        """Return the velocity [n, 4] of z [n, 4] for hidden states [n, W] and times [n, 1]."""
        c, h = hidden + self.by_time(self.time(t)), self.enter(z)
        for block, shift in zip(self.blocks, self.shifts, strict=True):
            scale, move, gate = shift(c).chunk(3, 1)
            h = h + gate * block(self.norm(h) * (1 + scale) + move)
        out: Tensor = self.leave(self.norm(h))
        return out


@experiment("The diffusion head samples and an MSE head averages: masked autoregression on 8x8 digits, 16 steps")
def mar_head(run: Run) -> Figure:
    """Does the diffusion head of MAR sample, where a head trained with squared error returns the mean?

    The Fréchet distance and within-class variance of a flow head with 16 steps, with one step, and of an MSE head.
    """
    x, y, x_test, y_test = split(run.seed)
    label = torch.arange(run.pick(1000, 500)) % 10
    heads: dict[str, tuple[PatchTransformer, nn.Module]] = {}
    for kind in ("flow", "mse"):
        torch.manual_seed(run.seed)
        net = PatchTransformer()
        head: nn.Module = DiffusionHead() if kind == "flow" else nn.Linear(96, LENGTH)

        def loss_of(net: PatchTransformer = net, head: nn.Module = head, kind: str = kind) -> Tensor:
            chosen = torch.randint(len(x), (BATCH,))
            clean = cut(x[chosen])
            # Generation reveals one patch per step, so every number of hidden patches must be trained.
            order = torch.rand(BATCH, PATCHES).argsort(1)
            hide = order < torch.randint(1, PATCHES + 1, (BATCH, 1))
            target, h = clean[hide], net.hidden(clean, y[chosen], hidden_N=hide)[hide]
            if kind == "mse":
                loss: Tensor = (head(h) - target).square().mean()
                return loss
            target, h = target.repeat(4, 1), h.repeat(4, 1)  # four draws of t per patch
            t, eps = torch.rand(len(target), 1), torch.randn_like(target)
            v = head(PATH.mix(target, eps, t), h, t)
            return FlowLoss(PATH, "v", "v", 0.05)(v, target, eps, t.squeeze(1)).mean()

        fit([*net.parameters(), *head.parameters()], run.pick(3000, 600), 2e-3, loss_of)
        heads[kind] = (net, head)
    made = {
        "flow, 16 steps": generate(*heads["flow"], label, 16, run.seed),
        "flow, 1 step": generate(*heads["flow"], label, 1, run.seed),
        "MSE": generate(*heads["mse"], label, 0, run.seed),
    }
    scores = {name: distance(images, x_test) for name, images in made.items()}
    ratios = {name: spread(images, label) / spread(x_test, y_test) for name, images in made.items()}
    run.bound_when_trained("Frechet distance, MSE over flow", scores["MSE"] / scores["flow, 16 steps"], at_least=5)
    run.bound(
        "Frechet distance, one flow step over sixteen", scores["flow, 1 step"] / scores["flow, 16 steps"], at_least=2
    )
    run.bound("within-class variance ratio, MSE", ratios["MSE"], at_most=0.2)
    run.note(frechet=scores, variance_ratio=ratios)
    return draw.images(torch.stack([images[:10].view(10, 8, 8) for images in made.values()]), list(made))


def _of_label(net: nn.Module, label: Tensor, z: Tensor, t: Tensor) -> Tensor:
    v: Tensor = net(z, label, t.expand(len(z)))
    return v


def _of_hidden(head: nn.Module, hidden: Tensor, z: Tensor, t: Tensor) -> Tensor:
    v: Tensor = head(z, hidden, t.expand(len(z)).reshape(-1, 1))
    return v


@torch.no_grad()
def generate(net: PatchTransformer, head: nn.Module, label: Tensor, steps: int, seed: int) -> Tensor:
    """Generate images [R, 64] by revealing one patch per step in random order.

    Each patch takes `steps` flow steps; with 0 it is the output of the head.
    """
    g = torch.Generator().manual_seed(seed)
    patches = torch.zeros(len(label), PATCHES, LENGTH)
    order = torch.rand(len(label), PATCHES, generator=g).argsort(1)
    hide = torch.ones(len(label), PATCHES, dtype=torch.bool)
    images = torch.arange(len(label))
    for i in range(PATCHES):
        at = order[:, i]
        h = net.hidden(patches, label, hidden_N=hide)[images, at]
        if steps:
            noise = torch.randn(len(label), LENGTH, generator=g)
            solver = runge_kutta(noise, uniform_grid(steps), scheme="euler")
            patches[images, at] = solve(solver, partial(_of_hidden, head, h))
        else:
            patches[images, at] = head(h)
        hide[images, at] = False
    return join(patches)


@experiment("Breaking an MLP and a small U-Net on digits: no time, few steps, another schedule than the trained one")
def digit_networks(run: Run) -> Figure:
    """How much do three common mistakes cost an MLP and a small U-Net on digits?

    The pixel Fréchet distance of samples as trained, and after each mistake. The network without t has no bound: in 64
    dimensions t can be estimated from the noisy digit itself (Sun et al. 2025), so the loss of quality is small.
    """
    x, _, x_test, _ = split(run.seed)
    noise = torch.randn(len(x_test), 64, generator=torch.Generator().manual_seed(run.seed + 1))
    data = lambda n: x[torch.randint(len(x), (n,))]  # noqa: E731
    makers: dict[str, Callable[[bool], nn.Module]] = {
        "MLP": lambda blind: MLP(64, 256, 4, time=TimeFeatures(blind=blind)),
        "U-Net": lambda blind: UNet(blind=blind),
    }
    scores: dict[str, dict[str, float]] = {}
    shown: dict[str, Tensor] = {"real digits": x_test[:10].view(10, 8, 8)}
    for name, make in makers.items():
        made = mistakes(make, data, Sampling(noise, 25), Recipe(run.pick(2000, 500), 128, 2e-3), run.seed)
        scores[name] = {mistake: distance(images, x_test) for mistake, images in made.items()}
        shown |= {
            f"{name}, {mistake}: FD {scores[name][mistake]:.2f}": images[:10].view(10, 8, 8)
            for mistake, images in made.items()
        }
        for mistake, least in (("2 steps", 1.5), ("wrong schedule", 1.2)):
            ratio = scores[name][mistake] / scores[name]["as trained"]
            figure = f"Frechet distance, {mistake} over as trained, {name}"
            if (name, mistake) == ("MLP", "2 steps"):
                reason = "the MLP's field is straighter than the U-Net's: worse as trained, better with two steps"
                run.known_difference(figure, ratio, wanted=f"at least {least:g}", reason=reason)
            else:
                run.bound(figure, ratio, at_least=least)
    run.note(frechet=scores, frechet_of_real_digits=distance(x[: len(x_test)], x_test))
    return draw.images(torch.stack(list(shown.values())), list(shown))


@experiment("Memorising or generalising: two models on disjoint halves, the same noise")
def disjoint_halves(run: Run) -> Figure:
    """Do two models trained on disjoint halves of the data agree on samples from equal noise?

    The cosine similarity of the samples of both models, for halves of 20 digits (memorised) and of 850 (generalised).
    """
    x, _ = digits()
    x = x[torch.randperm(len(x), generator=run.generator)]
    centre = x.mean(0)
    noise = torch.randn(300, 64, generator=torch.Generator().manual_seed(run.seed + 1))
    alike, copies, shown = {}, {}, {}
    for size in (20, 850):
        made = []
        for half in (x[:size], x[size : 2 * size]):
            torch.manual_seed(run.seed)
            data = lambda n, half=half: half[torch.randint(len(half), (n,))]  # noqa: E731
            trained = train_field(MLP(64, 256, 4), data, Recipe(run.pick(5000, 900), 256, 2e-3))
            made.append(sample_field(trained, noise, 25))
        cosine = torch.nn.functional.cosine_similarity(made[0] - centre, made[1] - centre, dim=1)
        alike[str(size)] = float(cosine.mean())
        copies[str(size)] = float(torch.cdist(made[0], x[:size]).min(1).values.mean())
        shown[f"{size}, first"], shown[f"{size}, second"] = (m[:10].view(10, 8, 8) for m in made)
    run.bound("similarity at 850 minus that at 20 digits", alike["850"] - alike["20"], at_least=0.1)
    run.bound_when_trained(
        "distance to the training set, 20 over 850 digits", copies["20"] / copies["850"], at_most=0.7
    )
    run.note(similarity=alike, distance_to_training_set=copies, root_of_dimension=math.sqrt(64))
    return draw.images(torch.stack(list(shown.values())), list(shown))
