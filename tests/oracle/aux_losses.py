"""Router losses written from their papers, as pure functions of the router logits.

Load balancing: Switch Transformer (arXiv:2101.03961), equations 4 to 6, with the top-k counts divided by k.
z-loss: ST-MoE (arXiv:2202.08906), equation 5. Both are returned without their coefficient.
"""

import torch
from torch import Tensor


def load_balancing_loss(logits: Tensor, top_k: int) -> Tensor:
    """Return E * sum_e f_e P_e of one layer and one micro-batch (scalar; 1 when perfectly balanced).

    `logits` is [tokens, E]. P_e is the mean softmax probability over all E experts, f_e the share of the
    tokens * k assignments that go to expert e; f is a count and carries no gradient.
    """
    probs = logits.softmax(dim=-1)
    num_experts = logits.shape[-1]
    assigned = probs.topk(top_k, dim=-1).indices.flatten()
    share = assigned.bincount(minlength=num_experts).to(probs.dtype) / assigned.numel()
    return num_experts * (share * probs.mean(dim=0)).sum()


def router_z_loss(logits: Tensor) -> Tensor:
    """Return the mean over tokens of logsumexp(logits)^2 for `logits` [tokens, E] (scalar)."""
    return logits.logsumexp(dim=-1).square().mean()


@torch.no_grad()
def routing_margin(logits: Tensor, top_k: int) -> float:
    """Return the smallest gap between the last chosen and the first rejected logit of any token.

    Two correct implementations may route a token differently when this gap is near their rounding error;
    needs k < E for `logits` [tokens, E].
    """
    nearest = logits.topk(top_k + 1, dim=-1).values
    return (nearest[:, -2] - nearest[:, -1]).min().item()
