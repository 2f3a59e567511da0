"""Bytes of state per process: what ZeRO's theory says (Rajbhandari et al. 2020, section 5), for plans and for tests."""

from __future__ import annotations


def theory(parameters: int, stage: int, world: int, bf16: bool, averages: int) -> dict[str, float]:
    """Bytes per rank of weights, gradients, master weights, moments and averages; padding is not counted.

    Stage 0 keeps fp32 weights and computes in bf16 under autocast, so it has no masters. Stages 1 to 3 hold fp32
    masters beside weights of the computing type; gradients are summed in fp32, whole in stage 1 and shared from 2 on.
    """
    low = 2 if bf16 and stage else 4
    share = parameters / world if stage else parameters
    return {
        "weights": low * (share if stage == 3 else parameters),
        "gradients": 4 * (share if stage >= 2 else parameters),
        "master": 4 * share if stage else 0,
        "moments": 8 * share,
        "averages": 4 * averages * share,
    }


def traffic(parameters: int, stage: int, world: int, bf16: bool, micro_steps: int, tied: int = 0) -> float:
    """Bytes that each rank sends in a step, with collectives in rings.

    Stages 0 and 1 sum gradients once per step, from stage 2 on they do so after every micro-step; stages 1 and 2 then
    send the new weights, stage 3 gathers them for each forward and each backward pass, and once more backwards the
    `tied` elements of a table that is embedding and head at once. Gradients travel in the type of the weights.
    """
    ring = (world - 1) / world
    low = 2 if bf16 and stage else 4
    if stage == 0:
        return 2 * 4 * parameters * ring
    if stage < 3:
        return ring * parameters * low * (2 * (micro_steps if stage == 2 else 1) + 1)
    return ring * (3 * parameters + tied) * micro_steps * low
