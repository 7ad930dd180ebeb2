"""Brings the pieces of blocks that ranks hold together on one rank each, and takes the results back."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_tied.engine.blocks import Block


@dataclass(frozen=True)
class Run:
    """Elements `start` to `start + numel` of a flattened parameter, which lie at `offset` in a rank's flat tensor."""

    parameter: str
    start: int
    numel: int
    offset: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The elements, a view of that tensor."""
        return flat.narrow(0, self.offset, self.numel)


@dataclass(frozen=True)
class Piece:
    """`numel` elements of block number `block`, from `in_block` on, at `offset` in the flat tensor of rank `rank`."""

    block: int
    rank: int
    in_block: int
    numel: int
    offset: int

    @property
    def here(self) -> slice:
        """Where it is in that tensor."""
        return slice(self.offset, self.offset + self.numel)


@dataclass(frozen=True)
class Portion:
    """Blocks that travel together, as one rank sees them.

    worked: the numbers of those that it works on. theirs: the pieces of these, by the rank that has them. ours: the
    pieces that it has, by the rank that works on them. All ranks have them in one order.
    """

    worked: list[int]
    theirs: list[list[Piece]]
    ours: list[list[Piece]]


class BlockExchange:
    """Where each block's pieces are among the ranks of a group, and which rank works on it.

    That is a rank with the largest piece, so that few elements travel; of several, they take turns. `portions` are
    so small that no rank works on many more than `most` elements at once.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        runs: Sequence[Sequence[Run]],
        group: torch.distributed.ProcessGroup | None,
        rank: int,
        device: torch.device,
        most: int,
    ):
        """`runs`: of each rank of `group`, whose number `rank` is this one; what travels is on `device`."""
        self.blocks, self._group, self._device, self._is_alone = blocks, group, device, len(runs) == 1
        pieces = [_pieces(index, block, runs) for index, block in enumerate(blocks)]
        owners = [_owner(index, of_block) for index, of_block in enumerate(pieces)]
        self.portions = [_portion(indices, pieces, owners, rank, len(runs)) for indices in _cut(blocks, owners, most)]

    def to_owners(self, portion: Portion, read: Callable[[slice], torch.Tensor]) -> dict[int, torch.Tensor]:
        """The blocks [rows, columns] of a portion that this rank works on. A collective.

        `read` gives elements of this rank's flat tensor.
        """
        send = [[read(p.here) for p in pieces] for pieces in portion.ours]
        received = self._all_to_all(send, portion.theirs, read(slice(0, 0)))
        found = {index: received[0].new_empty(self.blocks[index].numel) for index in portion.worked}
        for piece, part in _taken_apart(portion.theirs, received):
            found[piece.block][piece.in_block : piece.in_block + piece.numel] = part
        return {index: value.view(self.blocks[index].rows, -1) for index, value in found.items()}

    def to_holders(
        self, portion: Portion, results: dict[int, torch.Tensor], write: Callable[[slice, torch.Tensor], None]
    ) -> None:
        """Have `write` put this rank's pieces of a portion's `results`, float32, where they belong. A collective."""
        flat = {index: result.view(-1) for index, result in results.items()}
        send = [[flat[p.block][p.in_block : p.in_block + p.numel] for p in pieces] for pieces in portion.theirs]
        received = self._all_to_all(send, portion.ours, torch.empty(0, device=self._device))
        for piece, part in _taken_apart(portion.ours, received):
            write(piece.here, part)

    def _all_to_all(
        self, send: list[list[torch.Tensor]], expected: list[list[Piece]], empty: torch.Tensor
    ) -> Sequence[torch.Tensor]:
        outgoing = [torch.cat([empty, *tensors]) for tensors in send]
        if self._is_alone:
            return outgoing
        sizes = [sum(p.numel for p in pieces) for pieces in expected]
        incoming = empty.new_empty(sum(sizes))
        torch.distributed.all_to_all_single(
            incoming, torch.cat(outgoing), sizes, [len(part) for part in outgoing], group=self._group
        )
        return torch.split(incoming, sizes)


def _taken_apart(
    expected: Sequence[Sequence[Piece]], received: Sequence[torch.Tensor]
) -> Iterator[tuple[Piece, torch.Tensor]]:
    for pieces, values in zip(expected, received, strict=True):
        yield from zip(pieces, torch.split(values, [p.numel for p in pieces]), strict=True)


def _cut(blocks: Sequence[Block], owners: Sequence[int], most: int) -> Iterator[list[int]]:
    worked: Counter[int] = Counter()
    portions: defaultdict[int, list[int]] = defaultdict(list)
    for index, (block, owner) in enumerate(zip(blocks, owners, strict=True)):
        portions[worked[owner] // most].append(index)
        worked[owner] += block.numel
    yield from (portions[number] for number in sorted(portions))


def _portion(
    indices: Sequence[int], pieces: Sequence[Sequence[Piece]], owners: Sequence[int], rank: int, ranks: int
) -> Portion:
    worked = [index for index in indices if owners[index] == rank]
    theirs: list[list[Piece]] = [[] for _ in range(ranks)]
    ours: list[list[Piece]] = [[] for _ in range(ranks)]
    for index in indices:
        for piece in pieces[index]:
            if owners[index] == rank:
                theirs[piece.rank].append(piece)
            if piece.rank == rank:
                ours[owners[index]].append(piece)
    return Portion(worked, theirs, ours)


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
