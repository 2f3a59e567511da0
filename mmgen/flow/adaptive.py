"""The ODE with steps that adapt to the field, by torchdiffeq."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmgen.flow.path import check_times

ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
"""Methods of torchdiffeq that choose their steps."""


def solve_adaptive(
    field: Callable[[Tensor, Tensor], Tensor],
    z: Tensor,
    span: tuple[float, float] = (0.0, 1.0),
    *,
    rtol: float = 1e-5,
    atol: float = 1e-6,
    method: str = "dopri5",
) -> Tensor:
    """dz/dt = field(z, t) over `span` with adaptive steps, by torchdiffeq (extra `ode`).

    A driver and no generator: torchdiffeq calls the field itself, and its step sizes wait for the device.

    Raises:
        ValueError: a method without adaptive steps, a tolerance that is not positive, or an empty span.
    """
    if method not in ADAPTIVE:
        raise ValueError(f"'{method}' has no adaptive steps (one of: {', '.join(ADAPTIVE)}); `runge_kutta` has fixed")
    if not (rtol > 0 and atol > 0) or span[0] == span[1]:
        raise ValueError(f"adaptive steps need positive tolerances and a span, got {rtol}, {atol} and {span}")
    try:
        from torchdiffeq import odeint
    except ImportError:
        raise ImportError("adaptive steps need torchdiffeq: pip install 'mmgen[ode]'") from None
    check_times(torch.tensor(span))
    times = torch.tensor(span, dtype=z.dtype, device=z.device)
    # The last step lands on the end of the span, not beyond it, where no field is defined.
    options = {"step_t": times[1:]}
    end: Tensor = odeint(lambda t, y: field(y, t), z, times, rtol=rtol, atol=atol, method=method, options=options)[-1]
    return end
