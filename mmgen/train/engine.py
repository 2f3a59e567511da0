"""What holds weights, gradients and optimiser state: one process here, DeepSpeed's ZeRO in `zero.py`; one interface."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from mmgen.config import Config
from mmgen.image.latent import AutoencoderFacts
from mmgen.model import Losses, MMGenModel, build_model
from mmgen.sequence.batch import Batch
from mmgen.train.optimizer import AveragingAdamW, averaged_weights, build_optimizer
from mmgen.train.ranks import Ranks

PARTS = ("embedding", "backbone", "image")


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + numel) of a flattened parameter, and where this rank keeps them."""

    name: str
    start: int
    numel: int
    flat: Tensor
    """The tensor that the optimiser steps (or a frozen one)."""
    at: int
    """Offset of the fragment in `flat`."""
    owned: bool = True
    """Whether this rank writes it; exactly one rank does."""

    def of(self, tensor: Tensor) -> Tensor:
        """The fragment's elements of a tensor that is laid out as `flat`: a view."""
        return tensor.detach().view(-1)[self.at : self.at + self.numel]


class Engine:
    """One process on one device: plain backward, clipping and step."""

    def __init__(
        self, config: Config, vocabulary: int, ranks: Ranks, autoencoder: AutoencoderFacts | None = None
    ) -> None:
        self.config, self.ranks, self.autoencoder = config, ranks, autoencoder
        self.bf16 = uses_bf16(config)
        self.watched = False
        """Whether this step notes gradient norms per part."""
        self._squares = dict.fromkeys(PARTS, 0.0)
        self._build(vocabulary)
        self.fragments = self._fragments()
        self._at = {id(f.flat): [] for f in self.fragments}  # type: dict[int, list[Fragment]]
        for fragment in self.fragments:
            self._at[id(fragment.flat)].append(fragment)
        self.optimizer.allow = self._allow

    model: MMGenModel
    optimizer: AveragingAdamW
    device: torch.device

    def _build(self, vocabulary: int) -> None:
        accelerator = Accelerator(mixed_precision="bf16" if self.bf16 else "no")
        self.device = accelerator.device
        self.model = self._checkpointed(build_model(self.config, vocabulary, self.autoencoder))
        self.optimizer = build_optimizer(self.model, self.config.train)
        self._prepared = accelerator.prepare(self.model)
        if self.config.train.compile and can_compile(self.device):
            self.model.compile_backbone()

    def _checkpointed(self, model: MMGenModel) -> MMGenModel:
        if self.config.train.activation_checkpointing:
            model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    def _fragments(self) -> list[Fragment]:
        return [Fragment(name, 0, p.numel(), p, 0) for name, p in self.model.named_parameters()]

    def begin(self, lr: float, watched: bool) -> None:
        """Start a step with a learning rate; `watched`: it notes gradient norms per part."""
        self.watched = watched
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def forward(self, batch: Batch) -> Losses:
        """Loss sums of one micro-step."""
        losses: Losses = self._prepared(batch)
        return losses

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add gradients; `last` marks the last micro-step of a step."""
        loss.backward()

    def step(self, allow: bool) -> tuple[float, bool]:
        """The global gradient norm before clipping, and whether the step was taken.

        It is left out, without a trace in weights, moments, averages or counters, where `allow` is false or
        the norm is not finite; gradients are gone in either case.
        """
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.clip_norm))
        taken = allow and math.isfinite(norm)
        if taken:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm, taken

    def _allow(self, stepped: list[Tensor]) -> bool:
        if self.watched:
            for flat in stepped:
                for fragment in self._at[id(flat)]:
                    if fragment.owned and flat.grad is not None:
                        self._squares[self._part(fragment.name)] += float(fragment.of(flat.grad).square().sum())
        return True

    def _part(self, name: str) -> str:
        if "embed_tokens" in name or "lm_head" in name or "wte" in name:
            return "embedding"
        return "backbone" if name.startswith("backbone.") else "image"

    def norms(self, norm: float) -> dict[str, float]:
        """Gradient norm before clipping of each part, from the noted ones, which are those after it."""
        squares = self.ranks.sums([self._squares[part] for part in PARTS])
        scale = norm / max(sum(squares) ** 0.5, 1e-30)
        self._squares = dict.fromkeys(PARTS, 0.0)
        return {f"grad_norm/{part}": scale * square**0.5 for part, square in zip(PARTS, squares, strict=True)}

    @contextmanager
    def averaged(self, average: str) -> Iterator[None]:
        """Inside the block the model runs with averaged weights; nothing is copied or gathered whole."""
        with averaged_weights(self.optimizer, average), self._sampling_types():
            yield

    @contextmanager
    def _sampling_types(self) -> Iterator[None]:
        yield

    def create_state(self, taken: int) -> None:
        """Optimiser state after `taken` steps, to be filled from a checkpoint."""
        unique = {id(f.flat): f.flat for f in self.fragments if self._stepped(f.flat)}
        self.optimizer.create_state(taken, list(unique.values()))

    def _stepped(self, flat: Tensor) -> bool:
        return flat.requires_grad

    def refresh(self) -> None:
        """Let the working weights follow the optimiser's, after those were written to."""

    def close(self) -> None:
        """Release what would hinder a clean exit."""


def uses_bf16(config: Config) -> bool:
    """Whether the run computes in bf16: as set, or where the hardware multiplies it natively."""
    if config.train.precision == "auto":
        if torch.cuda.is_available():
            return bool(torch.cuda.is_bf16_supported())
        return not torch.backends.mps.is_available() and bool(torch.cpu._is_amx_tile_supported())
    return config.train.precision == "bf16"


def can_compile(device: torch.device) -> bool:
    """Whether `torch.compile` can work here; on a CPU it needs a C++ compiler."""
    import os
    import shutil

    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    return device.type != "cpu" or compiler is not None
