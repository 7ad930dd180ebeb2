"""One gradient per bank weight, collected over its use sites and handed on once.

Autograd sums over the uses of a shared weight only when all of them are in one graph. Reentrant recompute cuts
the graph at every layer, so that the weight's gradient hook fires once per use site and an engine that reduces
on the hook reduces parts, or loses them without any error. Here each use site adds to a buffer, and the last
one of a backward pass returns the sum; the others return None and say that the gradient is not ready.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_tied.layers.grouped_product import grouped_product
from megatron_tied.layers.weight_gradient import Site, add_gradient_of, gradient_of, gradient_of_all


class UseSites:
    """Counts, in every backward pass, the layers that have reached a weight which `use_sites` layers use once each.

    `on_change(ready)` is called at each of them: False while others are missing, True at the last one. An engine
    that acts on gradient hooks sets it to learn which firing counts.
    """

    def __init__(self) -> None:
        self.use_sites = 0
        self.on_change: Callable[[bool], None] | None = None
        self._arrived = 0

    @property
    def is_complete(self) -> bool:
        """True when no backward pass has reached some use sites and left others out."""
        return self._arrived == 0

    @property
    def arrived(self) -> int:
        """How many use sites the running backward pass has reached."""
        return self._arrived

    def arrive(self) -> bool:
        """One use site is reached; returns whether it is the last."""
        self._arrived += 1
        ready = self._arrived == self.use_sites
        if self.on_change is not None:
            self.on_change(ready)
        if ready:
            self._arrived = 0
        return ready

    def reset(self) -> None:
        """Forget what an aborted backward pass left behind."""
        self._arrived = 0


class SharedGradient(UseSites):
    """The gradient of one weight, summed over its use sites here rather than by autograd.

    A use site for whose tokens per expert `fuses` says True is kept for the last one, and is then multiplied together
    with the others. `on_add(arrived, gradient)` is called, if set, with how many came before and each use site's part,
    which it must not keep: the others are added to it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fuses: Callable[[float], bool] = lambda tokens_per_expert: False
        self.on_add: Callable[[int, torch.Tensor], None] | None = None
        self._sum: torch.Tensor | None = None
        self._kept: list[Site] = []

    def add(self, site: Site) -> torch.Tensor | None:
        """Add what one use site gives; returns the whole gradient, of the weight's shape, at the last one, else None.

        The tensors of `site` must not change until then.
        """
        part = None
        if self.on_add is not None:
            part = gradient_of(site)
            self.on_add(self.arrived, part)
        if self.fuses(site.tokens_per_expert):
            self._kept.append(site)
        elif part is not None:
            self._sum = part if self._sum is None else self._sum.add_(part)
        elif self._sum is None:
            self._sum = gradient_of(site)
        else:
            add_gradient_of(site, self._sum)
        return self._take() if self.arrive() else None

    def _take(self) -> torch.Tensor:
        total, kept = self._sum, self._kept
        self._sum, self._kept = None, []
        if total is None:
            return gradient_of_all(kept)
        return total.add_(gradient_of_all(kept)) if kept else total

    def reset(self) -> None:
        """Forget what an aborted backward pass left behind."""
        super().reset()
        self._sum, self._kept = None, []


class MarkUseSite:
    """A forward hook for expert modules that leave the summing to autograd: counts their use sites in backward.

    It sits at the module's output, so that a use site arrives before its weights' gradient hooks fire: whichever
    way the graph is cut, the firing after the last arrival is the one with the whole sum in `.grad`.
    """

    def __init__(self, sites: UseSites):
        self.sites = sites

    def __call__(
        self, module: torch.nn.Module, inputs: tuple[object, ...], output: tuple[torch.Tensor, torch.Tensor | None]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The module's output, its first tensor [tokens, hidden] marked."""
        marked: torch.Tensor = _Mark.apply(output[0], self.sites)  # type: ignore[no-untyped-call]  # torch leaves apply without types
        return marked, output[1]


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, sites: UseSites) -> torch.Tensor:
        ctx.sites = sites
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.sites.arrive()
        return gradient, None


def grouped_linear(
    x: torch.Tensor, weight: torch.nn.Parameter, offsets: torch.Tensor, shared: SharedGradient
) -> torch.Tensor:
    """y_t = W_e(t) x_t for tokens sorted by expert, with the weight gradient collected over use sites.

    x [tokens, in], weight [experts, out, in], offsets [experts] int32: the end of each expert's run of tokens.
    Returns [tokens, out]. An expert, or the whole call, may have no tokens.
    """
    y: torch.Tensor = _GroupedLinear.apply(x, weight, offsets, shared)  # type: ignore[no-untyped-call]  # torch leaves apply without types
    return y


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.nn.Parameter, offsets: torch.Tensor, shared: SharedGradient
    ) -> torch.Tensor:
        # The Parameter itself is saved: under ZeRO 3 its storage is released after forward and gathered again
        # before backward, and a view of it would keep the gathered storage alive in between.
        ctx.save_for_backward(x, weight, offsets)
        ctx.shared = shared
        return grouped_product(x, weight.transpose(1, 2), offsets)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        x, weight, offsets = ctx.saved_tensors
        dy = dy.contiguous()
        dx = grouped_product(dy, weight, offsets) if ctx.needs_input_grad[0] else None
        dw = None
        if ctx.needs_input_grad[1]:
            dw = ctx.shared.add(Site(x, dy, offsets))
        return dx, dw, None, None
