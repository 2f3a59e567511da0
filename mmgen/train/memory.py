"""Bytes of state and of messages per process, from the theory of ZeRO (Rajbhandari et al. 2020, section 5)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """What determines the bytes of a run: the size of its model, and how processes share it."""

    parameters: int
    stage: int
    world: int
    bf16: bool
    muon: int = 0
    """Parameters that Muon steps, which have one moment instead of two."""

    @property
    def low(self) -> int:
        """Bytes per weight in the type that the model computes in."""
        return 2 if self.bf16 and self.stage else 4


def theory(shape: Shape, averages: int) -> dict[str, float]:
    """Bytes per rank of weights, gradients, master weights, moments and averaged weights, without padding.

    `averages` is the number of averaged copies. Stage 0 holds fp32 weights and computes in bf16 under autocast, so it
    has no master weights. Stages 1 to 3 hold fp32 master weights and a copy in the computing type. Gradients are summed
    in fp32; they are whole in stage 1 and sharded in stages 2 and 3.
    """
    whole, stage = shape.parameters, shape.stage
    share = whole / shape.world if stage else whole
    return {
        "weights": shape.low * (share if stage == 3 else whole),
        "gradients": 4 * (share if stage >= 2 else whole),
        "master": 4 * share if stage else 0,
        "moments": 8 * share - 4 * shape.muon,
        "averages": 4 * averages * share,
    }


def traffic(shape: Shape, micro_steps: int, tied: int = 0) -> float:
    """Bytes that each rank sends in a step, with ring collectives.

    Stages 0 and 1 sum gradients once per step, stages 2 and 3 after every micro-step. Stages 1 and 2 then send the new
    weights. Stage 3 gathers the weights in each forward and each backward pass. If one table is both embedding and
    head, its `tied` elements are gathered twice in the backward pass. Gradients are sent in the type of the weights.
    """
    ring = (shape.world - 1) / shape.world
    if shape.stage == 0:
        return 2 * 4 * shape.parameters * ring
    if shape.stage < 3:
        return ring * shape.parameters * shape.low * (2 * (micro_steps if shape.stage == 2 else 1) + 1)
    return ring * (3 * shape.parameters + tied) * micro_steps * shape.low
