"""Muon: momentum whose update of each matrix is made orthogonal (Jordan et al. 2024).

Matrices of the hidden layers are stepped by Muon, and all other parameters by AdamW. The orthogonal update is scaled to
the size of an AdamW update (Liu et al. 2025, section 2.2), so that both share learning rate and weight decay.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b and c of the iteration X <- a X + (b X X^T + c (X X^T)^2) X, which moves all singular values near 1."""
ITERATIONS = 5
MOMENTUM = 0.95
UPDATE_SIZE = 0.2
"""Root mean square of the entries of an AdamW update in practice, in units of the learning rate."""
OTHERS = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers of a backbone whose weights are no matrices of a product with hidden states."""
HIDDEN = ("backbone.", "objective.head.blocks.")
"""Prefixes of the hidden layers' parameters."""


def orthogonal(matrices: Tensor) -> Tensor:
    """Move the singular values of matrices [..., R, C] near 1 and keep their vectors; tiny values stay smaller.

    This is the quintic Newton-Schulz iteration of Muon. On CUDA it runs in bf16.
    A matrix of zeros stays zero.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    if x.is_cuda:
        x = x.bfloat16()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    result: Tensor = (x.mT if tall else x).to(matrices.dtype)
    return result


def size(shape: torch.Size) -> float:
    """Factor that gives an orthogonal update of this shape [..., R, C] the size of an AdamW update."""
    return float(UPDATE_SIZE * max(shape[-2:]) ** 0.5)


def hidden_matrices(model: nn.Module) -> set[str]:
    """Names of the parameters that Muon steps: matrices of the backbone's layers and of the blocks of MAR's head.

    Embeddings and layers that enter or leave the model (language head, patch projections, time) keep AdamW, as Jordan
    et al. 2024 recommend. Stacked matrices [..., R, C], for example of experts, count as matrices.
    """
    outer = {id(module.weight) for module in model.modules() if isinstance(module, OTHERS)}
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None:
            outer.add(id(module.get_output_embeddings().weight))
    return {
        name
        for name, p in model.named_parameters()
        if p.requires_grad and p.ndim >= 2 and name.startswith(HIDDEN) and id(p) not in outer
    }
