"""Brings the pieces of blocks that ranks hold together on one rank each, and takes the results back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from megatron_tied.engine.blocks import Block


@dataclass(frozen=True)
class Run:
    """Elements `start` to `start + numel` of a flattened parameter, which lie at `offset` in a rank's flat tensor."""

    parameter: str
    start: int
    numel: int
    offset: int


@dataclass(frozen=True)
class Piece:
    """`numel` elements of block number `block`, from `in_block` on, at `offset` in the flat tensor of rank `rank`."""

    block: int
    rank: int
    in_block: int
    numel: int
    offset: int


class BlockExchange:
    """Where each block's pieces are among the ranks of a group, and which rank works on it.

    That is a rank with the largest piece, so that few elements travel; of several, they take turns.
    """

    def __init__(
        self, blocks: Sequence[Block], runs: Sequence[Sequence[Run]], group: torch.distributed.ProcessGroup, rank: int
    ):
        """`runs`: of each rank of `group`, whose number `rank` is this one."""
        self.blocks, self._group, self._rank, self._size = blocks, group, rank, len(runs)
        self._pieces = [_pieces(index, block, runs) for index, block in enumerate(blocks)]
        self._owners = [_owner(index, pieces) for index, pieces in enumerate(self._pieces)]

    @cached_property
    def owned(self) -> list[int]:
        """The numbers of the blocks that this rank works on."""
        return [index for index, owner in enumerate(self._owners) if owner == self._rank]

    def to_owners(self, flat: torch.Tensor) -> dict[int, torch.Tensor]:
        """This rank's `flat` tensor gives the blocks [rows, columns] that this rank works on. A collective."""
        received = self._travel(flat, [[p for p in self._mine if self._owners[p.block] == to] for to in self._ranks])
        found = {index: flat.new_empty(self.blocks[index].numel) for index in self.owned}
        for sender, values in zip(self._ranks, received, strict=True):
            theirs = [p for index in self.owned for p in self._pieces[index] if p.rank == sender]
            for piece, part in zip(theirs, values.split([p.numel for p in theirs]), strict=True):
                found[piece.block][piece.in_block : piece.in_block + piece.numel] = part
        return {index: value.view(self.blocks[index].rows, -1) for index, value in found.items()}

    def to_holders(self, results: dict[int, torch.Tensor], flat: torch.Tensor) -> None:
        """Write this rank's pieces of all `results`, which owners have, into `flat`, of their dtype. A collective."""
        send = [
            [
                results[p.block].view(-1)[p.in_block : p.in_block + p.numel]
                for index in self.owned
                for p in self._pieces[index]
                if p.rank == to
            ]
            for to in self._ranks
        ]
        expected = [[p for p in self._mine if self._owners[p.block] == owner] for owner in self._ranks]
        received = self._all_to_all(send, [sum(p.numel for p in pieces) for pieces in expected], flat)
        for pieces, values in zip(expected, received, strict=True):
            for piece, part in zip(pieces, values.split([p.numel for p in pieces]), strict=True):
                flat[piece.offset : piece.offset + piece.numel] = part

    @property
    def _ranks(self) -> range:
        return range(self._size)

    @cached_property
    def _mine(self) -> list[Piece]:
        return [piece for pieces in self._pieces for piece in pieces if piece.rank == self._rank]

    def _travel(self, flat: torch.Tensor, pieces: list[list[Piece]]) -> list[torch.Tensor]:
        send = [[flat[p.offset : p.offset + p.numel] for p in of_rank] for of_rank in pieces]
        sizes = [
            sum(p.numel for index in self.owned for p in self._pieces[index] if p.rank == sender)
            for sender in self._ranks
        ]
        return self._all_to_all(send, sizes, flat)

    def _all_to_all(
        self, send: list[list[torch.Tensor]], sizes: list[int], like: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        outgoing = [torch.cat([like.new_empty(0), *tensors]) for tensors in send]
        if self._size == 1:
            return (outgoing[0],)
        incoming = like.new_empty(sum(sizes))
        torch.distributed.all_to_all_single(
            incoming, torch.cat(outgoing), sizes, [len(part) for part in outgoing], group=self._group
        )
        return incoming.split(sizes)


def _pieces(index: int, block: Block, runs: Sequence[Sequence[Run]]) -> list[Piece]:
    found = []
    for rank, of_rank in enumerate(runs):
        for run in of_rank:
            if run.parameter != block.parameter:
                continue
            first, last = max(run.start, block.start), min(run.start + run.numel, block.start + block.numel)
            if first < last:
                found.append(Piece(index, rank, first - block.start, last - first, run.offset + first - run.start))
    return found


def _owner(index: int, pieces: Sequence[Piece]) -> int:
    largest = max(piece.numel for piece in pieces)
    equal = [piece.rank for piece in pieces if piece.numel == largest]
    return equal[index % len(equal)]
