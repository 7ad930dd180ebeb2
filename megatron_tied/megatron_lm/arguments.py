"""The `--moe-tie-*` flags, and the topology they ask for."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from dataclasses import fields

from megatron_tied.errors import ConfigError, Problem
from megatron_tied.topology import TieConfig, TieTopology, moe_layers

# Without an effect there: the gradients of all layers are added in buffers of Megatron's own, and only experts shared.
_NOT_THERE = ("weight_gradient", "share")
# What Megatron-LM's namespace and its YAML files call TieConfig's fields; `flag` makes the flag of it.
NAMES = {field.name: f"moe_tie_{field.name}" for field in fields(TieConfig) if field.name not in _NOT_THERE}
NAMES["num_tied_experts"] = "moe_tie_num_experts"


def add_tie_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Adds the flags to Megatron-LM's parser and returns it; usable as `extra_args_provider`."""
    default = TieConfig()
    group = parser.add_argument_group("expert tying", "layers of a tie group use one set of routed experts")
    group.add_argument(
        "--moe-tie-group-size", type=int, default=1, metavar="N", help="MoE layers per tie group; 1 (default): untied"
    )
    group.add_argument(
        "--moe-tie-skip-first", type=int, default=default.skip_first, metavar="N", help="untied first MoE layers (2)"
    )
    group.add_argument(
        "--moe-tie-skip-last", type=int, default=default.skip_last, metavar="N", help="untied last MoE layers (2)"
    )
    group.add_argument(
        "--moe-tie-pattern",
        choices=("consecutive", "cyclic"),
        default=default.pattern,
        help="tie neighbours (default), or layers that are --moe-tie-block-size apart",
    )
    group.add_argument("--moe-tie-block-size", type=int, default=default.block_size, metavar="N", help="of cyclic (1)")
    group.add_argument(
        "--moe-tie-banks",
        type=integers,
        metavar="0,1,1,2",
        help="the bank of each MoE layer, in place of the five flags above",
    )
    group.add_argument(
        "--moe-tie-num-experts", type=int, metavar="N", help="experts of a tied bank; default: --num-experts"
    )
    group.add_argument(
        "--moe-tie-lr-divisor",
        type=divisor,
        default=default.lr_divisor,
        metavar="sqrt|linear|none|X",
        help="what a tied bank's learning rate is divided by: the root of its number of layers (default), ...",
    )
    group.add_argument(
        "--moe-tie-pipeline",
        choices=("align", "allreduce"),
        default=default.pipeline,
        help="cut pipeline stages between tie groups (default), or keep a copy of a bank on every stage that uses it "
        "and sum their gradients",
    )
    return parser


def ties(args: Namespace) -> bool:
    """Whether the arguments ask for tied experts."""
    return bool(getattr(args, "num_experts", None)) and (
        getattr(args, "moe_tie_group_size", 1) != 1 or getattr(args, "moe_tie_banks", None) is not None
    )


def tie_config(args: Namespace) -> TieConfig:
    """The TieConfig of Megatron-LM's arguments; what a `--yaml-cfg` file leaves out has its default."""
    default = TieConfig()
    return TieConfig(**{field: getattr(args, name, getattr(default, field)) for field, name in NAMES.items()})


def topology_from_args(args: Namespace) -> TieTopology:
    """The banks that the arguments ask for. Raises `ConfigError`, in the names of the flags."""
    try:
        layers = moe_layers(getattr(args, "moe_layer_freq", 1), args.num_layers)
        return TieTopology.build(tie_config(args), args.num_layers, layers)
    except ConfigError as error:
        raise ConfigError([in_flags(problem) for problem in error.problems]) from None


def flag(attribute: str) -> str:
    """The flag of an attribute of Megatron-LM's arguments."""
    return f"--{attribute.replace('_', '-')}"


def in_flags(problem: Problem) -> Problem:
    """The same in the names of the flags."""
    names = {f"tie.{field}": flag(name) for field, name in NAMES.items()} | {"model.num_layers": "--num-layers"}
    valid = problem.valid
    for name in sorted(names, key=len, reverse=True):
        valid = valid.replace(name, names[name])
    return Problem(names.get(problem.field, problem.field), problem.value, valid)


def integers(text: str) -> tuple[int, ...]:
    """A list on the command line, such as `0,1,1,2`. Raises ArgumentTypeError for anything else."""
    try:
        return tuple(int(part) for part in text.replace(",", " ").split())
    except ValueError:
        raise ArgumentTypeError(f"{text!r} must be integers such as 0,1,1,2") from None


def divisor(text: str) -> str | float:
    """A learning rate divisor on the command line: a number, or the name of a rule."""
    try:
        return float(text)
    except ValueError:
        return text
