"""Along the ODE between noise and data: encode, decode, interpolate, and the log-likelihood it defines."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mmgen.flow.field import Function
from mmgen.flow.path import Path, check_shapes
from mmgen.flow.solvers import runge_kutta, solve


def slerp(a: Tensor, b: Tensor, share: float | Tensor) -> Tensor:
    """Spherical interpolation between rows of noise, which keeps their norm (Shoemake 1985).

    `share` is a number, or has as many axes as `a`.
    """
    check_shapes(torch.as_tensor(share), a, b)
    flat_a, flat_b = a.flatten(1), b.flatten(1)
    cosine = torch.nn.functional.cosine_similarity(flat_a, flat_b, dim=1).clamp(-1, 1)
    angle = cosine.acos().view(-1, *[1] * (a.ndim - 1))
    sine = angle.sin()
    straight = torch.lerp(a, b, torch.as_tensor(share, dtype=a.dtype))
    turned = (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / sine.clamp(min=1e-12)
    return torch.where(sine < 1e-6, straight, turned)


@dataclass(frozen=True)
class LogLikelihood:
    """log p(x) of each row at the last time, nats; carries no gradients."""

    value: Tensor
    standard_error: Tensor
    """Of Hutchinson's estimate, over its probes; zero with the exact trace."""
    z: Tensor
    """The noise that x was encoded to."""


@dataclass(frozen=True)
class Ode:
    """dz/dt = velocity between noise and data, and how it is solved.

    Raises:
        ValueError: times that do not rise.
    """

    velocity: Function
    times: Tensor
    """From noise to data, as for sampling; `encode` runs them backwards."""
    scheme: str = "rk4"
    path: Path | None = None
    """Times at which its velocity diverges are refused; the linear path where absent."""

    def __post_init__(self) -> None:
        if bool((self.times.diff(dim=0) < 0).any()):
            raise ValueError(
                "times must rise from noise (0) to data (1) for encoding too: it runs them backwards itself"
            )

    def _solve(self, velocity: Function, z: Tensor, times: Tensor) -> Tensor:
        return solve(runge_kutta(z, times, scheme=self.scheme, path=self.path, end="full"), velocity)

    def encode(self, x: Tensor) -> Tensor:
        """Data to the noise that the ODE turns into it."""
        return self._solve(self.velocity, x, self.times.flip(0))

    def decode(self, z: Tensor) -> Tensor:
        """Noise to data: the inverse of `encode` up to the scheme's error."""
        return self._solve(self.velocity, z, self.times)

    def interpolate(self, a: Tensor, b: Tensor, shares: Tensor) -> Tensor:
        """Data between rows of `a` and `b`, [len(shares), R, ...]: encode both, slerp, decode."""
        if not len(shares):
            raise ValueError("give one share or more between 0 (the first) and 1 (the second)")
        ends = self.encode(torch.cat([a, b])).chunk(2)
        between = torch.cat([slerp(ends[0], ends[1], float(share)) for share in shares])
        return self.decode(between).view(len(shares), *a.shape)

    def log_likelihood(
        self,
        x: Tensor,
        *,
        trace: str = "exact",
        probes: int = 16,
        noise_std: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> LogLikelihood:
        """log p_1(x) = log N(z_0; 0, noise_std^2) - integral of div v from t = 0 to 1 (Chen et al. 2018, eq. 8).

        z_0 is found by running the ODE back from x, which is [R, D]. Times that end before 1, as on a path whose
        velocity diverges there, give the density of z at their last one.

        Args:
            trace: `exact` differentiates every coordinate (D backward passes); `hutchinson` averages n^T (dv/dz) n
                over `probes` vectors of random signs, fixed along the path (Grathwohl et al. 2019), and estimates
                its error.
            noise_std: standard deviation of z at t = 0, for paths that do not end in a standard normal.

        Raises:
            ValueError: an unknown trace, fewer than two probes, x that is not [R, D], times that do not begin at 0,
                or a velocity that autograd cannot differentiate.
        """
        if bool((self.times[0] != 0).any()):
            raise ValueError("the times of a likelihood begin at 0, where z is the noise whose density is known")
        if not noise_std > 0:
            raise ValueError(f"noise_std must be positive, got {noise_std}")
        if trace not in ("exact", "hutchinson"):
            raise ValueError(f"unknown trace '{trace}' (one of: exact, hutchinson)")
        if x.ndim != 2:
            raise ValueError(f"x must be [R, D], got {tuple(x.shape)}: flatten each sample")
        rows, dimension = x.shape
        if trace == "hutchinson" and (probes < 2 or probes != int(probes)):
            raise ValueError(f"hutchinson needs two probes or more to know its error, got {probes}")
        with torch.inference_mode(False):  # autograd takes no tensor that was made in inference mode
            if trace == "exact":
                vectors = torch.eye(dimension).to(x).unsqueeze(1).expand(-1, rows, -1)
            else:
                vectors = torch.randint(0, 2, (probes, rows, dimension), generator=generator).to(x) * 2 - 1

        def augmented(state: Tensor, t: Tensor) -> Tensor:
            """d/dt of (z, one divergence per vector): [R, D + V]."""
            with torch.inference_mode(False), torch.enable_grad():
                z = state[:, :dimension].detach().clone().requires_grad_()
                v = self.velocity(z, t.clone())
                if not v.requires_grad:
                    raise ValueError(
                        "the velocity does not depend on z for autograd, so it has no divergence: take torch.no_grad "
                        "or detach out of it (a field that is constant on purpose: add 0 * z)"
                    )
                products = []
                for vector in vectors:
                    (row,) = torch.autograd.grad(v, z, vector, retain_graph=True, allow_unused=True)
                    products.append(torch.zeros(rows).to(x) if row is None else (row * vector).sum(1))
            return torch.cat([v.detach(), torch.stack(products, 1)], 1)

        start = torch.cat([x.detach(), x.new_zeros(rows, len(vectors))], 1)
        end = self._solve(augmented, start, self.times.flip(0))
        z, minus_integrals = end[:, :dimension], end[:, dimension:]
        base = -(z / noise_std).square().sum(1) / 2 - dimension * math.log(noise_std * math.sqrt(2 * math.pi))
        if trace == "exact":
            return LogLikelihood(base + minus_integrals.sum(1), torch.zeros_like(base), z)
        error = minus_integrals.std(1) / math.sqrt(len(vectors))
        return LogLikelihood(base + minus_integrals.mean(1), error, z)


def bits_per_dim(log_prob: Tensor, dimension: int, bin_width: float = 2 / 255) -> Tensor:
    """Bits per dimension of data with bins of `bin_width` (8-bit pixels scaled to [-1, 1] have 2 / 255).

    The density must be that of dequantised data: uniform noise of one bin added.
    """
    if dimension < 1 or not bin_width > 0:
        raise ValueError(f"dimension and bin_width must be positive, got {dimension} and {bin_width}")
    return -(log_prob / dimension + math.log(bin_width)) / math.log(2)
