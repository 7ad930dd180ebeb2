"""The arguments that a file gives Megatron-LM, whatever its format: flags with the values that can be known."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_tied.megatron_lm.arguments import flag


class Arguments:
    """Flags, each with the values of every place that it stands in; a value is None if a file does not say it.

    source: what tells the values apart that a file has in several places, such as the branches of a condition.
    """

    def __init__(self) -> None:
        self._found: defaultdict[str, dict[int, tuple[str | None, ...]]] = defaultdict(dict)

    def add(self, name: str, values: Iterable[str | None], source: int = 0) -> None:
        """One place of a flag. In one source the last counts, as for argparse."""
        self._found[_canonical(name)][source] = tuple(values)

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def names(self) -> Sequence[str]:
        """All flags, in the order in which they were found."""
        return list(self._found)

    def values(self, name: str) -> tuple[str, ...] | None:
        """The values of a flag; None if it is missing, unknown, or differs from place to place."""
        places = set(self._found.get(name, {}).values())
        if len(places) != 1:
            return None
        values = places.pop()
        known = tuple(value for value in values if value is not None)
        return known if len(known) == len(values) else None

    def text(self, name: str) -> str | None:
        """The one value of a flag."""
        values = self.values(name)
        return values[0] if values else None

    def number(self, name: str) -> int | None:
        """The one value of a flag that is an integer."""
        text = self.text(name)
        return int(text) if text is not None and text.removeprefix("-").isdecimal() else None


def arguments_from_keys(*sections: Mapping[str, Any]) -> Arguments:
    """The flags that TransformerConfig's names stand for, as `--yaml-cfg` files and Megatron-Bridge have them."""
    arguments = Arguments()
    for section in sections:
        for key, value in section.items():
            if isinstance(value, dict) or value is None:
                continue
            for name, values in _flags_of_key(str(key), value):
                arguments.add(name, values)
    return arguments


_RENAMED = {
    "num_moe_experts": "--num-experts",
    "gated_linear_unit": "--swiglu",
    "layernorm_epsilon": "--norm-epsilon",
    "num_layers_in_first_pipeline_stage": "--decoder-first-pipeline-num-layers",
    "num_layers_in_last_pipeline_stage": "--decoder-last-pipeline-num-layers",
    "fp8": "--fp8-format",
}
_SAID_BY_FALSE = {
    "share_embeddings_and_output_weights": "--untie-embeddings-and-output-weights",
    "add_bias_linear": "--disable-bias-linear",
}


def _flags_of_key(key: str, value: Any) -> Iterable[tuple[str, tuple[str, ...]]]:
    name = _RENAMED.get(key, flag(key))
    if key in _SAID_BY_FALSE:
        return [(_SAID_BY_FALSE[key], ())] if value is False else []
    if isinstance(value, bool):
        return [(name, ())] if value else []
    values = tuple(map(str, value)) if isinstance(value, list) else (str(value),)
    if key == "num_query_groups":
        return [(name, values), ("--group-query-attention", ())]
    if key == "moe_layer_freq" and isinstance(value, list):
        return [(name, (str(value),))]
    return [(name, values)]


def _canonical(name: str) -> str:
    # torchrun takes both spellings.
    return name.replace("_", "-")
