"""Experiments with trained networks on points of a plane, alone or embedded in many dimensions."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmgen.flow.field import Field, FiniteSet, Function, GaussianMixture
from mmgen.flow.schedule import LinearPath
from mmgen.flow.solvers import runge_kutta, solve
from mmgen.flow.time import uniform_grid
from mmgen.lab import draw
from mmgen.lab.core import Run, experiment
from mmgen.lab.data import MEANS, drawn_text, moons, near, plane, sliced_w2, spiral
from mmgen.lab.nets import (
    MLP,
    Draw,
    Preconditioned,
    Recipe,
    Sampling,
    TimeFeatures,
    mistakes,
    sample_field,
    train_field,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PREDICTIONS = ("x", "eps", "v")
SAMPLES = 2000


def frozen(trained: Field, t: float) -> Field:
    """Return the field with its time frozen: the network is evaluated at `t` whatever the solver's time is."""
    at = torch.tensor(t)
    return Field(trained.path, lambda z, _: trained.network(z, at), trained.prediction)


def spiral_field(run: Run, mu: float, sigma: float) -> Field:
    """Train a v-prediction network on the spiral; with sigma = 0 it is trained and evaluated at one time."""
    torch.manual_seed(run.seed)
    distribution = "constant" if sigma == 0 else "logit_normal"
    net = MLP(2, width=128, depth=5)
    recipe = Recipe(run.pick(2000, 800), distribution=distribution, mu=mu, sigma=sigma)
    trained = train_field(net, spiral, recipe)
    return frozen(trained, 1 / (1 + math.exp(-mu))) if sigma == 0 else trained


@experiment("Which t to train on: logit-normal(mu, s) on a spiral; velocity red positive, blue negative, black zero")
def spiral_times(run: Run) -> Figure:
    """Which timestep distribution learns a spiral best?

    The distance to the curve, sliced W2 and velocity maps for logit-normal t with each (mu, s); s = 0 trains one t.
    """
    data = spiral(SAMPLES, run.generator)
    noise = torch.randn(SAMPLES, 2, generator=torch.Generator().manual_seed(run.seed + 1))
    grid = [(mu, s) for mu in (-2.0, 0.0, 2.0) for s in (0.0, 0.5, 1.0, 2.0)]
    if run.fast:
        grid = [(0.0, 0.0), (2.0, 0.0), (0.0, 2.0), (2.0, 2.0)]
    exact = FiniteSet(data).velocity
    made = {"exact field": sample_field(Field(LinearPath(), exact), noise)}
    fields: dict[str, Function] = {"exact field": exact}
    table: dict[tuple[float, float], dict[str, float]] = {}
    for mu, s in grid:
        trained = spiral_field(run, mu, s)
        x = sample_field(trained, noise)
        table[mu, s] = {"near": near(x, data), "sliced_w2": sliced_w2(x, data)}
        name = "mu {:g}, s {:g}\nnear {near:.3f}\nSW2 {sliced_w2:.3f}".format(mu, s, **table[mu, s])
        fields[name], made[name] = trained("v"), x
    run.bound(
        "near(mu = 0) over near(mu = 2), both s = 0", table[0.0, 0.0]["near"] / table[2.0, 0.0]["near"], at_least=5
    )
    run.bound(
        "SW2(s = 0) over SW2(s = 2), mu = 2", table[2.0, 0.0]["sliced_w2"] / table[2.0, 2.0]["sliced_w2"], at_least=2
    )
    run.note(
        table={f"mu {mu:g}, s {s:g}": row for (mu, s), row in table.items()}, near_of_data=near(spiral(SAMPLES), data)
    )
    return draw.velocity_maps(fields, (0.1, 0.5, 0.8, 0.95), data, made)


@experiment("True and learned velocity on a spiral, red positive, blue negative, black where zero; samples green")
def velocity_maps(run: Run) -> Figure:
    """How does a learned velocity differ from the exact one, and does the exact field frozen at one time still work?

    The exact field of 2,000 points and that of a network at four times, and samples of the exact field frozen at
    t = 0.88. The frozen field ends on the mean of the points in a Gaussian window of deviation w = 0.12 / 0.88. On an
    arc of radius r this mean lies r (1 - exp(-w^2 / 2 r^2)), about w^2 / 2 r = 0.0093 / r, inside the arc, and 1 / r
    has mean 1 on this spiral.
    """
    data = spiral(SAMPLES, run.generator)
    noise = torch.randn(SAMPLES, 2, generator=torch.Generator().manual_seed(run.seed + 1))
    exact = FiniteSet(data)
    trained = spiral_field(run, 0.0, 1.0)
    at = torch.tensor(0.88)
    frozen_field = Field(LinearPath(), lambda z, _: exact.velocity(z, at))
    made = {"exact": sample_field(Field(LinearPath(), exact.velocity), noise), "learned": sample_field(trained, noise)}
    frozen_samples = sample_field(frozen_field, noise)
    run.bound("distance to the curve, exact field frozen at t = 0.88", near(frozen_samples, data), at_most=0.012)
    run.note(frozen_sliced_w2=sliced_w2(frozen_samples, data), near_of_data=near(spiral(SAMPLES), data))
    fields = {"exact": exact.velocity, "learned": trained("v")}
    return draw.velocity_maps(fields, (0.1, 0.5, 0.8, 0.95), data, made)


# --- a plane in many dimensions ----------------------------------------------------------------------------


def small_spiral(count: int, generator: torch.Generator | None = None) -> Tensor:
    """Points on the spiral, scaled to the unit disc, [count, 2].

    At twice the size the spiral has the standard deviation of the noise, so that remaining noise looks like data:
    standard normal points have a sliced W2 of 0.35 to the larger spiral and 0.56 to this one.
    """
    return spiral(count, generator) / 2


def hidden_spiral(dimension: int, seed: int) -> tuple[Tensor, Draw]:
    """Return the directions [2, D] of a random plane and a function that draws n points of the spiral in it, [n, D]."""
    axes = plane(dimension, seed) if dimension > 2 else torch.eye(2)
    return axes, lambda n: small_spiral(n) @ axes


def judge(made: Tensor, axes: Tensor, data: Tensor) -> tuple[float, float]:
    """Return (sliced W2 to `data` inside the plane, RMS distance from the plane)."""
    inside = made @ axes.T
    return sliced_w2(inside, data), float((made - inside @ axes).square().sum(1).mean().sqrt())


@dataclass(frozen=True)
class Learner:
    """The network that learns the spiral in a random plane."""

    dimension: int
    width: int = 256
    bottleneck: int | None = None
    """Width of a linear layer before the network, if any."""
    std: float | None = None
    """Standard deviation of the data for EDM's preconditioning, if any."""


@dataclass(frozen=True)
class Judged:
    """Samples of a network that learned the spiral in a random plane, and their scores."""

    w2: float
    """Sliced W2 to the spiral inside the plane."""
    off_plane: float
    """RMS distance from the plane."""
    made: Tensor
    """The samples in the plane, [n, 2]."""


def spiral_recipe(steps: int, batch: int) -> Recipe:
    """Return the recipe, with its timestep distribution, that all experiments in a random plane share."""
    return Recipe(steps, batch, mu=-0.8, sigma=0.8)


def hidden(run: Run, learner: Learner, recipe: Recipe) -> Judged:
    """Train on the spiral in a random plane, sample and score."""
    torch.manual_seed(run.seed)
    dimension = learner.dimension
    axes, data = hidden_spiral(dimension, run.seed)
    # With these mu and sigma, t above 0.8 is hardly trained. Only with slow features of t does the network extrapolate.
    time = TimeFeatures(fastest=1.0)
    net: torch.nn.Module = MLP(dimension, learner.width, bottleneck=learner.bottleneck, time=time)
    if learner.std is not None:
        net = Preconditioned(net, LinearPath(), learner.std)
    trained = train_field(net, data, recipe)
    noise = torch.randn(SAMPLES, dimension, generator=torch.Generator().manual_seed(run.seed + 1))
    made = sample_field(trained, noise)
    w2, off = judge(made, axes, small_spiral(SAMPLES, run.generator))
    return Judged(w2, off, made @ axes.T)


@experiment("What to predict when data are a plane in 512 dimensions (JiT's toy)")
def jit_toy(run: Run) -> Figure:
    """Which prediction works when the data are a plane in 512 dimensions?

    x, v and eps predicted by a ReLU network of 5 layers of width 256, with the loss in v; 50 steps of Heun.
    """
    recipe = spiral_recipe(run.pick(4000, 700), run.pick(512, 256))
    data = small_spiral(SAMPLES, run.generator)
    w2, panels = {}, {}
    for kind in ("x", "v", "eps"):
        judged = hidden(run, Learner(512), replace(recipe, prediction=kind))
        w2[kind] = judged.w2
        run.note(**{f"off_plane_rms_{kind}": judged.off_plane})
        panels[f"{kind}: SW2 {judged.w2:.3f}, off-plane {judged.off_plane:.2f}"] = (data, judged.made)
    run.bound("SW2 of x-prediction", w2["x"], at_most=0.12)
    run.bound("SW2 of v over x", w2["v"] / w2["x"], at_least=4)
    run.bound("SW2 of eps over x", w2["eps"] / w2["x"], at_least=10)
    return draw.scatters(panels, columns=3)


@experiment(
    "Nine pairs of prediction and loss space, and EDM's preconditioning as a tenth, in 2, 16 and 512 dimensions"
)
def nine_pairs(run: Run) -> Figure:
    """How do the nine pairs of prediction and loss space, and EDM, compare in 2, 16 and 512 dimensions?

    The sliced W2 in the plane and the RMS distance from it, for every pair and dimension. EDM is trained with the
    timestep distribution of the others and with its own, ln(noise / data) ~ N(-1.2 + ln 2, 1.2^2) (Karras et al. 2022,
    table 1). Its unit is the standard deviation of one number of the data, not that of a direction in the plane.
    """
    recipe, width = spiral_recipe(run.pick(1000, 250), 256), run.pick(256, 128)
    w2: dict[str, dict[str, float]] = {}
    off: dict[str, dict[str, float]] = {}
    for dimension in (2, 16, 512):
        std = float((small_spiral(10000) @ hidden_spiral(dimension, run.seed)[0]).std())
        plain, edm = Learner(dimension, width), Learner(dimension, width, std=std)
        results = {
            f"{prediction} in {space}": hidden(run, plain, replace(recipe, prediction=prediction, loss_space=space))
            for prediction in PREDICTIONS
            for space in PREDICTIONS
        }
        results["EDM"] = hidden(run, edm, recipe)
        own_times = replace(recipe, mu=1.2 - math.log(2) - math.log(std), sigma=1.2)
        results["EDM, own times"] = hidden(run, edm, own_times)
        case = f"D = {dimension}"
        w2[case] = {name: judged.w2 for name, judged in results.items()}
        off[case] = {name: judged.off_plane for name, judged in results.items()} if dimension > 2 else {}
    best = {kind: min(w2["D = 512"][f"{kind} in {space}"] for space in PREDICTIONS) for kind in PREDICTIONS}
    run.bound("best v over best x at D = 512", best["v"] / best["x"], at_least=1.5)
    run.bound("best eps over best x at D = 512", best["eps"] / best["x"], at_least=5)
    run.note(sliced_w2=w2, off_plane_rms=off)
    return draw.bar_grid({"sliced W2 in the plane": w2, "RMS distance from the plane": off})


@experiment("A linear bottleneck before the network: x-prediction in 512 dimensions")
def bottleneck(run: Run) -> Figure:
    """Does a linear bottleneck before the network hurt x-prediction in 512 dimensions?

    The sliced W2 for bottlenecks of several widths, for patches of 512 numbers whose data are a plane.
    """
    recipe, w2 = replace(spiral_recipe(run.pick(1500, 400), 256), prediction="x"), dict[str, float]()
    for width in (2, 8, 32, 128, None):
        judged = hidden(run, Learner(512, run.pick(256, 128), width), recipe)
        w2[f"{width or 'none'}"] = judged.w2
        run.note(**{f"off_plane_rms_{width or 'none'}": judged.off_plane})
    run.bound("SW2 with 32 channels over none", w2["32"] / w2["none"], at_most=1.5)
    run.note(sliced_w2=w2)
    return draw.bars(w2, "sliced W2", log=False)


@experiment("A shift of t does not rescue eps or v in 512 dimensions")
def time_shift(run: Run) -> Figure:
    """Can another timestep distribution make eps- or v-prediction work in 512 dimensions?

    The sliced W2 of each prediction for three values of mu of the logit-normal distribution.
    """
    recipe, w2 = spiral_recipe(run.pick(1500, 350), 256), dict[str, float]()
    learner, shifts = Learner(512, run.pick(256, 128)), (-2.0, -0.8, 0.8)
    for kind in PREDICTIONS:
        for mu in shifts:
            w2[f"{kind}, mu {mu:g}"] = hidden(run, learner, replace(recipe, prediction=kind, mu=mu)).w2
    best = {kind: min(w2[f"{kind}, mu {mu:g}"] for mu in shifts) for kind in PREDICTIONS}
    run.bound("best v over best x", best["v"] / best["x"], at_least=2)
    run.bound("best eps over best x", best["eps"] / best["x"], at_least=5)
    run.note(sliced_w2=w2)
    return draw.bars(w2, "sliced W2")


# --- regression --------------------------------------------------------------------------------------------


@experiment("The loss cannot fall below its floor: Gaussian data, every prediction, loss in v")
def loss_floor(run: Run) -> Figure:
    """Does the loss of a trained network reach its exact minimum without falling below it?

    The loss on fresh samples of Gaussian data N(0, S) over the exact minimum, which is (pi / 2) tr(S^1/2) / D for v.
    Where a denominator is clipped, the minimum is the same integral with the clipped weight, by quadrature.
    """
    std = torch.tensor([0.5, 1.0, 1.5])
    path, clip = LinearPath(), 0.05
    t = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    spread = std.double().square()
    posterior = {  # variance of each quantity given z, [t, D]
        "x": spread * (1 - t[:, None]) ** 2, "eps": spread * t[:, None] ** 2, "v": spread + 0 * t[:, None],
    }  # fmt: skip
    total = spread * t[:, None] ** 2 + (1 - t[:, None]) ** 2
    ratios: dict[str, float] = {}
    for kind in PREDICTIONS:
        gain = path.gain(kind, "v", t[:, None], clip).square()
        floor = float((gain * posterior[kind] / total).mean())
        torch.manual_seed(run.seed)
        net = MLP(3, width=128, depth=3)
        recipe = Recipe(run.pick(4000, 1500), 1024, 3e-3, kind, "v", "uniform", clip=clip)
        trained = train_field(net, lambda n: torch.randn(n, 3) * std, recipe)
        loss, error = _fresh_loss(trained, std, clip, run)
        ratios[kind] = loss / floor
        run.bound(f"loss minus floor in standard errors, {kind}", (loss - floor) / error, at_least=-3)
        run.bound(f"loss over floor, {kind}", loss / floor, at_most=1.01)
        if kind == "v":
            run.note(floor=floor, closed_form=math.pi / 2 * float(std.mean()))
    return draw.bars(ratios, "loss / floor", log=False)


@torch.no_grad()
def _fresh_loss(trained: Field, std: Tensor, clip: float, run: Run) -> tuple[float, float]:
    """Return (mean, standard error) of the loss in v over fresh samples with stratified t."""
    from mmgen.flow.loss import FlowLoss

    n, g = 200_000, torch.Generator().manual_seed(run.seed + 7)
    t = (torch.arange(n) + torch.rand(n, generator=g)) / n
    x, eps = torch.randn(n, 3, generator=g) * std, torch.randn(n, 3, generator=g)
    output = trained.network(trained.path.mix(x, eps, t[:, None]), t[:, None])
    losses = FlowLoss(trained.path, trained.prediction, "v", clip)(output, x, eps, t)
    return float(losses.mean()), float(losses.std() / n**0.5)


@experiment("Regression finds the posterior mean: E[x | z], E[eps | z] and E[v | z] of a mixture")
def posterior_mean(run: Run) -> Figure:
    """Do networks trained on x, eps and v learn the posterior means?

    The relative error of trained networks against the exact E[x | z], E[eps | z] and E[v | z] of a mixture, at five t.
    """
    data = GaussianMixture(MEANS.float(), 0.3)
    times = [0.1, 0.3, 0.5, 0.7, 0.9]
    curves: dict[str, list[float]] = {}
    for kind in PREDICTIONS:
        torch.manual_seed(run.seed)
        recipe = Recipe(run.pick(4000, 1200), 1024, 2e-3, kind, kind, "uniform")
        trained = train_field(MLP(2, 128, 4), lambda n: data.sample(n), recipe)
        curves[kind] = []
        for time in times:
            t = torch.tensor(time)
            z = data.path.mix(data.sample(4000), torch.randn(4000, 2), t)
            exact = data.path.convert("x", kind, data.denoised(z, t), z, t, 0.0)
            error = (trained.network(z, t) - exact).square().mean().sqrt() / exact.square().mean().sqrt()
            curves[kind].append(float(error))
        run.bound(f"largest relative error of {kind}, t 0.3 to 0.7", max(curves[kind][1:4]), at_most=0.1)
    run.note(times=times, relative_error=curves)
    return draw.lines(times, curves, "t", "relative RMS error")


# --- sources and couplings ---------------------------------------------------------------------------------


def optimal_pairs(x: Tensor, eps: Tensor) -> Tensor:
    """Reorder eps so that the sum of squared distances of the pairs is smallest (Tong et al. 2023)."""
    from scipy.optimize import linear_sum_assignment

    _, columns = linear_sum_assignment(torch.cdist(x, eps).square().numpy())
    return eps[torch.from_numpy(columns)]


def ring(n: int) -> Tensor:
    """Points on a circle of radius 1.5, a source without a density, [n, 2]."""
    angle = 2 * math.pi * torch.rand(n)
    return 1.5 * torch.stack([angle.cos(), angle.sin()], 1)


def eight_gaussians(n: int) -> Tensor:
    """Points of eight narrow Gaussians on a circle of radius 1.5, [n, 2]."""
    angle = 2 * math.pi * torch.randint(8, (n,)) / 8
    return 1.5 * torch.stack([angle.cos(), angle.sin()], 1) + 0.15 * torch.randn(n, 2)


SOURCES: dict[str, Draw] = {"Gaussian": lambda n: torch.randn(n, 2), "eight": eight_gaussians, "ring": ring}


@experiment("Couplings and sources: independent or minibatch-optimal pairs, from a Gaussian, eight of them, or a ring")
def couplings(run: Run) -> Figure:
    """Do optimally paired batches need fewer steps, and does the source have to be Gaussian?

    The sliced W2 with 2 and 50 Euler steps for three sources, with independent and with optimal pairs. Optimal pairs
    give straighter trajectories, and any source with a density works.
    """
    data, panels = moons(SAMPLES, run.generator), {}
    for source, noise in SOURCES.items():
        two: dict[str, float] = {}
        for pairs, pair in (("independent", None), ("optimal", optimal_pairs)):
            torch.manual_seed(run.seed)
            recipe = Recipe(run.pick(2500, 700), 256, distribution="uniform", noise=noise, pair=pair)
            trained = train_field(MLP(2, 128, 4), moons, recipe)
            torch.manual_seed(run.seed + 1)
            start = noise(SAMPLES)
            made = {n: sample_field(trained, start, n, "euler") for n in (2, 50)}
            two[pairs], fine = (sliced_w2(x, data) for x in made.values())
            for n, x in made.items():
                panels[f"{source}, {pairs}, {n} steps: SW2 {sliced_w2(x, data):.2f}"] = (data, x)
            figure = f"SW2 with 50 steps, {source}, {pairs}"
            if (source, pairs) == ("ring", "independent"):
                reason = "a circle has no density: a smooth flow maps it to a curve, which cannot cover the moons"
                run.known_difference(figure, fine, wanted="at most 0.12", reason=reason)
            else:
                run.bound(figure, fine, at_most=0.12)
        ratio = two["optimal"] / two["independent"]
        run.bound(f"SW2 with 2 steps, optimal over independent, {source}", ratio, at_most=0.7)
    return draw.scatters(panels)


@experiment("Flows to moons, a spiral and drawn text: particles and velocity")
def animation(run: Run) -> Figure:
    """What does a flow from noise to data look like?

    The exact fields of three sets of 1,500 points, as an animation (`animation.gif`) and its last frame.
    """
    g = run.generator
    sets = {"moons": moons(1500, g), "spiral": spiral(1500, g), "text": drawn_text("flow", 1500, g)}
    line = torch.linspace(-2.4, 2.4, 17)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).view(-1, 2)
    times = uniform_grid(run.pick(60, 30)).float()
    z = {name: torch.randn(1500, 2, generator=g) for name in sets}
    frames = []
    for i, t in enumerate(times[:-1]):
        arrows = torch.stack([FiniteSet(x).velocity(grid, t) for x in sets.values()])
        frames.append((float(t), torch.stack(list(z.values())), grid.expand(3, -1, 2), arrows))
        for name, x in sets.items():
            step = runge_kutta(z[name], times[i : i + 2], scheme="heun", end="full" if i < len(times) - 2 else "clean")
            z[name] = solve(step, FiniteSet(x).velocity)
    film = run.stem.with_name(f"{run.stem.name}.gif")
    draw.animate(frames, film, list(sets))
    for name, x in sets.items():
        run.bound(f"distance of samples to the data, {name}", near(z[name], x), at_most=0.02)
    run.note(animation=str(film))
    return draw.scatters({name: (x, z[name]) for name, x in sets.items()}, columns=3)


@experiment("Breaking it: no time, few steps, another schedule than the trained one")
def break_it(run: Run) -> Figure:
    """How much do three common mistakes cost on a spiral?

    The sliced W2 of samples after each mistake, over that of the run without a mistake.
    """
    data = spiral(SAMPLES, run.generator)
    noise = torch.randn(SAMPLES, 2, generator=torch.Generator().manual_seed(run.seed + 1))
    recipe = Recipe(run.pick(3000, 1000), 512)
    make = lambda blind: MLP(2, 128, 5, time=TimeFeatures(blind=blind))  # noqa: E731
    made = mistakes(make, spiral, Sampling(noise), recipe, run.seed)
    w2 = {name: sliced_w2(x, data) for name, x in made.items()}
    for name in ("no time", "2 steps", "wrong schedule"):
        run.bound(f"SW2 of {name} over as trained", w2[name] / w2["as trained"], at_least=1.2)
    run.note(sliced_w2=w2)
    return draw.scatters({f"{name}: SW2 {w2[name]:.3f}": (data, x) for name, x in made.items()})
