"""Where the matrices of an engine's parameters are, in the flat tensors of all ranks."""

from __future__ import annotations

from dataclasses import astuple

import torch

from megatron_tied.engine.blocks import blocks_of, is_hidden_matrix
from megatron_tied.engine.engine import TiedMoEEngine
from megatron_tied.engine.exchange_blocks import BlockExchange, Run
from megatron_tied.engine.holdings import holdings
from megatron_tied.engine.muon import MuonAdamW
from megatron_tied.engine.partitions import runs
from megatron_tied.exchange import gather_json

# Elements that a rank works on at once, for which some 12 bytes each are taken meanwhile.
MOST = 1 << 24


def locate_matrices(engine: TiedMoEEngine, optimizer: MuonAdamW) -> None:
    """Tell `optimizer`, the inner one of `engine`, where the parts of matrices are."""
    known: dict[int, BlockExchange] = {}

    def locate(holder: torch.Tensor) -> BlockExchange:
        # By address: holders live as long as the engine.
        if id(holder) not in known:
            known[id(holder)] = _exchange(engine, holder)
        return known[id(holder)]

    optimizer.locate, optimizer.device = locate, engine.device


def _exchange(engine: TiedMoEEngine, holder: torch.Tensor) -> BlockExchange:
    """A collective of the ranks that share the parameters of `holder`, once for each."""
    here = [run for run, flat in runs(engine) if flat is holder]
    group = holdings(engine).spread_over(holder)
    everywhere, rank = [here], 0
    if group is not None and group.size() > 1:
        everywhere = [[Run(*run) for run in of_rank] for of_rank in gather_json(list(map(astuple, here)), group)]
        rank = group.rank()
    held = {run.parameter for of_rank in everywhere for run in of_rank}
    blocks = [
        block
        for name, parameter in engine.module.named_parameters()
        if name in held and is_hidden_matrix(name, parameter)
        for block in blocks_of(name, getattr(parameter, "ds_shape", parameter.shape), engine.module.config)
    ]
    return BlockExchange(blocks, everywhere, group, rank, engine.device, MOST)
