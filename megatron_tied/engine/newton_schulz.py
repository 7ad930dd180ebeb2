"""Newton-Schulz iterations over many matrices at once."""

from __future__ import annotations

import torch

STEPS = 5
# Keller Jordan's, as torch.optim.Muon has them.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_EPS = 1e-7
# Elements of as many matrices as are worked on at once: what fits in a CPU's cache; on a GPU, what fills it.
_AT_ONCE_ON_CPU, _AT_ONCE_ON_GPU = 1 << 20, 1 << 26


def orthogonalized(matrices: torch.Tensor) -> torch.Tensor:
    """Near-orthogonal matrices with the singular vectors of `matrices` [n, rows, columns]: the same shape and dtype.

    Source: `torch.optim._muon._zeropower_via_newtonschulz`, which takes one matrix, to bf16; with its constants.
    """
    at_once = (_AT_ONCE_ON_GPU if matrices.is_cuda else _AT_ONCE_ON_CPU) // matrices[0].numel()
    return torch.cat([_orthogonalized(part) for part in torch.split(matrices, max(1, at_once))])


def _orthogonalized(matrices: torch.Tensor) -> torch.Tensor:
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / x.flatten(1).norm(dim=1).clamp(min=_EPS).view(-1, 1, 1)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if is_tall else x
