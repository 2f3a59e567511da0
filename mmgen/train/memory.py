"""Bytes of state per process: what ZeRO's theory says (Rajbhandari et al. 2020, section 5), for plans and for tests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """What decides the bytes of a run: the size of its model, and how it is shared among processes."""

    parameters: int
    stage: int
    world: int
    bf16: bool

    @property
    def low(self) -> int:
        """Bytes of a weight in the type that is computed in."""
        return 2 if self.bf16 and self.stage else 4


def theory(shape: Shape, averages: int) -> dict[str, float]:
    """Bytes per rank of weights, gradients, master weights, moments and averages; padding is not counted.

    Stage 0 keeps fp32 weights and computes in bf16 under autocast, so it has no masters. Stages 1 to 3 hold fp32
    masters beside weights of the computing type; gradients are summed in fp32, whole in stage 1 and shared from 2 on.
    """
    whole, stage = shape.parameters, shape.stage
    share = whole / shape.world if stage else whole
    return {
        "weights": shape.low * (share if stage == 3 else whole),
        "gradients": 4 * (share if stage >= 2 else whole),
        "master": 4 * share if stage else 0,
        "moments": 8 * share,
        "averages": 4 * averages * share,
    }


def traffic(shape: Shape, micro_steps: int, tied: int = 0) -> float:
    """Bytes that each rank sends in a step, with collectives in rings.

    Stages 0 and 1 sum gradients once per step, from stage 2 on they do so after every micro-step; stages 1 and 2 then
    send the new weights, stage 3 gathers them for each forward and each backward pass, and once more backwards the
    `tied` elements of a table that is embedding and head at once. Gradients travel in the type of the weights.
    """
    ring = (shape.world - 1) / shape.world
    if shape.stage == 0:
        return 2 * 4 * shape.parameters * ring
    if shape.stage < 3:
        return ring * shape.parameters * shape.low * (2 * (micro_steps if shape.stage == 2 else 1) + 1)
    return ring * (3 * shape.parameters + tied) * micro_steps * shape.low
