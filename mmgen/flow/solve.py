"""ODE solvers as generators: each yields (z, t), is sent the velocity there, and returns z at the last time.

Because a solver only asks, a caller can batch the questions of many solvers, interleave them with other
work, or stop between any two; `solve` is the small driver for a plain function.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

from torch import Tensor

Solver = Generator[tuple[Tensor, Tensor], Tensor, Tensor]


def euler(z: Tensor, times: Tensor) -> Solver:
    """Order 1. On the linear path the last step lands on the clean estimate z + (1 - t) v."""
    for i in range(len(times) - 1):
        v = yield z, times[i]
        z = z + (times[i + 1] - times[i]) * v
    return z


def heun(z: Tensor, times: Tensor) -> Solver:
    """Order 2 (explicit trapezoid). The last step is Euler's: v may be singular at the end point."""
    for i in range(len(times) - 1):
        v = yield z, times[i]
        h = times[i + 1] - times[i]
        if i < len(times) - 2:
            v = (v + (yield z + h * v, times[i + 1])) / 2
        z = z + h * v
    return z


SOLVERS: dict[str, Callable[[Tensor, Tensor], Solver]] = {"euler": euler, "heun": heun}


def solve(solver: Solver, velocity: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Drive `solver` with `velocity(z, t)` and return its result."""
    try:
        z, t = next(solver)
        while True:
            z, t = solver.send(velocity(z, t))
    except StopIteration as stop:
        result: Tensor = stop.value
        return result
