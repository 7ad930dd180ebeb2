"""Weight gradients of grouped linear layers: of one use site, added to those of others, or of all use sites at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from megatron_tied.layers.grouped_product import BLOCK, needs_few_shapes


class Site(NamedTuple):
    """What one use site of a weight [experts, out, in] gives to its gradient, tokens sorted by expert.

    inputs: [tokens, in], output_gradients: [tokens, out], offsets: [experts] int32, the end of each expert's tokens.
    """

    inputs: torch.Tensor
    output_gradients: torch.Tensor
    offsets: torch.Tensor

    @property
    def tokens_per_expert(self) -> float:
        """Their mean."""
        return len(self.inputs) / len(self.offsets)


def gradient_of(site: Site) -> torch.Tensor:
    """The site's part of the weight's gradient [experts, out, in]."""
    if needs_few_shapes(site.inputs):
        return _in_few_shapes([site])
    return torch.nn.functional.grouped_mm(site.output_gradients.t(), site.inputs, offs=site.offsets)


def add_gradient_of(site: Site, total: torch.Tensor) -> None:
    """Add the site's part to `total` [experts, out, in]."""
    if total.is_cuda:
        # No grouped product adds to what is there.
        total.add_(gradient_of(site))
        return
    if needs_few_shapes(total):
        _in_few_shapes([site], total)
        return
    for part, (inputs, output_gradients) in zip(total, _by_expert(site), strict=True):
        part.addmm_(output_gradients.t(), inputs)


def gradient_of_all(sites: Sequence[Site]) -> torch.Tensor:
    """The sum of all sites' parts [experts, out, in], which is written once."""
    if len(sites) == 1:
        return gradient_of(sites[0])
    if sites[0].inputs.is_cuda:
        return gradient_of(concatenated(sites))
    if needs_few_shapes(sites[0].inputs):
        return _in_few_shapes(sites)
    total = _empty_gradient(sites[0])
    for part, *uses in zip(total, *map(_by_expert, sites), strict=True):
        # One expert's part stays in the processor's cache while all sites add to it.
        (inputs, output_gradients), *others = uses
        torch.mm(output_gradients.t(), inputs, out=part)
        for inputs, output_gradients in others:
            part.addmm_(output_gradients.t(), inputs)
    return total


def _in_few_shapes(sites: Sequence[Site], total: torch.Tensor | None = None) -> torch.Tensor:
    """The sum of all sites' parts, added to `total` if there is one; an expert's tokens are filled up with zeros."""
    into = _empty_gradient(sites[0]) if total is None else total
    for part, *uses in zip(into, *map(_by_expert, sites), strict=True):
        missing = -sum(len(inputs) for inputs, _ in uses) % BLOCK
        inputs, output_gradients = (
            torch.cat([*tensors, tensors[0].new_zeros(missing, tensors[0].shape[1])])
            for tensors in zip(*uses, strict=True)
        )
        if total is None:
            torch.mm(output_gradients.t(), inputs, out=part)
        elif len(inputs):
            part.addmm_(output_gradients.t(), inputs)
    return into


def _empty_gradient(site: Site) -> torch.Tensor:
    return site.inputs.new_empty(len(site.offsets), site.output_gradients.shape[1], site.inputs.shape[1])


def concatenated(sites: Sequence[Site]) -> Site:
    """One site with the tokens of all, sorted by expert; the host does not wait for the device."""
    ends = torch.stack([site.offsets for site in sites]).long()
    counts = ends.diff(dim=1, prepend=ends.new_zeros(len(sites), 1))
    all_ends = ends.sum(0)
    # Where the first token of each site and expert goes: behind those of lesser experts, and of this one from earlier
    # sites.
    firsts = (all_ends - counts.sum(0)) + counts.cumsum(0) - counts
    total = sum(len(site.inputs) for site in sites)
    inputs, output_gradients = (tensor.new_empty(total, tensor.shape[1]) for tensor in sites[0][:2])
    for site, first, end, count in zip(sites, firsts, ends, counts, strict=True):
        places = torch.arange(len(site.inputs), device=end.device)
        experts = torch.searchsorted(end, places, right=True)
        places += (first - (end - count))[experts]
        inputs.index_copy_(0, places, site.inputs)
        output_gradients.index_copy_(0, places, site.output_gradients)
    return Site(inputs, output_gradients, all_ends.to(torch.int32))


def _by_expert(site: Site) -> zip[tuple[torch.Tensor, torch.Tensor]]:
    sizes = site.offsets.diff(prepend=site.offsets.new_zeros(1)).tolist()
    return zip(torch.split(site.inputs, sizes), torch.split(site.output_gradients, sizes), strict=True)
