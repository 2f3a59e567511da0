"""Compares bytes of state per rank and bytes sent per step, counted from the tensors, with the theory of ZeRO.

`python -m tests.faults.accounts [--inject whole_averages|sent_twice] [--json]`. The exit code is 1 if a count differs
from theory by more than padding.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmgen.config import Config
from mmgen.data.documents import Share
from mmgen.data.loader import Corpus, steps
from mmgen.data.order import Position
from mmgen.sequence.batch import prepare
from mmgen.sequence.tokenizer import Tokenizer
from mmgen.train.loop import build_engine
from mmgen.train.memory import Shape, theory, traffic
from mmgen.train.ranks import start
from tests.faults.launch import run_ranks, small

CELLS = [(stage, world, precision) for precision in ("fp32", "bf16") for stage in (0, 1, 2, 3) for world in (1, 2, 4)]
SENT = {
    "all_reduce": 2.0,
    "all_gather_into_tensor": 1.0,
    "reduce_scatter_tensor": 1.0,
    "all_gather": 1.0,
    "reduce": 2.0,
}
MICRO = 2
FAULTS = ("whole_averages", "sent_twice")


def configure(folder: Path, stage: int, world: int, precision: str) -> Config:
    # In stage 3, small weights are sharded too, and each use of a layer gathers it again.
    exact = {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    settings = {
        "batch_rows": 2 * world, "micro_rows": 1, "zero_stage": stage, "precision": precision, "ema_more": [0.5],
        "timeout": 300, "deepspeed": {"zero_optimization": exact if stage == 3 else {}},
    }  # fmt: skip
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    return small(folder, train=settings, model={"backbone": sizes})


def unique(tensors: Any) -> int:
    """Bytes of all distinct storages of tensors."""
    sizes = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None and t.numel()
    }
    return sum(sizes.values())


def count(config: Config, out: Path, fault: str | None, rank: int) -> int:
    sent = [0.0, 0.0]
    spy(sent, int(config.train.batch_rows / 2))  # before DeepSpeed stores references to the functions
    if fault == "sent_twice":
        for name in SENT:
            setattr(dist, name, lambda *a, f=getattr(dist, name), **named: (f(*a, **named), f(*a, **named))[1])
    ranks = start(config)
    tokenizer = Tokenizer.of(config)
    torch.manual_seed(0)
    engine: Any = build_engine(config, len(tokenizer), ranks)
    stage = config.train.zero_stage
    corpus = Corpus(config.data.train, tokenizer, config)
    stream = steps(corpus, 0, 2, Position(), Share(ranks.rank, ranks.world))
    grads = 0
    for number, step in enumerate(stream):
        sent[:] = [0.0, float(number == 1)]
        for i, raw in enumerate(step.micro):
            losses = engine.forward(prepare(raw, corpus.patcher))
            engine.backward(losses.text + losses.image, last=i + 1 == len(step.micro))
            grads = max(grads, sum(t.numel() * t.element_size() for t in gradients(engine, stage)))
        engine.step(allow=True)
        sent[1] = 0.0
    flats = list({id(f.flat): f.flat for f in engine.fragments}.values())
    weights = [p.ds_tensor if stage == 3 else p for p in engine.model.parameters()]
    states = [engine.optimizer.state[flat] for flat in flats]
    if fault == "whole_averages":  # every rank holds averaged weights of the whole model
        sizes = [getattr(p, "ds_numel", p.numel()) for p in engine.model.parameters()]
        for state in states:
            state["ema"] = torch.zeros(sum(sizes))
    low = unique(weights)
    found = {
        "weights": low,
        "gradients": grads,
        "master": unique([*weights, *flats]) - low,
        "moments": unique([s[k] for s in states for k in ("exp_avg", "exp_avg_sq")]),
        "averages": unique([s[k] for s in states for k in engine.optimizer.decays]),
    }
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.model.parameters())
    if ranks.rank == 0:
        shape = Shape(parameters, stage, ranks.world, config.train.precision == "bf16")
        expected = theory(shape, len(engine.optimizer.decays))
        result = {"found": found, "theory": expected, "parameters": parameters, "sent": sent[0]}
        table = engine.model.get_input_embeddings().weight
        tied = getattr(table, "ds_numel", table.numel()) if engine.model.backbone.config.tie_word_embeddings else 0
        result["sent_theory"] = traffic(shape, MICRO, tied)
        out.write_text(json.dumps(result))
    return 0


def gradients(engine: Any, stage: int) -> list[Tensor]:
    """All tensors that hold gradients after a micro-step."""
    tensors = [p.grad for p in engine.model.parameters()]
    zero = getattr(engine, "_zero", None)
    tensors += getattr(zero, "fp32_groups_gradients_flat", [])
    if stage in (1, 2) and hasattr(zero, "averaged_gradients"):
        tensors += [g for grads in zero.averaged_gradients.values() for g in grads or [] if g is not None]
    if stage == 3:
        tensors.append(zero.grad_partitions_flat_buffer)
    return [tensor for tensor in tensors if tensor is not None]


def spy(sent: list[float], world: int) -> None:
    """While sent[1] is set, add to sent[0] the bytes that a ring sends for every collective."""
    ring = (world - 1) / world

    def wrap(name: str, real: Any) -> Any:
        def counted(*arguments: Any, **named: Any) -> Any:
            tensors = [v for v in (*arguments, *named.values()) if torch.is_tensor(v)]
            numel = max((t.numel() * t.element_size() for t in tensors), default=0)
            if sent[1] and numel > 64:  # leaves out the norm of the gradient
                sent[0] += SENT[name] * numel * ring
            return real(*arguments, **named)

        return counted

    for name in SENT:
        setattr(dist, name, wrap(name, getattr(dist, name)))


def check(chosen: list[tuple[int, int, str]], fault: str | None, folder: Path) -> list[dict[str, Any]]:
    results = []
    for stage, world, precision in chosen:
        name = f"stage{stage}-world{world}-{precision}"
        config = configure(folder / name, stage, world, precision)
        out = folder / f"{name}.json"
        codes = run_ranks(world, partial(count, config, out, fault))
        if any(codes):
            results.append({"cell": name, "holds": False, "codes": codes})
            continue
        counts = json.loads(out.read_text())
        # Flat shards are padded to a multiple of the world, stage 3 pads every tensor.
        far = {
            kind: counts["found"][kind] / size - 1 if size else float(counts["found"][kind])
            for kind, size in counts["theory"].items()
        }
        sent = counts["sent"] / counts["sent_theory"] - 1 if counts["sent_theory"] else counts["sent"]
        holds = all(abs(value) < 0.01 for value in [*far.values(), sent])
        results.append({"cell": name, "holds": holds, **counts, "far": far, "sent_far": sent})
        print(name, {kind: round(v, 3) for kind, v in far.items()}, f"sent {sent:+.3f}", file=sys.stderr, flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", type=int, choices=(1, 2, 4), help="only the cells with this number of processes")
    parser.add_argument("--inject", choices=FAULTS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    chosen = [cell for cell in CELLS if options.world in (None, cell[1])]
    with tempfile.TemporaryDirectory() as folder:
        results = check(chosen, options.inject, Path(folder))
    holds = all(result["holds"] for result in results)
    if options.json:
        print(json.dumps({"holds": holds, "cells": results}))
    else:
        for r in results:
            far = "  ".join(f"{kind} {value:+.2%}" for kind, value in r.get("far", {}).items())
            print("holds" if r["holds"] else "FAILS", r["cell"], far, f"sent {r.get('sent_far', float('nan')):+.2%}")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
