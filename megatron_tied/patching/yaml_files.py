"""The YAML files that configure Megatron: where each says how many experts there are, and what it says besides."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from megatron_tied.patching.arguments import Arguments, arguments_from_keys
from megatron_tied.patching.edits import Edit
from megatron_tied.patching.yaml_text import Anchor, anchor, child, insertion, mappings, parse_yaml, plain, prove_yaml

Kind = Literal["flags", "yaml-cfg", "bridge"]


@dataclass(frozen=True)
class YamlFile:
    """A YAML file. kind: a map of flags, a file for `--yaml-cfg`, or one that Megatron-Bridge or NeMo reads."""

    text: str
    root: yaml.Node
    kind: Kind
    arguments: Arguments
    anchors: Sequence[Anchor]

    def edits(self, keys: Mapping[str, str]) -> list[Edit]:
        """What to insert. Raises ConfigError if the result would not be the old document with `keys`."""
        if not keys or not self.anchors:
            return []
        edits = [insertion(self.text, place, keys) for place in self.anchors]
        prove_yaml(self.text, self.root, edits, self.anchors, keys)
        return edits


def is_run_config(text: str) -> bool:
    """Whether this is what `megatron_tied.pretrain` reads. Raises ConfigError if it is no YAML."""
    values = plain(parse_yaml(text))
    return isinstance(values, dict) and {"model", "data", "train"} <= values.keys()


def read_yaml(text: str) -> YamlFile | None:
    """A file that says how many experts there are; None for one that does not. Raises ConfigError if it is no YAML."""
    root = parse_yaml(text)
    places = [found for each in mappings(root) if (found := anchor(each, "--num-experts")) and plain(found.value)]
    if places:
        return YamlFile(text, root, "flags", _flags(places), places)
    if section := child(root, "language_model"):
        return _with_keys(text, root, "yaml-cfg", section)
    if any(anchor(each, "num_moe_experts") for each in mappings(root)):
        return _with_keys(text, root, "bridge", child(root, "model") or root)
    return _dotted(text, root)


def _with_keys(text: str, root: yaml.Node, kind: Kind, section: yaml.Node) -> YamlFile | None:
    place = next((found for each in mappings(section) if (found := anchor(each, "num_moe_experts"))), None)
    if place is None or plain(place.value) is None:
        return None
    whole = plain(root)
    sections = [value for value in whole.values() if isinstance(value, dict)]
    # The model's own section last: it is the one that counts.
    arguments = arguments_from_keys(whole, *sections, plain(place.mapping))
    return YamlFile(text, root, kind, arguments, [place])


def _dotted(text: str, root: yaml.Node) -> YamlFile | None:
    """NeMo's overrides, whose keys are paths such as `model.config.num_moe_experts`."""
    for mapping in mappings(root):
        keys = {key.rpartition(".")[2]: key for key in plain(mapping)}
        if "." in keys.get("num_moe_experts", "") and (place := anchor(mapping, keys["num_moe_experts"])):
            found = {key.rpartition(".")[2]: value for key, value in plain(mapping).items()}
            return YamlFile(text, root, "bridge", arguments_from_keys(found), [place])
    return None


def _flags(places: Sequence[Anchor]) -> Arguments:
    arguments = Arguments()
    for source, place in enumerate(places):
        for key, value in place.mapping.value:
            read = plain(value)
            if key.value.startswith("--") and read is not False:
                arguments.add(key.value, _values(value, read), source)
    return arguments


def _values(node: yaml.Node, read: Any) -> list[str | None]:
    if read is True or isinstance(read, dict):
        return []
    words = map(str, read) if isinstance(read, list) else str(node.value).split()
    # What is to be filled in is not known here; a shell's backslashes are not part of the value.
    return [None if "$" in word or "{{" in word else re.sub(r"[\\'\"]", "", word) for word in words]
