"""Megatron-Core's all-to-all dispatcher without the copies that change nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher, MoETokenDispatcher


class AllToAllDispatcher(MoEAlltoAllTokenDispatcher):
    """As upstream, but that a rank which has all experts does not sort by expert what it has just sorted so."""

    num_local_experts: int

    @classmethod
    def adopt(cls, dispatcher: MoETokenDispatcher) -> None:
        """Make upstream's all-to-all dispatcher one of these, in place; any other stays as it is."""
        if type(dispatcher) is MoEAlltoAllTokenDispatcher:
            dispatcher.__class__ = cls

    def dispatch_postprocess(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        """See `MoEAlltoAllTokenDispatcher`."""
        with self._sorted_once():
            tokens_and_more: tuple[torch.Tensor, ...] = super().dispatch_postprocess(*args, **kwargs)
            return tokens_and_more

    def combine_preprocess(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """See `MoEAlltoAllTokenDispatcher`."""
        with self._sorted_once():
            tokens: torch.Tensor = super().combine_preprocess(*args, **kwargs)
            return tokens

    @contextmanager
    def _sorted_once(self) -> Iterator[None]:
        experts = self.num_local_experts
        if self.ep_size * self.tp_size == 1:
            # Of a single expert there is nothing to sort, and that is all that these methods ask of the number.
            self.num_local_experts = 1
        try:
            yield
        finally:
            self.num_local_experts = experts
