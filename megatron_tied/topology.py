"""Which MoE layer uses which expert bank. Pure Python, and the one module every room may import.

Layers are numbered from 0. Dense layers in between have no bank and are not counted: the prelude is the
first `skip_first` *MoE* layers, the coda the last `skip_last`, and the middle is what lies between them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

from megatron_tied.errors import ConfigError, Problem

# From so many tokens per expert and layer on, the products of a weight gradient take so long that reading and writing
# it once, in place of once per layer, saves nothing (examples/benchmarks/weight_gradient.md).
FUSED_BELOW = 256

_SHARED = {"experts_attention": "experts, attention", "all": "experts, attention, router"}


def _is_int(value: object, minimum: float = -math.inf) -> bool:
    # bool is an int to Python, but `group_size: yes` in a config file is a mistake.
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


@dataclass(frozen=True)
class TieConfig:
    """What the user says about tying: the `tie` section of a config file."""

    # Read by pydantic when this class is a field of one of its models; means nothing otherwise.
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "use_attribute_docstrings": True}

    group_size: int = 1
    """MoE layers per tie group; 1 ties nothing."""
    skip_first: int = 2
    """Untied MoE layers at the beginning (prelude); unused when nothing is tied."""
    skip_last: int = 2
    """Untied MoE layers at the end (coda); unused when nothing is tied."""
    pattern: Literal["consecutive", "cyclic"] = "consecutive"
    """consecutive cuts the middle into runs of `group_size` layers; cyclic cuts it into runs of `group_size *
    block_size` layers and, within a run, ties layers i and i + `block_size`."""
    block_size: int = 1
    """Of `pattern: cyclic`: how far apart the layers of a group are; with 1 they are neighbours, as in consecutive."""
    banks: Sequence[int] | None = None
    """An explicit map, one bank id (any integer) per MoE layer; overrides all fields above."""
    num_tied_experts: int | None = None
    """Experts of a tied bank and of its routers (width expansion); null: as untied layers. Where nothing is tied, of
    the middle layers: a narrow untied model, which may have as many parameters as a tied one."""
    lr_divisor: Literal["sqrt", "linear", "none"] | float = "sqrt"
    """What the learning rate of a tied bank, and of the matrices of a shared attention, is divided by: the square root
    of its number of layers (sqrt), that number itself (linear), 1 (none), or the number given."""
    weight_gradient: Literal["auto", "fused", "immediate"] = "auto"
    """immediate multiplies each layer's part of a tied bank's weight gradient when backward is there; fused keeps what
    goes into it until the owner's backward, and multiplies all of it at once, which reads and writes the gradient
    once; auto fuses where an expert gets fewer than 256 tokens a layer (`FUSED_BELOW`)."""
    pipeline: Literal["align", "allreduce"] = "align"
    """With pipeline stages (in Megatron-LM's scripts), align has every tie group lie inside one model chunk; allreduce
    keeps a copy of a bank in every chunk that uses it and sums their gradients."""
    share: Literal["experts", "experts_attention", "all"] = "experts"
    """What the layers of a tie group have in common: experts; experts_attention, attention with its query and key norms
    too; all, their router's weights as well. Layer norms, the losses and load that a router counts, and its expert bias
    are each layer's own. Source: the ablation of "Tying the Loop" (arXiv:2606.16825)."""

    def __post_init__(self) -> None:
        if isinstance(self.banks, list):  # as YAML and JSON give it; a tuple keeps the config hashable
            object.__setattr__(self, "banks", tuple(self.banks))

    def untied(self) -> TieConfig:
        """The same with a bank of its own, as wide as all others, for every layer."""
        return dataclasses.replace(self, group_size=1, banks=None, num_tied_experts=None, share="experts")

    def problems(self) -> list[Problem]:
        """Everything that is wrong for any model; `TieTopology.build` finds what does not fit a given one."""
        checks = (
            ("group_size", _is_int(self.group_size, 1), "must be an integer >= 1"),
            ("skip_first", _is_int(self.skip_first, 0), "must be an integer >= 0"),
            ("skip_last", _is_int(self.skip_last, 0), "must be an integer >= 0"),
            ("pattern", self.pattern in ("consecutive", "cyclic"), 'must be "consecutive" or "cyclic"'),
            (
                "block_size",
                _is_int(self.block_size, 1) and (self.block_size == 1 or self.pattern == "cyclic"),
                'must be an integer >= 1, and 1 unless tie.pattern is "cyclic"',
            ),
            (
                "banks",
                self.banks is None or (isinstance(self.banks, tuple) and all(map(_is_int, self.banks))),
                "must be a list of integers, one per MoE layer",
            ),
            (
                "num_tied_experts",
                self.num_tied_experts is None or _is_int(self.num_tied_experts, 1),
                "must be an integer >= 1, or null for as many as the untied layers have",
            ),
            (
                "lr_divisor",
                self.lr_divisor in ("sqrt", "linear", "none") or self._has_numeric_divisor(),
                'must be "sqrt", "linear", "none" or a number > 0',
            ),
            (
                "weight_gradient",
                self.weight_gradient in ("auto", "fused", "immediate"),
                'must be "auto", "fused" or "immediate"',
            ),
            ("pipeline", self.pipeline in ("align", "allreduce"), 'must be "align" or "allreduce"'),
            (
                "share",
                self.share in ("experts", "experts_attention", "all"),
                'must be "experts", "experts_attention" or "all"',
            ),
        )
        return [Problem(f"tie.{name}", getattr(self, name), valid) for name, ok, valid in checks if not ok]

    def _has_numeric_divisor(self) -> bool:
        divisor = self.lr_divisor
        return isinstance(divisor, (int, float)) and not isinstance(divisor, bool) and 0 < divisor < math.inf


def moe_layers(frequency: int | Sequence[int], num_layers: int) -> tuple[int, ...]:
    """The MoE layers, from 0: every `frequency`-th one starting with the first, or those marked 1."""
    if isinstance(frequency, int):
        return tuple(range(0, num_layers, frequency))
    return tuple(layer for layer, is_moe in enumerate(frequency) if is_moe)


@dataclass(frozen=True)
class Bank:
    """One expert bank: its place among the banks and the MoE layers that use it, in order."""

    index: int
    layers: tuple[int, ...]

    @property
    def owner(self) -> int:
        """The first layer, where the parameters are registered, checkpointed and optimised."""
        return self.layers[0]

    @property
    def size(self) -> int:
        """How many layers use the bank; shorter than `group_size` where the middle does not divide."""
        return len(self.layers)

    @property
    def is_tied(self) -> bool:
        """Whether more than one layer uses the bank."""
        return self.size > 1


@dataclass(frozen=True)
class TieTopology:
    """The map from layer to expert bank.

    bank_of_layer: one entry per layer, the index into `banks`, or None for a dense layer. Banks are numbered
        in the order of their owners.
    """

    tie: TieConfig
    bank_of_layer: tuple[int | None, ...]

    @classmethod
    def build(cls, tie: TieConfig, num_layers: int, moe_layers: Sequence[int] | None = None) -> TieTopology:
        """Lays out the banks of a model of `num_layers` layers, of which `moe_layers` (default: all) are MoE.

        Raises ConfigError for a tie section that is wrong in itself or does not fit these layers.
        """
        if not _is_int(num_layers, 1):
            raise ConfigError(Problem("model.num_layers", num_layers, "must be an integer >= 1"))
        moe = range(num_layers) if moe_layers is None else moe_layers
        if list(moe) != sorted(set(moe) & set(range(num_layers))):
            valid = f"must be layer numbers from 0 to {num_layers - 1}, each once and in order"
            raise ConfigError(Problem("moe_layers", list(moe), valid))
        if problems := tie.problems() or _misfits(tie, len(moe)):
            raise ConfigError(problems)

        keys = _pattern_keys(tie, len(moe)) if tie.banks is None else tie.banks
        index_of = {key: index for index, key in enumerate(dict.fromkeys(keys))}
        bank_of_layer: list[int | None] = [None] * num_layers
        for layer, key in zip(moe, keys, strict=True):
            bank_of_layer[layer] = index_of[key]
        return cls(tie, tuple(bank_of_layer))

    @cached_property
    def banks(self) -> tuple[Bank, ...]:
        """All banks, in the order of their owners."""
        layers: dict[int, list[int]] = {}
        for layer, bank in enumerate(self.bank_of_layer):
            if bank is not None:
                layers.setdefault(bank, []).append(layer)
        return tuple(Bank(index, tuple(users)) for index, users in layers.items())

    @property
    def num_layers(self) -> int:
        """How many layers the model has, dense ones included."""
        return len(self.bank_of_layer)

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers that use a bank."""
        return tuple(layer for layer, bank in enumerate(self.bank_of_layer) if bank is not None)

    @property
    def shares_more(self) -> bool:
        """Whether layers of some tie group have more in common than their routed experts."""
        return self.tie.share != "experts" and any(bank.is_tied for bank in self.banks)

    def bank(self, layer: int) -> Bank:
        """The bank that `layer` uses. Raises ValueError for a dense layer."""
        index = self.bank_of_layer[layer]
        if index is None:
            raise ValueError(f"layer {layer} is dense: it uses no expert bank")
        return self.banks[index]

    def is_owner(self, layer: int) -> bool:
        """Whether `layer` is the first that uses its bank; False for a dense layer."""
        return self.bank_of_layer[layer] is not None and self.bank(layer).owner == layer

    def lr_divisor(self, bank: Bank) -> float:
        """What the learning rate of `bank` is divided by; 1 for an untied bank, whatever the config says."""
        rule = self.tie.lr_divisor
        if not bank.is_tied or rule == "none":
            return 1.0
        if rule == "sqrt":
            return math.sqrt(bank.size)
        return float(bank.size if rule == "linear" else rule)

    def fuses_weight_gradient(self, bank: Bank, tokens_per_expert: float) -> bool:
        """Whether a layer of `bank` that sends so many tokens to an expert leaves its weight gradient to the owner."""
        how = self.tie.weight_gradient
        return bank.is_tied and (how == "fused" or (how == "auto" and tokens_per_expert < FUSED_BELOW))

    def num_experts(self, where: Bank | int, base: int) -> int:
        """The experts of a bank, or of the bank a layer uses, in a model with `base` experts per layer."""
        bank = where if isinstance(where, Bank) else self.bank(where)
        return self.tie.num_tied_experts if self.tie.num_tied_experts and self._has_tied_width(bank) else base

    def _has_tied_width(self, bank: Bank) -> bool:
        if self.tie.group_size > 1 or self.tie.banks is not None:
            return bank.is_tied
        return bank.index in range(self.tie.skip_first, len(self.banks) - self.tie.skip_last)

    def describe(self) -> str:
        """One line for people, tie groups in brackets: `8 layers: 0 1 [2 3 4 5] 6 7`."""
        names = (" ".join(map(str, bank.layers)) for bank in self.banks)
        groups = " ".join(f"[{name}]" if bank.is_tied else name for bank, name in zip(self.banks, names, strict=True))
        dense = [str(layer) for layer, bank in enumerate(self.bank_of_layer) if bank is None]
        line = f"{self.num_layers} layers: {groups}"
        if self.tie.num_tied_experts and any(map(self._has_tied_width, self.banks)):
            which = "tied" if any(bank.is_tied for bank in self.banks) else "middle"
            line += f"; experts of {which} banks: {self.tie.num_tied_experts}"
        if self.shares_more:
            line += f"; shared: {_SHARED[self.tie.share]}"
        return f"{line}; dense: {' '.join(dense)}" if dense else line

    def to_dict(self) -> dict[str, Any]:
        """JSON types only. The map itself is stored, so a checkpoint does not depend on how `build` works."""
        tie = dataclasses.asdict(self.tie)
        tie["banks"] = None if self.tie.banks is None else list(self.tie.banks)
        return {"bank_of_layer": list(self.bank_of_layer), "tie": tie}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TieTopology:
        """The inverse of `to_dict`. Raises ConfigError for anything else."""
        try:
            topology = cls(TieConfig(**data["tie"]), tuple(data["bank_of_layer"]))
            in_owner_order = [bank.index for bank in topology.banks] == list(range(len(topology.banks)))
        except (KeyError, TypeError):
            in_owner_order = False
        if not in_owner_order:
            raise ConfigError(Problem("topology", data, "must be what TieTopology.to_dict returns"))
        return topology


def _misfits(tie: TieConfig, num_moe_layers: int) -> list[Problem]:
    """What is wrong with a valid `tie` for a model with so many MoE layers."""
    if tie.banks is not None:
        if len(tie.banks) == num_moe_layers:
            return []
        valid = f"must have one entry per MoE layer: {num_moe_layers}, not {len(tie.banks)}"
        return [Problem("tie.banks", list(tie.banks), valid)]
    if tie.group_size == 1 and tie.num_tied_experts is None:
        return []
    middle = num_moe_layers - tie.skip_first - tie.skip_last
    if middle == 0 and tie.group_size == 1:
        valid = f"has no effect: all {num_moe_layers} MoE layers are prelude or coda; see tie.skip_first"
        return [Problem("tie.num_tied_experts", tie.num_tied_experts, valid)]
    if middle < 0:
        valid = f"must not exceed {num_moe_layers} MoE layers together with tie.skip_last = {tie.skip_last}"
        return [Problem("tie.skip_first", tie.skip_first, valid)]
    # The first bank of the first run gets every block_size-th layer: it is the largest there can be.
    largest = max(1, math.ceil(middle / tie.block_size))
    if tie.group_size <= largest:
        return []
    blocks = f" with tie.block_size = {tie.block_size}" if tie.block_size > 1 else ""
    valid = f"must be at most {largest}{blocks}: {middle} MoE layers lie between prelude and coda"
    return [Problem("tie.group_size", tie.group_size, valid)]


def _pattern_keys(tie: TieConfig, num_moe_layers: int) -> list[Hashable]:
    """One key per MoE layer; layers with equal keys share a bank."""
    middle = range(tie.skip_first, num_moe_layers - tie.skip_last)

    def key(position: int) -> Hashable:
        if position not in middle:
            return position
        run, offset = divmod(position - tie.skip_first, tie.group_size * tie.block_size)
        return run, offset % tie.block_size

    return [key(position) for position in range(num_moe_layers)]
