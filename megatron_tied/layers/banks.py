"""Ownership of what layers share: who holds the weights, who uses them, and that they stay one."""

from __future__ import annotations

from functools import partial

import torch

from megatron_tied.layers.accumulation import MarkUseSite, UseSites
from megatron_tied.layers.grouped_experts import GroupedExperts
from megatron_tied.topology import Bank, TieTopology

# Transformer Engine has a layer's input norm in the projection behind it: it stays the layer's own.
_INPUT_NORM = ("linear_qkv.layer_norm_weight", "linear_qkv.layer_norm_bias")


class ExpertBanks:
    """The expert banks of one model chunk while it is built: `attach` makes a layer the owner or a follower.

    The layers of a tie group have separate expert modules that hold the SAME Parameters. Separate modules,
    because DeepSpeed's ZeRO 3 releases a module's weights after its own backward: a shared module would keep a
    bank gathered from its first use to the end of the pass. The Parameters are listed and optimised once, under
    the owner, since PyTorch lists a repeated Parameter under its first name; a `state_dict` names them in every layer.
    In a pipeline, the first layer of a bank that a chunk holds is the owner there. Other parts of a layer are shared
    in the same way.
    """

    def __init__(self, topology: TieTopology):
        self.topology = topology
        self._owners: dict[tuple[int, str], tuple[int, torch.nn.Module]] = {}
        self._sites: dict[tuple[int, str], UseSites] = {}

    def attach(self, layer: int, module: torch.nn.Module, part: str = "experts") -> torch.nn.Module:
        """Give `module`, the `part` of `layer`, its bank's Parameters; returns the owner's, itself for an owner."""
        bank = self.topology.bank(layer)
        key = bank.index, part
        # The owner again: another model is built from the same spec, with banks of its own.
        if key not in self._owners or layer <= self._owners[key][0]:
            self._owners[key] = layer, module
            self._sites[key] = UseSites()
        owner = self._owners[key][1]
        tie(module, owner)
        if isinstance(module, GroupedExperts) and isinstance(owner, GroupedExperts):
            module.share_gradients_of(owner)
            for shared in module.shared_gradients().values():
                shared.use_sites += 1
                shared.fuses = partial(self.topology.fuses_weight_gradient, bank)
        else:
            self._sites[key].use_sites += 1
            module.register_forward_hook(MarkUseSite(self._sites[key]))
        return owner


def tie(module: torch.nn.Module, owner: torch.nn.Module) -> None:
    """Make every Parameter of `module` the one of the same name in `owner`."""
    if module is owner:
        return
    for (path, follower), source in zip(module.named_modules(), owner.modules(), strict=True):
        for name, parameter in source._parameters.items():
            if f"{path}.{name}" not in _INPUT_NORM:
                follower._parameters[name] = parameter


def is_tied(module: torch.nn.Module, owner: torch.nn.Module) -> bool:
    """True when every Parameter of `module` is the owner's."""
    pairs = zip(module.named_parameters(), owner.parameters(), strict=True)
    return all(own is shared or name in _INPUT_NORM for (name, own), shared in pairs)


def leave_gradients_to_autograd(module: torch.nn.Module) -> None:
    """Hand on each use site's gradient as it comes, to an engine that adds up what reaches a weight more than once."""
    if isinstance(module, GroupedExperts):
        for shared in module.shared_gradients().values():
            shared.use_sites = 1
    for key, hook in list(module._forward_hooks.items()):
        if isinstance(hook, MarkUseSite):
            del module._forward_hooks[key]


def gradient_sites(module: torch.nn.Module) -> dict[UseSites, list[torch.nn.Parameter]]:
    """What counts the use sites of an owner's weights in backward, each with the weights it stands for."""
    if isinstance(module, GroupedExperts):
        return {shared: [weight] for weight, shared in module.shared_gradients().items()}
    marks = [hook for hook in module._forward_hooks.values() if isinstance(hook, MarkUseSite)]
    return {mark.sites: list(module.parameters()) for mark in marks}


def describe(bank: Bank) -> str:
    """How a bank is named in messages, such as `expert bank 2 (layers 2, 3, 4, 5)`."""
    return f"expert bank {bank.index} (layer{'s' if bank.is_tied else ''} {', '.join(map(str, bank.layers))})"
