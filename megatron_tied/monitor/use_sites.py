"""Do the layers of a tie group pull their bank the same way? The gradients of its use sites, compared."""

from __future__ import annotations

import math
from functools import partial

import torch
from megatron.core import parallel_state

from megatron_tied.layers.accumulation import SharedGradient
from megatron_tied.layers.banks import gradient_sites
from megatron_tied.layers.moe_layer import tied_layers

# Of every weight of a bank, on every rank: enough for a cosine to 0.002, at 1 MB a use site.
_SAMPLE = 2**18


class UseSiteGradients:
    """Between `begin` and `take`, collects what each layer of a tie group adds to its bank's gradient.

    Of each weight a sample of evenly spread elements (all of a small one), summed over micro-batches. Only experts
    whose gradients are summed by `SharedGradient` (`model.expert_backend: grouped`) can tell them apart.
    """

    def __init__(self, model: torch.nn.Module):
        self._sites: dict[int, list[SharedGradient]] = {}
        for layer in tied_layers(model):
            if layer.is_owner and layer.bank.is_tied:
                sites = [site for site in gradient_sites(layer.experts) if isinstance(site, SharedGradient)]
                if sites:
                    self._sites[layer.bank.index] = sites
        self._samples: dict[SharedGradient, torch.Tensor] = {}
        self._shares: dict[SharedGradient, float] = {}

    def begin(self) -> None:
        """Collect from the next backward pass on."""
        self._samples = {}
        for sites in self._sites.values():
            for site in sites:
                site.on_add = partial(self._add, site)

    def _add(self, site: SharedGradient, arrived: int, gradient: torch.Tensor) -> None:
        sample = _sample(gradient)
        self._shares[site] = sample.numel() / gradient.numel()
        if site not in self._samples:
            self._samples[site] = sample.new_zeros(site.use_sites, sample.numel(), dtype=torch.float32)
        self._samples[site][arrived] += sample

    @torch.no_grad()
    def take(self) -> dict[int, torch.Tensor]:
        """By tied bank, the inner products of its layers' gradients of the global batch, [g, g] float64; a collective.

        Layers are in order. The same on every rank.
        """
        products = {}
        for bank, sites in self._sites.items():
            product = torch.stack([self._product(site) for site in sites]).sum(0)
            torch.distributed.all_reduce(product, group=parallel_state.get_expert_model_parallel_group())
            products[bank] = product.cpu()
        self._samples = {}
        return products

    def _product(self, site: SharedGradient) -> torch.Tensor:
        site.on_add = None
        # Backward reaches the last layer first.
        gradients = self._samples[site].flip(0)
        torch.distributed.all_reduce(gradients, group=parallel_state.get_expert_data_parallel_group())
        gradients = gradients.double()
        # What a sample stands for: of a larger weight it is a smaller share.
        return gradients @ gradients.t() / self._shares[site]


def gradient_agreement(products: torch.Tensor) -> dict[str, float]:
    """gradient_cosine and gradient_cosine_min over pairs of use sites, and gradient_cancellation.

    products: inner products of their gradients, [g, g]. Cancellation is 1 - |sum g| / sum |g|: 0 where all pull one
    way, 1 where nothing is left of them.
    """
    norms = products.diagonal().clamp(min=0).sqrt()
    first, second = torch.triu_indices(len(products), len(products), 1)
    cosines = (products / torch.outer(norms, norms))[first, second]
    total = math.sqrt(max(0.0, products.sum().item()))
    return {
        "gradient_cosine": cosines.mean().item(),
        "gradient_cosine_min": cosines.min().item(),
        "gradient_cancellation": 1.0 - total / norms.sum().item() if norms.any() else math.nan,
    }


def _sample(gradient: torch.Tensor) -> torch.Tensor:
    stride = -(-gradient.numel() // _SAMPLE)
    # With a common divisor some columns would never be seen.
    while math.gcd(stride, gradient.shape[-1]) > 1:
        stride += 1
    return gradient.reshape(-1)[::stride]
