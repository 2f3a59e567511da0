"""The engine: holds weights, gradients and optimiser state on one process, and takes the optimiser's steps."""

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
    """Elements [start, start + numel) of a flattened parameter, and the tensor in which this rank holds them."""

    name: str
    start: int
    numel: int
    flat: Tensor
    """The tensor that the optimiser steps, or a frozen one."""
    at: int
    """Offset of the fragment in `flat`, in elements."""
    owned: bool = True
    """Whether this rank writes the fragment to checkpoints; exactly one rank does."""

    def of(self, tensor: Tensor) -> Tensor:
        """A view of the fragment's elements [numel] in a tensor with the layout of `flat`."""
        return tensor.detach().view(-1)[self.at : self.at + self.numel]


class Engine:
    """Training on one process and one device: backward, clipping and step.

    `ZeroEngine` in `zero.py` has the same interface on any number of processes.
    """

    def __init__(
        self, config: Config, vocabulary: int, ranks: Ranks, autoencoder: AutoencoderFacts | None = None
    ) -> None:
        self.config, self.ranks, self.autoencoder = config, ranks, autoencoder
        self.bf16 = uses_bf16(config)
        self.watched = False
        """Whether this step records gradient norms per part of the model."""
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
        """Start a step with a learning rate; with `watched`, it records gradient norms per part of the model."""
        self.watched = watched
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def forward(self, batch: Batch) -> Losses:
        """The loss sums of one micro-step."""
        losses: Losses = self._prepared(batch)
        return losses

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of a micro-step; `last` marks the last one of a step."""
        loss.backward()

    def step(self, allow: bool) -> tuple[float, bool]:
        """Clip and step; returns the global gradient norm before clipping, and whether the step was taken.

        The step is skipped if `allow` is false or the norm is not finite. A skipped step changes neither weights nor
        moments, averaged weights or counters. Gradients are cleared in both cases.
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
        """Gradient norm of each part before clipping, from the recorded ones and the global `norm`."""
        squares = self.ranks.sums([self._squares[part] for part in PARTS])
        scale = norm / max(sum(squares) ** 0.5, 1e-30)
        self._squares = dict.fromkeys(PARTS, 0.0)
        return {f"grad_norm/{part}": scale * square**0.5 for part, square in zip(PARTS, squares, strict=True)}

    @contextmanager
    def averaged(self, average: str) -> Iterator[None]:
        """Inside the block the model has the averaged weights of this name; nothing is copied or gathered whole."""
        with averaged_weights(self.optimizer, average), self._sampling_types():
            yield

    @contextmanager
    def _sampling_types(self) -> Iterator[None]:
        yield

    def create_state(self, taken: int) -> None:
        """Create optimiser state after `taken` steps, to be filled from a checkpoint."""
        unique = {id(f.flat): f.flat for f in self.fragments if self._stepped(f.flat)}
        self.optimizer.create_state(taken, list(unique.values()))

    def _stepped(self, flat: Tensor) -> bool:
        return flat.requires_grad

    def refresh(self) -> None:
        """Copy the optimiser's weights to the weights of the model, after a change of the former."""

    def close(self) -> None:
        """Release resources that would prevent a clean exit."""


def uses_bf16(config: Config) -> bool:
    """Whether the run computes in bf16: as `train.precision` sets it; `auto` means if the hardware multiplies bf16."""
    if config.train.precision == "auto":
        if torch.cuda.is_available():
            return bool(torch.cuda.is_bf16_supported())
        return not torch.backends.mps.is_available() and bool(torch.cpu._is_amx_tile_supported())
    return config.train.precision == "bf16"


def can_compile(device: torch.device) -> bool:
    """Whether `torch.compile` works on this device; on a CPU it needs a C++ compiler."""
    import os
    import shutil

    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    return device.type != "cpu" or compiler is not None
