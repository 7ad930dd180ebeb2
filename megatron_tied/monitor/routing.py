"""What a router decides, as sums that add up over micro-batches, layers and ranks, and the figures made of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from megatron.core.transformer.moe.moe_utils import compute_routing_scores_for_aux_loss

_SCALARS = 3
_QUANTILES = (0.5, 0.75, 0.95)


@dataclass(frozen=True)
class RoutingSums:
    """Sums over the tokens that one router (or the routers of one bank) has seen.

    sums: [3 experts + 3] float64: assignments chosen, and those of them kept (not dropped for lack of capacity), per
    expert, routing probability per expert, tokens, token entropy in nats, squared logsumexp of the logits. max_logit:
    the largest logit, a scalar.
    """

    sums: torch.Tensor
    max_logit: torch.Tensor

    @property
    def num_experts(self) -> int:
        """Experts that were chosen from."""
        return (self.sums.numel() - _SCALARS) // 3

    @property
    def counts(self) -> torch.Tensor:
        """How often each expert was chosen, [experts]."""
        return self.sums[: self.num_experts]

    @property
    def kept(self) -> torch.Tensor:
        """The assignments that each expert has processed, [experts]."""
        return self.sums[self.num_experts : 2 * self.num_experts]

    @property
    def probabilities(self) -> torch.Tensor:
        """Sum over tokens of the routing distribution, [experts]."""
        return self.sums[2 * self.num_experts : -_SCALARS]

    @property
    def scalars(self) -> torch.Tensor:
        """Tokens, and sums of token entropy and of squared logsumexp."""
        return self.sums[-_SCALARS:]

    def __add__(self, other: RoutingSums) -> RoutingSums:
        return RoutingSums(self.sums + other.sums, torch.maximum(self.max_logit, other.max_logit))


@torch.no_grad()
def routing_sums(
    logits: torch.Tensor, chosen: torch.Tensor, kept: torch.Tensor, *, top_k: int, score_function: str = "softmax"
) -> RoutingSums:
    """The sums of one call of a router, on its device, without waiting for it.

    logits [tokens, experts]; chosen, kept [tokens, experts] bool: the experts of each token, before and after dropping.
    """
    logits = logits.float()
    distribution = routing_distribution(logits, top_k, score_function)
    counts = chosen.sum(0, dtype=torch.float64)
    # Filled on the device: a tensor made from a number of the host would be waited for.
    tokens = counts.new_full((), len(logits))
    entropy = torch.special.entr(distribution).sum(dtype=torch.float64)
    squares = logits.logsumexp(-1).square().sum(dtype=torch.float64)
    probabilities = distribution.sum(0, dtype=torch.float64)
    scalars = torch.stack([tokens, entropy, squares])
    return RoutingSums(torch.cat([counts, kept.sum(0, dtype=torch.float64), probabilities, scalars]), logits.max())


def routing_distribution(logits: torch.Tensor, top_k: int, score_function: str) -> torch.Tensor:
    """Each token's distribution over all experts, [tokens, experts] float32: what the load-balancing loss takes.

    Softmax of the logits, or their scores over the sum of these. Source: Megatron-Core's
    `compute_routing_scores_for_aux_loss`.
    """
    if score_function == "softmax":
        return logits.softmax(-1)
    if score_function == "sigmoid":
        scores = logits.sigmoid()
        return scores / scores.sum(-1, keepdim=True)
    normalised: torch.Tensor = compute_routing_scores_for_aux_loss(logits, top_k, score_function)[1]
    return normalised


def routing_figures(sums: RoutingSums) -> dict[str, float]:
    """The figures of `load_figures`, and balance_loss, token_entropy, mean_entropy, max_logit, z_loss, dropped.

    balance_loss: E sum f_e P_e, f the share of assignments and P the mean distribution; 1 is even (arXiv:2101.03961).
    token_entropy: mean entropy of a token's distribution; mean_entropy: that of the mean distribution; both over
    ln E. z_loss: mean squared logsumexp of the logits (arXiv:2202.08906). dropped: the share of assignments that were
    dropped for lack of capacity; all others are of what was chosen before that.
    """
    counts = sums.counts
    tokens, entropy, squares = sums.scalars.tolist()
    assigned = counts.sum().item()
    mean = sums.probabilities / tokens
    largest_entropy = math.log(sums.num_experts) or 1.0
    return {
        **load_figures(counts),
        "balance_loss": sums.num_experts * (counts / assigned * mean).sum().item(),
        "token_entropy": entropy / tokens / largest_entropy,
        "mean_entropy": torch.special.entr(mean).sum().item() / largest_entropy,
        "max_logit": sums.max_logit.item(),
        "z_loss": squares / tokens,
        "dropped": 1.0 - sums.kept.sum().item() / assigned,
    }


def relative_load(counts: torch.Tensor) -> torch.Tensor:
    """Each expert's assignments in multiples of their mean, [experts]: 1 is even, 0 is an expert without tokens."""
    return counts / counts.mean()


def load_figures(counts: torch.Tensor) -> dict[str, float]:
    """load_min, load_max, load_std, load_p50, load_p75, load_p95 of `relative_load`, and max_vio.

    max_vio: largest load over mean load, less 1; 0 is even (arXiv:2408.15664). Percentiles are interpolated.
    """
    load = relative_load(counts)
    quantiles = torch.quantile(load, load.new_tensor(_QUANTILES)).tolist()
    return {
        "load_min": load.min().item(),
        "load_max": load.max().item(),
        "load_std": load.std(correction=0).item(),
        **{f"load_p{100 * at:.0f}": value for at, value in zip(_QUANTILES, quantiles, strict=True)},
        "max_vio": load.max().item() - 1.0,
    }
