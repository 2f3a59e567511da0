"""Adaptive step sizes for the ODE, through torchdiffeq."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmgen.flow.path import check_times

ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
"""Methods of torchdiffeq that choose their own step sizes."""


def solve_adaptive(
    field: Callable[[Tensor, Tensor], Tensor],
    z: Tensor,
    span: tuple[float, float] = (0.0, 1.0),
    *,
    rtol: float = 1e-5,
    atol: float = 1e-6,
    method: str = "dopri5",
) -> Tensor:
    """Integrate dz/dt = field(z, t) over `span` with adaptive step sizes, through torchdiffeq.

    Unlike the solvers in `mmgen.flow.solvers` this is a plain function, not a generator: torchdiffeq calls the field
    itself, and it synchronises with the device to choose each step size.

    Args:
        field: (z, t) to dz/dt of the shape of z; t is a scalar tensor.
        z: the state at `span[0]`, any shape.
        span: first and last time, each in [0, 1]; it may run in either direction.
        rtol: relative tolerance of a step.
        atol: absolute tolerance of a step, in units of z.
        method: one of `ADAPTIVE`.

    Returns:
        The state at `span[1]`, of the shape and type of z.

    Raises:
        ValueError: a method without adaptive steps, a tolerance that is not positive, an empty span, or a time outside
            [0, 1].
        ImportError: torchdiffeq is not installed (extra `ode`).
    """
    if method not in ADAPTIVE:
        raise ValueError(
            f"method '{method}' has no adaptive steps: choose one of {', '.join(ADAPTIVE)}, or use `runge_kutta` for "
            "fixed steps"
        )
    if not (rtol > 0 and atol > 0) or span[0] == span[1]:
        raise ValueError(
            f"adaptive steps need positive tolerances and a span of two different times, got rtol {rtol}, atol {atol} "
            f"and span {span}"
        )
    try:
        from torchdiffeq import odeint
    except ImportError:
        raise ImportError("adaptive steps need torchdiffeq (extra `ode`): pip install torchdiffeq") from None
    check_times(torch.tensor(span))
    times = torch.tensor(span, dtype=z.dtype, device=z.device)
    # Without `step_t` the last step may pass the end of the span, where the field may be undefined.
    options = {"step_t": times[1:]}
    end: Tensor = odeint(lambda t, y: field(y, t), z, times, rtol=rtol, atol=atol, method=method, options=options)[-1]
    return end
