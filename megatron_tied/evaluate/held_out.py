"""The mean loss per token on held-out domains; ranks share the windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from tqdm import tqdm

from megatron_tied.engine.groups import initialize_model_parallel
from megatron_tied.evaluate.domains import Domain
from megatron_tied.inference.loading import TrainedModel, load_model
from megatron_tied.inference.processes import one_process
from megatron_tied.platform import device
from megatron_tied.training.evaluation import Inputs
from megatron_tied.training.startup import join_processes


@dataclass(frozen=True)
class HeldOutLoss:
    """The mean cross entropy over `tokens` predicted tokens, in nats."""

    tokens: int
    loss: float

    @property
    def perplexity(self) -> float:
        """exp(loss)"""
        return math.exp(self.loss)


def held_out_losses(
    found: TrainedModel,
    domains: list[Domain],
    *,
    seq_length: int,
    micro_batch_size: int,
    is_launched: bool,
    expert_model_parallel_size: int,
) -> list[HeldOutLoss]:
    """Load the model and give its loss on each domain, on every rank alike; a collective of what was launched."""
    with _ranks(expert_model_parallel_size) if is_launched else one_process():
        model = load_model(found)
        windows = sum(domain.windows(seq_length) for domain in domains)
        is_first = torch.distributed.get_rank() == 0
        with tqdm(total=windows, desc="evaluating", unit="sequence", disable=None if is_first else True) as bar:
            losses = []
            for domain in domains:
                bar.set_postfix_str(domain.name)
                losses.append(_held_out_loss(model, domain, seq_length, micro_batch_size, bar.update))
        return losses


@contextmanager
def _ranks(expert_model_parallel_size: int) -> Iterator[None]:
    join_processes()
    try:
        initialize_model_parallel(expert_model_parallel_size)
        yield
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


@torch.no_grad()
def _held_out_loss(
    model: torch.nn.Module,
    domain: Domain,
    seq_length: int,
    micro_batch_size: int,
    advance: Callable[[int], object],
) -> HeldOutLoss:
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    windows = domain.windows(seq_length)
    micro_batch_size = min(micro_batch_size, -(-windows // ranks))
    together = micro_batch_size * ranks
    total = torch.zeros(2, dtype=torch.float64, device=device())
    # As many on every rank, whose experts the others need, even where its windows lie beyond the end.
    for first in range(0, windows, together):
        given = domain.inputs(first + rank * micro_batch_size, micro_batch_size, seq_length)
        inputs = Inputs(*(tensor.to(device()) for tensor in given))
        losses = model(inputs.tokens, inputs.position_ids, None, labels=inputs.labels).double()
        total += torch.stack([(losses * inputs.loss_mask).sum(), inputs.loss_mask.sum().double()])
        advance(min(together, windows - first))
    torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group())
    summed, tokens = total.tolist()
    return HeldOutLoss(round(tokens), summed / tokens)
