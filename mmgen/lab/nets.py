"""The small networks and the training loop of the lab."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mmgen.flow.field import Field
from mmgen.flow.loss import FlowLoss
from mmgen.flow.path import Path
from mmgen.flow.schedule import CosinePath, LinearPath
from mmgen.flow.solvers import build_solver, runge_kutta, solve
from mmgen.flow.time import TIMES, uniform_grid

Draw = Callable[[int], Tensor]
"""A function of n that returns n samples, [n, D]."""


class TimeFeatures(nn.Module):
    """Sine and cosine features of t, [R, 1] to [R, features].

    The highest frequency has `fastest` periods from t = 0 to 1, the lowest 1/64 of that. With `blind` the features are
    constant, so that the network does not receive t.
    """

    def __init__(self, features: int = 32, blind: bool = False, fastest: float = 16.0) -> None:
        super().__init__()
        self.rates = 2 * math.pi * fastest * 2.0 ** torch.linspace(-6, 0, features // 2)
        self.blind = blind

    def forward(self, t: Tensor) -> Tensor:
        angle = (t * 0 if self.blind else t) * self.rates
        return torch.cat([angle.sin(), angle.cos()], 1)


class MLP(nn.Module):
    """An MLP over z and features of t; `bottleneck` is the width of an optional linear layer before the first layer."""

    def __init__(
        self,
        dimension: int,
        width: int = 256,
        depth: int = 5,
        bottleneck: int | None = None,
        time: TimeFeatures | None = None,
    ) -> None:
        super().__init__()
        self.time = time or TimeFeatures()
        enter: list[nn.Module] = [nn.Linear(dimension, width)]
        if bottleneck is not None:
            enter = [nn.Linear(dimension, bottleneck, bias=False), nn.Linear(bottleneck, width)]
        self.enter = nn.Sequential(*enter)
        self.by_time = nn.Linear(32, width)
        hidden = [layer for _ in range(depth - 1) for layer in (nn.Linear(width, width), nn.ReLU())]
        self.rest = nn.Sequential(nn.ReLU(), *hidden, nn.Linear(width, dimension))

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        t = t.reshape(-1, 1).expand(len(z), 1)
        out: Tensor = self.rest(self.enter(z) + self.by_time(self.time(t)))
        return out


class UNet(nn.Module):
    """A small U-Net for 8x8 grey images, [R, 64]."""

    def __init__(self, width: int = 32, blind: bool = False) -> None:
        super().__init__()
        self.time = TimeFeatures(blind=blind)
        self.enter = nn.Conv2d(1, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.up = nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1)
        self.join = nn.Conv2d(2 * width, width, 3, padding=1)
        self.leave = nn.Conv2d(width, 1, 3, padding=1)
        self.by_time = nn.Linear(32, 2 * width)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        t = t.reshape(-1, 1).expand(len(z), 1)
        high = torch.nn.functional.silu(self.enter(z.view(-1, 1, 8, 8)))
        low = torch.nn.functional.silu(self.down(high) + self.by_time(self.time(t))[:, :, None, None])
        low = torch.nn.functional.silu(low + self.middle(low))
        high = torch.cat([high, torch.nn.functional.silu(self.up(low))], 1)
        out: Tensor = self.leave(torch.nn.functional.silu(self.join(high)))
        return out.flatten(1)


class Preconditioned(nn.Module):
    """A preconditioned network that estimates x, as in EDM but on any path.

    x = c_skip z + c_out F(c_in z, t) with the inner network F, total^2 = alpha^2 s^2 + sigma^2,
    c_skip = alpha s^2 / total^2, c_out = sigma s / total and c_in = 1 / total; s is the standard deviation of the data
    (Karras et al. 2022, EDM, section 5).
    """

    def __init__(self, inner: nn.Module, path: Path, std: float) -> None:
        super().__init__()
        self.inner, self.path, self.std = inner, path, std

    def out_scale(self, t: Tensor) -> Tensor:
        """Return c_out at t."""
        total = ((self.path.alpha(t) * self.std).square() + self.path.sigma(t).square()).sqrt()
        return self.path.sigma(t) * self.std / total

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        t = t.reshape(-1, 1)
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        total = (alpha * self.std).square() + sigma.square()
        out: Tensor = alpha * self.std**2 / total * z + self.out_scale(t) * self.inner(z / total.sqrt(), t)
        return out


@dataclass(frozen=True)
class Recipe:
    """Settings of the training of a field."""

    steps: int
    batch: int = 512
    lr: float = 1e-3
    prediction: str = "v"
    loss_space: str = "v"
    distribution: str = "logit_normal"
    """The timestep distribution, a name of `mmgen.flow.TIMES`."""
    mu: float = 0.0
    sigma: float = 1.0
    clip: float = 0.05
    path: Path = field(default_factory=LinearPath)
    noise: Draw | None = None
    """The source distribution; standard normal by default."""
    pair: Callable[[Tensor, Tensor], Tensor] | None = None
    """(x, eps) to eps reordered, so that each x is paired with the eps of the same index; unchanged by default."""


def fit(parameters: Iterable[nn.Parameter], steps: int, lr: float, loss_of: Callable[[], Tensor]) -> None:
    """Train with Adam and a cosine schedule; `loss_of` draws a new batch and returns its loss."""
    optimizer = torch.optim.Adam(parameters, lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of().backward()
        optimizer.step()
        schedule.step()


def train_field(net: nn.Module, data: Draw, recipe: Recipe) -> Field:
    """Train `net` and return its field; a `Preconditioned` net predicts x, any other net `recipe.prediction`."""
    path = recipe.path
    loss = FlowLoss(path, recipe.prediction, recipe.loss_space, recipe.clip)

    def loss_of() -> Tensor:
        x = data(recipe.batch)
        eps = torch.randn_like(x) if recipe.noise is None else recipe.noise(recipe.batch)
        eps = eps if recipe.pair is None else recipe.pair(x, eps)
        t = TIMES[recipe.distribution](torch.rand(recipe.batch), recipe.mu, recipe.sigma)
        output = net(path.mix(x, eps, t.unsqueeze(1)), t.unsqueeze(1))
        if isinstance(net, Preconditioned):  # this weight makes the loss an unweighted regression of the inner network
            scale = net.out_scale(t.unsqueeze(1)).clamp(min=1e-3)
            plain: Tensor = ((output - x) / scale).square().mean()
            return plain
        return loss(output, x, eps, t).mean()

    fit(net.parameters(), recipe.steps, recipe.lr, loss_of)
    net.requires_grad_(False)
    return Field(path, net, "x" if isinstance(net, Preconditioned) else recipe.prediction)


@torch.no_grad()
def sample_field(trained: Field, noise: Tensor, steps: int = 50, scheme: str = "heun") -> Tensor:
    """Solve the ODE from `noise`, [R, D]; the clip of conversions is one step, 1 / steps."""
    clipped = Field(trained.path, trained.network, trained.prediction, clip=1 / steps)
    solver = runge_kutta(noise, uniform_grid(steps), scheme=scheme, path=trained.path)
    return solve(solver, clipped("v"))


@dataclass(frozen=True)
class Sampling:
    """The initial noise of the samples, [R, D], and the number of solver steps."""

    noise: Tensor
    steps: int = 50


def mistakes(
    make: Callable[[bool], nn.Module], data: Draw, sampling: Sampling, recipe: Recipe, seed: int
) -> dict[str, Tensor]:
    """Return samples as trained and after each of three mistakes; `make(blind)` builds a network with or without t.

    The mistakes: a network that does not receive t, a solver with 2 steps, and a wrong schedule. For the wrong schedule
    a solver moves on the cosine path but evaluates a denoiser of the linear path. A solver that requests the velocity
    could not make this mistake, because it solves dz/dt = v on any path.
    """
    noise, steps = sampling.noise, sampling.steps
    trained = []
    for blind in (False, True):
        torch.manual_seed(seed)
        trained.append(train_field(make(blind), data, recipe))
    right, timeless = trained
    mistaken = build_solver("ddim", noise, uniform_grid(steps), CosinePath())
    return {
        "as trained": sample_field(right, noise, steps),
        "no time": sample_field(timeless, noise, steps),
        "2 steps": sample_field(right, noise, 2, "euler"),
        "wrong schedule": solve(mistaken, right("x")),
    }
