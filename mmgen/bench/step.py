"""`mmgen bench step`: times a training step against a bare loop with the same matrix products.

The bare loop, called the floor, trains a minimal causal decoder of the same depth, widths and vocabulary. It has plain
tensors, RMSNorm, rotary positions, SwiGLU, causal attention without a mask, as many logits, input patches and output
patches as the batch has, mean losses and AdamW. It has no packing, no attention mask, no two-dimensional positions, no
EMA and no keyed noise. The ratio of the two times shows the cost of these parts.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmgen.config import Config
from mmgen.config_io import override
from mmgen.data.latents import find_facts
from mmgen.data.loader import Corpus
from mmgen.image.latent import build_patcher
from mmgen.model import MMGenModel, build_model
from mmgen.sequence.batch import Batch, RawBatch, prepare
from mmgen.sequence.tokenizer import Tokenizer
from mmgen.train.engine import can_compile, uses_bf16
from mmgen.train.flops import Arithmetic
from mmgen.train.optimizer import build_optimizer

Step = Callable[[], None]


class Floor:
    """The bare loop, with the sizes of a model; its parameters are plain leaf tensors."""

    def __init__(self, model: MMGenModel, batch: Batch, bf16: bool) -> None:
        fields, self.batch, self.bf16 = model.backbone.config, batch, bf16
        self.heads, self.kv_heads, self.size = fields.num_attention_heads, fields.num_key_value_heads, fields.head_dim
        width, middle, patch = fields.hidden_size, fields.intermediate_size, model.patcher.patch_length
        attend, keys = self.heads * self.size, self.kv_heads * self.size

        def matrix(out: int, into: int) -> Tensor:
            return torch.nn.Parameter(torch.randn(out, into, device=model.device) * into**-0.5)

        self.embed, self.enter, self.leave = (
            matrix(fields.vocab_size, width),
            matrix(width, patch),
            matrix(patch, width),
        )
        shapes = [
            (attend, width),
            (keys, width),
            (keys, width),
            (width, attend),
            (middle, width),
            (middle, width),
            (width, middle),
        ]
        self.layers = [[matrix(*shape) for shape in shapes] for _ in range(fields.num_hidden_layers)]
        self.parameters = [self.embed, self.enter, self.leave, *(w for layer in self.layers for w in layer)]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-3, fused=True)
        length = batch.ids_BS.shape[1]
        angle = torch.arange(length).unsqueeze(1) * 1e4 ** (-torch.arange(self.size // 2) / (self.size // 2))
        self.cos, self.sin = angle.cos().to(model.device), angle.sin().to(model.device)
        self.decode = self._decode

    def _rotate(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([a * self.cos - b * self.sin, a * self.sin + b * self.cos], -1).to(x.dtype)

    def _decode(self, h: Tensor) -> Tensor:
        rows, length, width = h.shape
        for q, k, v, o, gate, up, down in self.layers:
            n = F.rms_norm(h, (width,))
            split = [F.linear(n, w).view(rows, length, -1, self.size).transpose(1, 2) for w in (q, k, v)]
            query, key = (self._rotate(F.rms_norm(part, (self.size,))) for part in split[:2])
            mixed = self._attend(query, key, split[2])
            h = h + F.linear(mixed.to(n.dtype).transpose(1, 2).reshape(rows, length, -1), o)
            n = F.rms_norm(h, (width,))
            h = h + F.linear(F.silu(F.linear(n, gate)) * F.linear(n, up), down)
        return F.rms_norm(h, (width,))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention with the kernels of mmgen: on a CPU two matrix products if compiled in bf16, else fp32."""
        groups = self.heads // self.kv_heads
        if query.device.type != "cpu":
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=groups > 1)
        if not (self.bf16 and torch.compiler.is_compiling()):
            parts = (query.float(), key.float(), value.float())
            return F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=groups > 1)
        key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
        future = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).triu(1)
        scores = ((query @ key.mT).float() * self.size**-0.5).masked_fill(future, -torch.inf)
        return torch.softmax(scores, -1).to(value.dtype) @ value

    def step(self) -> None:
        """Run the forward pass, the backward pass and AdamW."""
        batch = self.batch
        with torch.autocast(batch.ids_BS.device.type, torch.bfloat16, enabled=self.bf16):
            h = F.embedding(batch.ids_BS, self.embed).flatten(0, 1)
            h = h.index_add(0, batch.at_I, F.linear(batch.x_IP, self.enter).to(h.dtype)).view(*batch.ids_BS.shape, -1)
            flat = self.decode(h).flatten(0, 1)
            scores = F.linear(flat[batch.label_at_L], self.embed)
            patches = F.linear(flat[batch.at_I], self.leave)
        loss = F.cross_entropy(scores.float(), batch.label_BS.flatten()[batch.label_at_L])
        (loss + F.mse_loss(patches.float(), batch.x_IP)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def product_step(config: Config, model: MMGenModel, batch: Batch, bf16: bool) -> Step:
    """Return a training step as the trainer runs it: forward, joint loss, backward, clipping, AdamW with EMA."""
    optimizer = build_optimizer(model, config.train)
    model.train()

    def step() -> None:
        with torch.autocast(batch.ids_BS.device.type, torch.bfloat16, enabled=bf16):
            losses = model(batch)
        text, image = losses.text / max(1, losses.text_count), losses.image / max(1, losses.image_count)
        loss = text + config.objective.lambda_image * image
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


@dataclass(frozen=True)
class StepTimes:
    """Medians over alternating rounds."""

    step: float
    """Seconds of a training step."""
    floor: float
    """Seconds of a step of the bare loop."""
    peak_memory_bytes: int
    """Peak memory of a training step in eager mode: of the device, or of the process on a CPU."""
    parameters: int
    positions: int
    """Positions of the batch."""
    gflop: float
    """GFLOP of a training step, by the count of MFU: without padding."""
    bf16: bool
    threads: int
    rounds: int
    step_compiled: float | None = None
    """Seconds of a compiled training step; None if the device cannot compile."""
    floor_compiled: float | None = None

    @property
    def ratio_to_floor(self) -> float:
        """Time of a training step over that of the bare loop."""
        return self.step / self.floor

    def as_dict(self) -> dict[str, float]:
        """Return the times as `mmgen bench step --json` prints them."""
        result: dict[str, float] = {"step_seconds": self.step, "floor_seconds": self.floor}
        if self.step_compiled is not None and self.floor_compiled is not None:
            result |= {"step_compiled_seconds": self.step_compiled, "floor_compiled_seconds": self.floor_compiled}
            result["ratio_to_floor_compiled"] = self.step_compiled / self.floor_compiled
        names = ("ratio_to_floor", "peak_memory_bytes", "parameters", "positions", "bf16", "threads", "rounds")
        return result | {name: getattr(self, name) for name in names} | {"gflop_per_step": self.gflop}


def bench_step(config: Config, rounds: int, report: Callable[[str], None], compiled: bool | None = None) -> StepTimes:
    """Time training steps and steps of the bare loop; every round times each of them once.

    `compiled` adds compiled steps; by default they are timed if the device can compile. `report` is called with
    lines of progress.

    Raises:
        ValueError: the configuration is invalid.
        FileNotFoundError: shards or the tokenizer do not exist.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(config.run.seed)
    shards = config.data.val or config.data.train
    config = override(config, {"data": {"train": shards}, "train": {"micro_rows": None}})
    tokenizer = Tokenizer.of(config)
    raw, batch = _first_batch(config, tokenizer, device)
    bf16 = uses_bf16(config)
    steps: dict[str, Step] = {}
    for compiling in (False, True) if (can_compile(device) if compiled is None else compiled) else (False,):
        model = build_model(config, len(tokenizer)).to(device)
        if compiling:
            model.compile_backbone()
        suffix = "_compiled" if compiling else ""
        steps[f"step{suffix}"] = product_step(config, model, batch, bf16)
        if not compiling:
            steps["step"]()  # the peak memory must not include the floor or compiled steps, which are built later
            peak = peak_memory(device)
        floor = Floor(model, batch, bf16)
        if compiling:
            floor.decode = torch.compile(floor._decode)
        steps[f"floor{suffix}"] = floor.step
    medians = _median_seconds(steps, rounds, device, report)
    return StepTimes(
        **medians,
        peak_memory_bytes=peak,
        parameters=sum(p.numel() for p in model.parameters()),
        positions=batch.ids_BS.numel(),
        gflop=Arithmetic(model).of([raw]) / 1e9,
        bf16=bf16,
        threads=torch.get_num_threads(),
        rounds=rounds,
    )


def _first_batch(config: Config, tokenizer: Tokenizer, device: torch.device) -> tuple[RawBatch, Batch]:
    """The first batch of a run, as it is sent and as the model takes it."""
    facts = find_facts(config, tokenizer)
    corpus = Corpus(config.data.train, tokenizer, config, facts)
    (raw,) = corpus.first_step().micro
    return raw, prepare(raw, build_patcher(config.model.patcher, device, facts), device)


def _median_seconds(
    steps: dict[str, Step], rounds: int, device: torch.device, report: Callable[[str], None]
) -> dict[str, float]:
    """Return the median seconds of each step over alternating rounds, after two warm-up calls."""
    for name, step in steps.items():
        began = time.perf_counter()
        step()
        report(f"{name}: first call {time.perf_counter() - began:.1f} s")
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            _wait(device)
            began = time.perf_counter()
            step()
            _wait(device)
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of the device, or of this process on a CPU, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
