"""The ODE between noise and data: encoding, decoding, interpolation and log-likelihood."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mmgen.flow.field import Function
from mmgen.flow.path import Path, check_shapes
from mmgen.flow.solvers import runge_kutta, solve


def slerp(a: Tensor, b: Tensor, share: float | Tensor) -> Tensor:
    """Interpolate spherically between two batches of noise, which preserves the norm (Shoemake 1985).

    Args:
        a: [R, ...].
        b: of the same shape.
        share: 0 gives `a`, 1 gives `b`; a number, or a tensor with as many axes as `a`.

    Returns:
        [R, ...]. Where `a` and `b` are parallel, the interpolation is linear.

    Raises:
        ValueError: shapes that do not fit.
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
    """The log-likelihood of each sample, in nats; the tensors carry no gradients."""

    value: Tensor
    """log p(x), [R]."""
    standard_error: Tensor
    """Standard error of Hutchinson's estimate over its probes, [R]; zero with the exact trace."""
    z: Tensor
    """The encoded x: the noise from which the ODE generates it, [R, D]."""


@dataclass(frozen=True)
class Ode:
    """The probability-flow ODE dz/dt = v(z, t) with a solver; it maps noise to data and back.

    Raises:
        ValueError: times that do not rise.
    """

    velocity: Function
    """(z, t) to v, of the shape of z."""
    times: Tensor
    """[N + 1], from noise to data, as for sampling; `encode` uses them in reverse."""
    scheme: str = "rk4"
    """A Runge-Kutta scheme: `euler`, `midpoint`, `heun` or `rk4`."""
    path: Path | None = None
    """The path of the velocity; times at which its velocity diverges are refused. `LinearPath()` by default."""

    def __post_init__(self) -> None:
        if bool((self.times.diff(dim=0) < 0).any()):
            raise ValueError(
                "times must rise from noise (0) to data (1), also for encoding, which reverses them itself"
            )

    def _solve(self, velocity: Function, z: Tensor, times: Tensor) -> Tensor:
        return solve(runge_kutta(z, times, scheme=self.scheme, path=self.path, end="full"), velocity)

    def encode(self, x: Tensor) -> Tensor:
        """Map data x [R, ...] to the noise from which the ODE generates it."""
        return self._solve(self.velocity, x, self.times.flip(0))

    def decode(self, z: Tensor) -> Tensor:
        """Map noise z [R, ...] to data: the inverse of `encode` up to the error of the scheme."""
        return self._solve(self.velocity, z, self.times)

    def interpolate(self, a: Tensor, b: Tensor, shares: Tensor) -> Tensor:
        """Interpolate between data `a` and `b` in noise space: encode both, `slerp`, decode.

        Args:
            a: [R, ...].
            b: of the same shape.
            shares: [M]; 0 gives `a`, 1 gives `b`.

        Returns:
            [M, R, ...].

        Raises:
            ValueError: no shares.
        """
        if not len(shares):
            raise ValueError("shares is empty: give one or more numbers between 0 (the first) and 1 (the second)")
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
        """Compute log p_1(x) = log N(z_0; 0, noise_std^2 I) - integral of div v over t from 0 to 1.

        z_0 is the encoded x (Chen et al. 2018, eq. 8). If the velocity diverges at t = 1, the times must end before 1;
        the result is then the density of z at the last time.

        Args:
            x: [R, D]; flatten each sample.
            trace: `exact` differentiates every coordinate, with D backward passes per evaluation. `hutchinson` averages
                n^T (dv/dz) n over vectors n of random signs, fixed along the path (Grathwohl et al. 2019), and
                estimates its error.
            probes: number of vectors n, two or more.
            noise_std: standard deviation of z at t = 0, for paths that do not begin with a standard normal.
            generator: draws the vectors n.

        Raises:
            ValueError: an unknown trace, fewer than two probes, x that is not [R, D], times that do not begin at 0,
                `noise_std` that is not positive, or a velocity that autograd cannot differentiate.
        """
        if bool((self.times[0] != 0).any()):
            raise ValueError("the times of a likelihood must begin at 0, where z is noise with a known density")
        if not noise_std > 0:
            raise ValueError(f"noise_std must be positive, got {noise_std}")
        if trace not in ("exact", "hutchinson"):
            raise ValueError(f"unknown trace '{trace}' (one of: exact, hutchinson)")
        if x.ndim != 2:
            raise ValueError(f"x must be [R, D], got {tuple(x.shape)}: flatten each sample")
        count, dimension = x.shape
        if trace == "hutchinson" and (probes < 2 or probes != int(probes)):
            raise ValueError(f"hutchinson needs two probes or more to estimate its error, got {probes}")
        with torch.inference_mode(False):  # autograd refuses tensors that are created in inference mode
            if trace == "exact":
                vectors = torch.eye(dimension).to(x).unsqueeze(1).expand(-1, count, -1)
            else:
                vectors = torch.randint(0, 2, (probes, count, dimension), generator=generator).to(x) * 2 - 1

        def augmented(state: Tensor, t: Tensor) -> Tensor:
            """Return d/dt of z and of one divergence per vector, [R, D + number of vectors]."""
            with torch.inference_mode(False), torch.enable_grad():
                z = state[:, :dimension].detach().clone().requires_grad_()
                v = self.velocity(z, t.clone())
                if not v.requires_grad:
                    raise ValueError(
                        "autograd finds no dependence of the velocity on z, so there is no divergence: remove "
                        "torch.no_grad or detach from it (if it is constant on purpose, add 0 * z)"
                    )
                products = []
                for vector in vectors:
                    (product,) = torch.autograd.grad(v, z, vector, retain_graph=True, allow_unused=True)
                    products.append(torch.zeros(count).to(x) if product is None else (product * vector).sum(1))
            return torch.cat([v.detach(), torch.stack(products, 1)], 1)

        start = torch.cat([x.detach(), x.new_zeros(count, len(vectors))], 1)
        end = self._solve(augmented, start, self.times.flip(0))
        z, minus_integrals = end[:, :dimension], end[:, dimension:]
        base = -(z / noise_std).square().sum(1) / 2 - dimension * math.log(noise_std * math.sqrt(2 * math.pi))
        if trace == "exact":
            return LogLikelihood(base + minus_integrals.sum(1), torch.zeros_like(base), z)
        error = minus_integrals.std(1) / math.sqrt(len(vectors))
        return LogLikelihood(base + minus_integrals.mean(1), error, z)


def bits_per_dim(log_prob: Tensor, dimension: int, bin_width: float = 2 / 255) -> Tensor:
    """Convert log-likelihoods in nats to bits per dimension.

    The density must be that of dequantised data: data with uniform noise of one bin width added.

    Args:
        log_prob: log p(x) in nats, any shape.
        dimension: D, the numbers per sample.
        bin_width: distance of neighbouring values of the quantised data; 2 / 255 for 8-bit pixels scaled to [-1, 1].

    Returns:
        Bits per dimension, of the shape of `log_prob`.

    Raises:
        ValueError: a dimension or bin width that is not positive.
    """
    if dimension < 1 or not bin_width > 0:
        raise ValueError(f"dimension and bin_width must be positive, got {dimension} and {bin_width}")
    return -(log_prob / dimension + math.log(bin_width)) / math.log(2)
