"""The proof that a YAML file has changed by our keys only."""

from __future__ import annotations

import pytest

from megatron_tied.errors import ConfigError
from megatron_tied.patching.edits import Edit
from megatron_tied.patching.yaml_text import anchor, insertion, mappings, parse_yaml, prove_yaml

TEXT = "a: &here [1, {b: x}]\nc: 2   # two\nd: !ours {e: 3}\nf: *here\n"


@pytest.mark.parametrize(
    ("changed", "by"),
    [("1", "4"), ("x", "y"), ("d", "g"), ("!ours", "!other"), ("{e: 3}", "[e, 3]"), ("3", "'3'"), ("[1, ", "[1, 1, ")],
)
def test_any_other_change_is_found(changed: str, by: str) -> None:
    root = parse_yaml(TEXT)
    place = anchor(root, "c")
    ours = insertion(TEXT, place, {"new": "5"})
    prove_yaml(TEXT, root, [ours], [place], {"new": "5"})
    start = TEXT.index(changed)
    with pytest.raises(ConfigError, match="line 2 = 'c': stands where nothing can be added safely"):
        prove_yaml(TEXT, root, [ours, Edit(start, start + len(changed), by)], [place], {"new": "5"})


def test_a_result_that_is_no_yaml_is_found() -> None:
    root = parse_yaml(TEXT)
    place = anchor(root, "c")
    with pytest.raises(ConfigError, match="stands where nothing can be added safely"):
        prove_yaml(TEXT, root, [Edit(len(TEXT), len(TEXT), "new: [5\n")], [place], {"new": "5"})


def test_a_mapping_that_is_named_twice_is_looked_at_once() -> None:
    keys = [[key.value for key, _ in mapping.value] for mapping in mappings(parse_yaml(TEXT))]
    assert keys == [["a", "c", "d", "f"], ["e"], ["b"]]


@pytest.mark.parametrize("text", ["a: [", "a: b: c", "\ta: 1", "a: 1\na", "%X\n"])
def test_what_cannot_be_parsed_is_told_with_its_line(text: str) -> None:
    with pytest.raises(ConfigError, match=r"line [12] = .+: must be YAML; nothing was changed"):
        parse_yaml(text)
