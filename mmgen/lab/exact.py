"""Experiments without a network: `mmgen.flow` against exact fields, closed forms and exact moments."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmgen.flow.field import FiniteSet, GaussianMixture
from mmgen.flow.guide import classifier
from mmgen.flow.likelihood import Ode
from mmgen.flow.path import Path
from mmgen.flow.schedule import CosinePath, DDPMPath, LinearBetaPath, LinearPath, VEPath
from mmgen.flow.solvers import SOLVERS, Level, ancestral, build_solver, ddim, runge_kutta, solve
from mmgen.flow.time import uniform_grid
from mmgen.lab import draw
from mmgen.lab.core import Run, experiment
from mmgen.lab.data import MEANS, digits, near, sliced_w2, spiral
from mmgen.lab.moments import Moments, slopes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}


@experiment("Order of the ODE solvers on a mixture of three Gaussians", faults=["shifted_t"])
def solver_order(run: Run) -> Figure:
    """Does each Runge-Kutta solver converge with the order that its theory gives?

    The error at t = 1 against the number of steps N, with the exact solution by DOP853. The slope is the order.
    """
    from scipy.integrate import solve_ivp

    data = GaussianMixture(MEANS, 0.3)
    z = torch.randn(64, 2, dtype=torch.float64, generator=run.generator)

    def slope(t: float, y: NDArray[np.float64]) -> NDArray[np.float64]:
        v = data.velocity(torch.from_numpy(y).view(-1, 2), torch.tensor(t, dtype=torch.float64))
        return v.flatten().numpy()

    solution = solve_ivp(slope, (0, 1), z.flatten().numpy(), method="DOP853", rtol=1e-12, atol=1e-13)
    truth = torch.from_numpy(solution.y[:, -1]).view_as(z)
    counts = [20, 40, 80, 160, 320]
    errors: dict[str, list[float]] = {}
    for scheme, order in ORDERS.items():
        ends = [solve(runge_kutta(z, uniform_grid(n), scheme=scheme, end="full"), data.velocity) for n in counts]
        errors[scheme] = [float((end - truth).abs().mean()) for end in ends]
        for half, value in zip(("last but one", "last"), slopes(errors[scheme])[-2:], strict=True):
            run.bound(f"slope of {scheme}, {half} halving", value, at_least=order - 0.15, at_most=order + 0.15)
    run.note(steps=counts, errors=errors)
    curves = {f"{scheme}, slope {slopes(line)[-1]:.2f}": line for scheme, line in errors.items()}
    return draw.lines(counts, curves, "steps N", "mean error at t = 1", log="xy")


@experiment("Log-likelihood along the ODE, exact trace, RK4 with 100 steps", faults=["sign", "shifted_t"])
def gaussian_likelihood(run: Run) -> Figure:
    """Is the log-likelihood of the ODE equal to the closed form for Gaussian data N(0, 0.25)?"""
    data = GaussianMixture(torch.zeros(1, 1, dtype=torch.float64), 0.5)
    x = torch.linspace(-1.6, 1.6, 65, dtype=torch.float64).unsqueeze(1)
    ode = Ode(data.velocity, uniform_grid(100), "rk4")
    computed = ode.log_likelihood(x).value
    exact = -x.squeeze(1).square() / (2 * 0.25) - 0.5 * math.log(2 * math.pi * 0.25)
    error = float((computed - exact).abs().max())
    run.bound("largest error, nats", error, at_most=1e-6)
    run.note(at_0_8=float(ode.log_likelihood(x[:1] * 0 + 0.8).value))
    curves = {f"ODE, error at most {error:.1e}": computed.tolist(), "exact": exact.tolist()}
    return draw.lines(x.squeeze(1).tolist(), curves, "x", "log p(x), nats")


LEVELS: dict[str, str | Level] = {
    "w = 0": "ode",
    "w = sqrt(2(1-t))": lambda path, t: (2 * (1 - t)).sqrt(),
    "w = 2(1-t)": lambda path, t: 2 * (1 - t),
    "w = 1": "constant",
}


@experiment(
    "One family of SDEs, one set of marginals: moments propagated exactly", faults=["sign", "half", "shifted_t"]
)
def same_marginals(run: Run) -> Figure:
    """Does the SDE have the same mean and variance at t = 0.9 for every noise rate w(t)?

    Euler-Maruyama for four noise rates, data N(0.7, 0.25), linear path, t from 0 to 0.9.
    """
    exact, counts = Moments(LinearPath(), 0.7, 0.5), [200, 400, 800, 1600]
    errors: dict[str, list[float]] = {}
    for name, level in LEVELS.items():
        errors[name] = [exact.error("euler_maruyama", 0.9 * uniform_grid(n), level=level, end="full") for n in counts]
        run.bound(f"error at N = 1600, {name}", errors[name][-1], at_most=5e-3)
        run.bound(f"slope, {name}", slopes(errors[name])[-1], at_least=0.9, at_most=1.1)
    run.note(steps=counts, errors=errors)
    return draw.lines(counts, errors, "steps N", "error of mean or variance", log="xy")


@experiment("Ancestral sampling is DDIM with eta = 1 (cosine path, N(0, 0.25))", faults=["minus_s2", "shifted_t"])
def ancestral_is_ddim(run: Run) -> Figure:
    """Does DDIM with eta = 1 equal ancestral sampling?

    The variances at every step by exact propagation, and the states of both solvers from equal seeds.
    """
    path = CosinePath()
    steps = 100
    pairs: dict[str, dict[str, float]] = {"ancestral": {}, "ddim": {"eta": 1.0}}
    variances = {
        name: [Moments.of(z)[1] for z in Moments(path, 0.0, 0.5).states(name, uniform_grid(steps), **options)]
        for name, options in pairs.items()
    }
    # The last step is left out: both solvers end on the mean, but they use sigma(1) differently.
    gaps = [abs(a - b) / b for a, b in zip(variances["ancestral"][:-1], variances["ddim"][:-1], strict=True)]
    run.bound("largest relative difference of variance", max(gaps), at_most=1e-5)
    t = uniform_grid(steps)
    marginal = (path.alpha(t).square() * 0.25 + path.sigma(t).square()).tolist()
    errors = [Moments(path, 0.0, 0.5).error("ddim", uniform_grid(n), eta=1.0) for n in (200, 400, 800)]
    run.bound("order at which DDIM(1) approaches the data's variance", slopes(errors)[-1], at_least=0.9, at_most=1.1)
    data = GaussianMixture(MEANS, 0.3, path=path)
    z = torch.randn(64, 2, dtype=torch.float64, generator=run.generator)
    seen: list[list[Tensor]] = []
    for solver in (ancestral(z, t, path=path), ddim(z, t, path=path, eta=1.0)):
        torch.manual_seed(run.seed)
        states: list[Tensor] = []

        def recorded(z: Tensor, t: Tensor, states: list[Tensor] = states) -> Tensor:
            states.append(z)
            return data.denoised(z, t)

        solve(solver, recorded)
        seen.append(states)
    worst = max(float((a - b).abs().max()) for a, b in zip(*seen, strict=True))
    run.bound("largest difference of states from equal seeds", worst, at_most=1e-10)
    return draw.lines(t.tolist(), {**variances, "path": marginal}, "t", "variance of z")


@experiment("Classifier guidance on a one-dimensional mixture, exact scores", faults=["sign", "half", "shifted_t"])
def guidance(run: Run) -> Figure:
    """Does more guidance move more of the samples to the class y?

    E p(y | x) of the samples against the weight w of grad log p(y | z). The initial noise consists of the quantiles
    of the normal distribution, so that nothing is random.
    """
    data = GaussianMixture(torch.tensor([[1.0], [-1.0]], dtype=torch.float64), 0.6)

    def log_likelihood(z: Tensor, t: Tensor) -> Tensor:
        return torch.log_softmax(data.log_joint(z, t), 1)[:, 0]

    quantiles = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    z = torch.special.ndtri(quantiles).unsqueeze(1)
    expected = {0.0: 0.50, 0.5: 0.74, 1.0: 0.93, 2.0: 0.997}
    one = torch.ones((), dtype=torch.float64)
    measured, samples = [], {}
    for weight in expected:
        field = classifier(data.path, data.velocity, log_likelihood, weight)
        times = 1e-3 + (1 - 1e-3) * uniform_grid(200)
        x = solve(runge_kutta(z, times), field)
        measured.append(float(data.responsibilities(x, one)[:, 0].mean()))
        samples[f"w = {weight:g}: E p(y | x) = {measured[-1]:.3f}"] = x
    run.bound(
        "smallest rise of E p(y | x) from one weight to the next",
        min(b - a for a, b in pairwise(measured)),
        at_least=1e-3,
    )
    for (weight, known), value in zip(expected.items(), measured, strict=True):
        run.bound(f"E p(y | x) at w = {weight:g}", value, at_least=known - 0.01, at_most=known + 0.01)
    return draw.histograms({name: x.squeeze(1) for name, x in samples.items()}, "x")


@experiment("The exact field solves the continuity and Fokker-Planck equations", faults=["sign", "half", "shifted_t"])
def fokker_planck(run: Run) -> Figure:
    """Do the exact density and velocity satisfy the continuity and Fokker-Planck equations?

    The residuals of dp/dt = -div(v p), and with noise rate w of dp/dt = -div((v + w^2 s / 2) p) + w^2 / 2 lap p.
    """
    times = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    names = {"linear": LinearPath(), "cosine": CosinePath()}
    curves: dict[str, list[float]] = {}
    for name, path in names.items():
        data = GaussianMixture(MEANS, 0.3, path=path)
        z = torch.randn(50, 2, dtype=torch.float64, generator=run.generator)
        for equation, w in (("continuity", 0.0), ("Fokker-Planck", 1.0)):
            residuals = [_residual(data, z, float(t), w) for t in times]
            curves[f"{equation}, {name}"] = residuals
            run.bound(f"largest relative residual, {equation}, {name}", max(residuals), at_most=1e-8)
    return draw.lines(times.tolist(), curves, "t", "relative residual", log="y")


def _residual(data: GaussianMixture, z: Tensor, t: float, w: float) -> float:
    """The largest |dp/dt + div(drift p) - w^2 / 2 lap p| over its largest term, with the score from the velocity."""
    leaf = z.clone().requires_grad_()
    time = torch.full((len(z), 1), t, dtype=z.dtype, requires_grad=True)
    density = data.log_prob(leaf, time).exp()
    (rate,) = torch.autograd.grad(density.sum(), time, create_graph=True)
    velocity = data.velocity(leaf, time)
    drift = velocity
    if w:
        drift = velocity + w**2 / 2 * data.path.convert("v", "score", velocity, leaf, time.detach(), 0.0)
    flow = sum(
        torch.autograd.grad((drift[:, i] * density).sum(), leaf, create_graph=True)[0][:, i] for i in range(z.shape[1])
    )
    (gradient,) = torch.autograd.grad(density.sum(), leaf, create_graph=True)
    bend = sum(torch.autograd.grad(gradient[:, i].sum(), leaf, retain_graph=True)[0][:, i] for i in range(z.shape[1]))
    terms = torch.stack([rate.squeeze(1), torch.as_tensor(flow), -(w**2) / 2 * torch.as_tensor(bend)])
    terms = terms.detach()
    return float(terms.sum(0).abs().max() / terms.abs().max())


@experiment("The exact velocity of a finite set grows as 1 / (1 - t) off its own path, and not on it")
def velocity_growth(run: Run) -> Figure:
    """Where does the exact velocity of a finite set grow as 1 / (1 - t), and where does it stay bounded?

    The RMS of v* on a fixed box of side 4, and on z drawn from p_t. The velocity of Gaussian data N(0, s^2) is
    (t s^2 - (1 - t)) / (t^2 s^2 + (1 - t)^2) z, which is zero at t = 1 / (1 + s^2). At this time only the part of the
    data that is not Gaussian moves z, so the RMS on the path is smallest.
    """
    g = run.generator
    points = spiral(2000, g).double()
    data = FiniteSet(points)
    box = (torch.rand(2000, 2, dtype=torch.float64, generator=g) - 0.5) * 4
    x, eps = data.sample(2000, g), torch.randn(2000, 2, dtype=torch.float64, generator=g)
    times = [*(i / 10 for i in range(10)), 0.95, 0.98, 0.99, 0.995]
    rms: dict[str, list[float]] = {"on a fixed box": [], "on z from p_t": []}
    for time in times:
        t = torch.tensor(time, dtype=torch.float64)
        for name, z in (("on a fixed box", box), ("on z from p_t", data.path.mix(x, eps, t))):
            rms[name].append(float(data.velocity(z, t).square().mean().sqrt()))
    scaled = [value * (1 - time) for value, time in zip(rms["on a fixed box"], times, strict=True)][-4:]
    run.bound("spread of (1 - t) RMS on the box, t from 0.95", max(scaled) / min(scaled), at_most=1.1)
    on_path = rms["on z from p_t"]
    run.bound("largest RMS on the path", max(on_path), at_most=1.5)
    gaussian = float(1 / (1 + points.var(0).mean()))
    slowest = times[on_path.index(min(on_path))]
    run.bound(
        "time of the smallest RMS on the path, minus 1 / (1 + s^2)", slowest - gaussian, at_least=-0.1, at_most=0.1
    )
    run.note(**{"smallest RMS on the path": min(on_path)}, coefficient=scaled[-1], times=times, rms=rms)
    return draw.lines([1 - t for t in times], rms, "1 - t", "RMS of v*", log="xy")


@experiment("Quality against steps: DDPM's ancestral sampling, DDIM and the ODE solvers, exact field")
def ddpm_ddim_steps(run: Run) -> Figure:
    """How many steps do DDPM, DDIM and the ODE solvers need with an exact field?

    The sliced W2 distance of samples to the data, a mixture, on DDPM's table of 1,000 steps.
    """
    path, count = DDPMPath(), run.pick(8000, 4000)
    data = GaussianMixture(MEANS.float(), 0.3, path=path)
    truth = data.sample(count, run.generator)
    z = torch.randn(count, 2, generator=run.generator)
    counts = [2, 5, 10, 20, 50, 100, 200]
    curves: dict[str, list[float]] = {}
    for name in ("ancestral", "ddim", "dpmpp_2m", "heun"):
        field = data.velocity if SOLVERS[name].asks == "v" else data.denoised
        curves[name] = [sliced_w2(solve(build_solver(name, z, uniform_grid(n), path), field), truth) for n in counts]
    floor = sliced_w2(data.sample(count, torch.Generator().manual_seed(run.seed + 1)), truth)
    few = [curves["ddim"][i] / curves["ancestral"][i] for i in range(1, 4)]
    run.bound("largest ratio of DDIM to DDPM, 5 to 20 steps", max(few), at_most=1.0)
    run.bound("DDPM at 200 steps over the floor", curves["ancestral"][-1] / floor, at_most=4.0)
    run.note(steps=counts, sliced_w2=curves, floor=floor)
    return draw.lines(counts, {**curves, "two sets of data": [floor] * len(counts)}, "steps", "sliced W2", log="xy")


@experiment("The exact field of a training set memorises it")
def memorisation(run: Run) -> Figure:
    """Does the exact field of a training set generate anything but its training samples?

    The distance of samples of the exact field of 600 digits to the nearest of them, over that of 600 unseen digits.
    """
    x, _ = digits()
    order = torch.randperm(len(x), generator=run.generator)
    train, other = x[order[:600]], x[order[600:1200]]
    noise = torch.randn(run.pick(400, 200), 64, generator=run.generator)
    made = solve(runge_kutta(noise, uniform_grid(100), scheme="euler"), FiniteSet(train).velocity)
    ratio = near(made, train) / near(other, train)
    run.bound("distance of samples to the training set, over that of unseen digits", ratio, at_most=0.02)
    run.note(distinct=len(torch.cdist(made, train).argmin(1).unique()), samples=len(made))
    pictures = torch.cat([made[:8], train[torch.cdist(made[:8], train).argmin(1)]])
    return draw.images(pictures.view(2, 8, 8, 8), ["samples", "nearest in the set"])


@experiment("Coarse to fine: the band power of a noisy digit against t")
def band_power(run: Run) -> Figure:
    """At which t does each spatial frequency of a noisy digit rise above the noise?

    The share of the signal in the power of each ring of frequencies, on the linear path: high frequencies appear last.
    The mean of an image is left out, because these images differ little in it.
    """
    x, _ = digits()
    images = x.view(-1, 8, 8) - x.mean()
    power = torch.fft.fft2(images).abs().square().mean(0) / 64
    frequency = torch.fft.fftfreq(8) * 8
    ring = (frequency[:, None].square() + frequency[None].square()).sqrt().round().long()
    bands = torch.stack([power[ring == r].mean() for r in range(5)])
    times = torch.linspace(0.02, 0.98, 49)
    shares = {
        f"{r} cycles": ((times**2 * bands[r]) / (times**2 * bands[r] + (1 - times) ** 2)).tolist() for r in range(1, 5)
    }
    crossing = [float(1 / (1 + bands[r].sqrt())) for r in range(1, 5)]
    run.bound(
        "smallest step of the time at which signal passes noise, ring by ring",
        min(b - a for a, b in pairwise(crossing)),
        at_least=0.0,
    )
    run.note(crossing=crossing, power=bands.tolist())
    return draw.lines(times.tolist(), shares, "t", "signal / (signal + noise)")


@experiment("Paths side by side: equal log-SNR means equal up to a factor", faults=["sign", "half", "shifted_t"])
def paths(run: Run) -> Figure:
    """Are points of different paths with equal log-SNR equal up to a factor?

    The inverse of log-SNR on every path, and the exact estimates and scores of one mixture at equal log-SNR.
    """
    shown: dict[str, Path] = {
        "linear": LinearPath(), "cosine": CosinePath(), "vp": LinearBetaPath(), "ddpm": DDPMPath(), "ve": VEPath(),
    }  # fmt: skip
    t = torch.linspace(0.001, 0.999, 200, dtype=torch.float64)
    worst = max(float((path.time_of(path.log_snr(t)) - t).abs().max()) for path in shown.values())
    run.bound("largest error of the inverse of log-SNR", worst, at_most=1e-6)
    z = torch.randn(50, 2, dtype=torch.float64, generator=run.generator)
    estimates, errors = [], []
    for path in shown.values():
        data = GaussianMixture(MEANS, 0.3, path=path)
        at = path.time_of(torch.linspace(-4, 4, 9, dtype=torch.float64))
        estimates.append(torch.stack([data.denoised(path.alpha(u) * z, u) for u in at]))
        for u in at:
            leaf = z.clone().requires_grad_()
            (slope,) = torch.autograd.grad(data.log_prob(leaf, u).sum(), leaf)
            errors.append(float((data.score(z, u) - slope).abs().max() / slope.abs().max()))
    run.bound("largest error of the score against the slope of log p", max(errors), at_most=1e-10)
    difference = max(float((estimate - estimates[0]).abs().max()) for estimate in estimates)
    run.bound("largest difference of E[x | z] at equal log-SNR", difference, at_most=1e-6)
    return draw.lines(t.tolist(), {name: path.log_snr(t).tolist() for name, path in shown.items()}, "t", "log-SNR")
