"""Keys added to a YAML text: found by the parser's own positions, inserted as lines, and proved by parsing again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import yaml

from megatron_tied.errors import ConfigError, Problem
from megatron_tied.patching.edits import Edit, apply_edits, line_around


@dataclass(frozen=True)
class Anchor:
    """The entry number `index` of a mapping, which ours go next to: its key and value."""

    mapping: yaml.MappingNode
    index: int
    key: yaml.ScalarNode
    value: yaml.Node


def parse_yaml(text: str) -> yaml.Node:
    """The nodes of the one document in `text`. Raises ConfigError if it cannot be parsed."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(_unparsable(error)) from None
    if node is None:
        raise ConfigError(Problem("line 1", "", "must be a YAML document: it is empty"))
    return node


def mappings(node: yaml.Node) -> Iterator[yaml.MappingNode]:
    """`node` and everything below it that is a mapping, each once."""
    waiting, seen = [node], set()
    while waiting:
        node = waiting.pop(0)
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            yield node
            waiting += [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value


def anchor(mapping: yaml.MappingNode, key: str) -> Anchor | None:
    """The place of `key` in a mapping."""
    for index, (name, value) in enumerate(mapping.value):
        if isinstance(name, yaml.ScalarNode) and name.value == key:
            return Anchor(mapping, index, name, value)
    return None


def child(node: yaml.Node, key: str) -> yaml.Node | None:
    """What `key` holds, if `node` is a mapping that has it."""
    found = anchor(node, key) if isinstance(node, yaml.MappingNode) else None
    return None if found is None else found.value


def plain(node: yaml.Node) -> Any:
    """The Python value of a node; a tag that is not YAML's own makes it its text, or None."""
    if isinstance(node, yaml.MappingNode):
        return {key.value: plain(value) for key, value in node.value if isinstance(key, yaml.ScalarNode)}
    if isinstance(node, yaml.SequenceNode):
        return [plain(item) for item in node.value]
    if isinstance(node, yaml.ScalarNode) and node.style is None:
        with suppress(yaml.YAMLError):
            return yaml.safe_load(node.value)
    return node.value


def insertion(text: str, place: Anchor, keys: Mapping[str, str]) -> Edit:
    """The edit that puts `keys` after the anchor, in its style."""
    key, end = place.key, _end(place)
    quote = key.style or ""
    if place.mapping.flow_style:
        # A comma ends a value here, but in a list.
        values = {name: f'"{value}"' if "," in value and value[0] != "[" else value for name, value in keys.items()}
        return Edit(end, end, "".join(f", {quote}{name}{quote}: {value}" for name, value in values.items()))
    pairs = [f"{quote}{name}{quote}: {value}" for name, value in keys.items()]
    line = line_around(text, end)
    indent = " " * key.start_mark.column
    return Edit(line.end, line.end, "".join(f"{line.newline}{indent}{pair}" for pair in pairs))


def prove_yaml(
    text: str, root: yaml.Node, edits: Sequence[Edit], places: Sequence[Anchor], keys: Mapping[str, str]
) -> None:
    """Raise ConfigError unless the edited text is the old document, `root`, with `keys` after each place."""
    added = [(("scalar", name), _shape(parse_yaml(value))) for name, value in keys.items()]
    after = {id(place.mapping): place.index for place in places}
    expected = _shape(root, after, added)
    try:
        found = _shape(parse_yaml(apply_edits(text, edits)))
    except ConfigError:
        found = None
    if found != expected:
        line = places[0].key.start_mark.line + 1
        valid = "stands where nothing can be added safely: write the file in block style, or add the keys by hand"
        raise ConfigError(Problem(f"line {line}", places[0].key.value, valid))


def _end(place: Anchor) -> int:
    node = place.value
    # The end of an empty block value, or of a collection, may lie lines below.
    return node.end_mark.index if isinstance(node, yaml.ScalarNode) else node.start_mark.index


def _shape(node: yaml.Node, after: Mapping[int, int] | None = None, added: list[Any] | None = None) -> Any:
    """A comparable copy of a document, with pairs added after some entries; identities are those of the nodes given."""
    if isinstance(node, yaml.MappingNode):
        pairs = []
        for index, (key, value) in enumerate(node.value):
            pairs.append((_shape(key)[:2], _shape(value, after, added)))
            if after and after.get(id(node)) == index:
                pairs += added or []
        return "mapping", node.tag, pairs
    if isinstance(node, yaml.SequenceNode):
        return "sequence", node.tag, [_shape(item, after, added) for item in node.value]
    return "scalar", node.value, node.tag


def _unparsable(error: yaml.YAMLError) -> Problem:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}" if mark is not None else "the file"
    said = getattr(error, "problem", None) or str(error).splitlines()[0]
    return Problem(where, said, "must be YAML; nothing was changed")
