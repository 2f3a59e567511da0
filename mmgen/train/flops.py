"""Floating-point operations of a training step, counted from the content of its rows.

The count is the same for every machine and attention kernel: two operations per multiply-add of every matrix product
that the documents need, forward and backward. Padding, recomputed activations and element-wise operations do not count.
Attention counts the visible pairs (q, k), which the real mask gives.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mmgen.config import ObjectiveConfig
from mmgen.model import MMGenModel
from mmgen.objective import build_objective
from mmgen.sequence.batch import Batch, RawBatch, Rows


def attended_pairs(batch: Rows) -> int:
    """Number of pairs (q, k) of a batch where position q may attend to position k; padding is left out.

    In closed form, for documents of n and blocks of m positions: the n (n + 1) / 2 causal pairs of each document, plus
    m (m - 1) / 2 for a bidirectional block, minus the pairs of a noisy copy with all later positions outside it.
    """
    shape = batch.document_BS.shape
    first_B1 = torch.arange(shape[0], device=batch.document_BS.device).unsqueeze(1) * shape[1]
    slot_BS = torch.arange(shape[1], device=batch.document_BS.device).expand(shape)
    document_BS = torch.where(batch.document_BS >= 0, batch.document_BS + first_B1, -1)
    block_BS = torch.where(batch.block_BS >= 0, batch.block_BS + first_B1, -1)
    document, noised = document_BS[document_BS >= 0], batch.noised_BS & (block_BS >= 0)
    length = torch.bincount(document)
    inside = torch.bincount(block_BS[batch.bidirectional_BS & (block_BS >= 0)])
    copies = torch.bincount(block_BS[noised])
    last = length.new_zeros(len(length)).scatter_reduce(0, document, slot_BS[document_BS >= 0], "amax")
    later = last[document_BS[noised]] - slot_BS[noised]
    pairs = (length * (length + 1)).sum() + (inside * (inside - 1)).sum() + (copies * (copies - 1)).sum()
    return int(pairs) // 2 - int(later.sum())


@dataclass(frozen=True)
class _Rates:
    """FLOPs of the networks of an objective on one batch: of the patches that enter, and of learning some of them."""

    entering: int
    patches: int
    learning: int
    learned: int

    def at(self, patches: int, learned: int) -> float:
        """FLOPs for other numbers of patches."""
        return self.entering * patches / self.patches + self.learning * learned / self.learned


class Arithmetic:
    """Counts the FLOPs of batches for one model. It reads only shapes, so sharded weights are not gathered."""

    def __init__(self, model: MMGenModel) -> None:
        sizes = model.backbone.config
        self.heads: int = sizes.num_attention_heads * sizes.num_hidden_layers
        """Attention heads of all layers."""
        self.head_width: int = getattr(sizes, "head_dim", None) or sizes.hidden_size // sizes.num_attention_heads
        chosen = getattr(sizes, "num_experts_per_tok", None)
        head = model.backbone.get_output_embeddings()
        self.body = sum(_multiplied(part, chosen) for part in model.backbone.modules() if part is not head)
        """Weights that every position is multiplied with; of experts, those that a position is sent to."""
        vocabulary, width = _shape(head.weight)
        self.language_head = vocabulary * width
        settings = ObjectiveConfig.model_validate(model.config.objective)
        # Its tensors have shapes and no memory. Operations on indices alone still run, so their values can be read.
        self._shapes = FakeTensorMode(allow_non_fake_inputs=True)
        with self._shapes:
            self._objective = build_objective(settings, model.patcher, width).eval()
        self._patches, self._width = model.build_patcher().ready, width
        self._rates: _Rates | None = None

    def of(self, batches: Iterable[RawBatch]) -> float:
        """FLOPs of the forward and backward pass of batches. The backward pass of a product has twice its FLOPs."""
        return float(sum(self._of(batch) for batch in batches))

    def _of(self, batch: RawBatch) -> float:
        positions = int((batch.document_BS >= 0).sum())
        labels = len(batch.label_at_L)
        products = self.body * positions + self.language_head * labels
        attention = 2 * self.heads * self.head_width * attended_pairs(batch)  # QK and AV
        return 3 * 2 * (products + attention) + self._of_objective(batch)

    def _of_objective(self, batch: RawBatch) -> float:
        """FLOPs of the networks of the objective: a rate per patch that enters, and one per learned patch.

        Counting takes longer than a step of a small model, so it is done once, on the first batch that has both.
        """
        patches, learned = len(batch.at_I), len(batch.loss_at_J)
        if self._rates is None and learned:
            copies = [copy._replace(learned=False) for copy in batch.copies]
            entering = self._counted(replace(batch, loss_at_J=batch.loss_at_J[:0], copies=copies))
            self._rates = _Rates(entering, patches, self._counted(batch) - entering, learned)
        return self._rates.at(patches, learned) if self._rates else self._counted(batch)

    def _counted(self, batch: RawBatch) -> int:
        """What torch counts for the networks of the objective on the shapes of a batch."""
        length, dtype = self._patches.length, getattr(torch, np.dtype(self._patches.dtype).name)
        with self._shapes:
            x_IP = torch.empty(len(batch.at_I), length, dtype=dtype)
            eps_JKP = torch.empty(len(batch.loss_at_J), batch.noise_draws, length)
            hidden_JD = torch.empty(len(batch.loss_at_J), self._width, requires_grad=True)
        shared = {field.name: getattr(batch, field.name) for field in fields(Rows)}
        with FlopCounterMode(display=False) as counter, torch.enable_grad():
            embedded = self._objective.embed(Batch(**shared, x_IP=x_IP, eps_JKP=eps_JKP))
            loss = self._objective.loss(hidden_JD, embedded.state)
            (loss.sum() + embedded.values.sum()).backward()
        return int(counter.get_total_flops())


def _shape(p: Tensor) -> tuple[int, ...]:
    """The shape of a parameter, also of one that DeepSpeed shards."""
    return tuple(getattr(p, "ds_shape", p.shape))


def _multiplied(part: nn.Module, experts_per_position: int | None) -> int:
    """Number of the module's own weights, without those of its children, that multiply each position.

    Tables of embeddings are read, not multiplied. Vectors (norms, biases) have no products. Weights with three axes are
    those of experts, and a position is sent to `experts_per_position` of them.
    """
    if isinstance(part, nn.Embedding):
        return 0
    total = 0
    for p in part.parameters(recurse=False):
        shape = _shape(p)
        if len(shape) == 3 and experts_per_position is not None:
            shape = (min(experts_per_position, shape[0]), *shape[1:])
        total += math.prod(shape) if len(shape) > 1 else 0
    return total
