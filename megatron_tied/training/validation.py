"""Pydantic's findings in our words: one Problem per field, with the value given and what would be valid."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from megatron_tied.errors import ConfigError, Problem

_UNKNOWN_KEY = frozenset({"extra_forbidden", "unexpected_keyword_argument"})

# Pydantic's error types, continuing "must be ...".
_VALID: Mapping[str, str] = {
    "missing": "given",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a text",
    "string_too_short": "a text that is not empty",
    "list_type": "a list",
    "tuple_type": "a list",
    "too_long": "a list of at most {max_length}",
    "dict_type": "a mapping of keys",
    "model_type": "a mapping of keys",
    "dataclass_type": "a mapping of keys",
    "literal_error": "{expected}",
    "greater_than": "> {gt}",
    "greater_than_equal": ">= {ge}",
    "less_than": "< {lt}",
    "less_than_equal": "<= {le}",
}


class _Want(NamedTuple):
    """What is asked for, of the value or of one entry of it."""

    entry: int | None
    text: str


def to_json(value: object) -> str:
    """JSON: only there does pydantic's strict mode take lists for tuples and mappings for dataclasses."""
    return json.dumps(value, default=repr)


def problems_of(error: ValidationError, given: Mapping[str, Any], known: Iterable[str]) -> list[Problem]:
    """All findings of `error` about the config `given`; `known` are the dotted keys that there are."""
    known = list(known)
    problems: list[Problem] = []
    wants: dict[str, list[_Want]] = {}
    for item in error.errors(include_url=False):
        # Behind a key come places within its value: list entries, members of a union.
        depth = 3 if item["type"] in _UNKNOWN_KEY or ".".join(map(str, item["loc"][:3])) in known else 2
        field = ".".join(map(str, item["loc"][:depth]))
        if item["type"] in _UNKNOWN_KEY:
            valid = f"is not a key of the config{nearest(field, known)}"
            problems.append(Problem(field, item["input"], valid))
        elif isinstance(nested := item.get("ctx", {}).get("error"), ConfigError):
            problems.extend(nested.problems)
        else:
            wants.setdefault(field, []).append(_want(item, item["loc"][depth:]))
    return problems + [Problem(field, _lookup(given, field), _must_be(want)) for field, want in wants.items()]


def type_problem(field: str, value: object, annotation: Any) -> Problem | None:
    """What is wrong with one value that should have the type `annotation`; None if nothing is."""
    try:
        TypeAdapter(annotation).validate_json(to_json(value), strict=True)
    except ValidationError as error:
        return Problem(field, value, _must_be([_want(item, item["loc"]) for item in error.errors()]))
    return None


def nearest(field: str, known: Iterable[str]) -> str:
    """A hint for a key in the wrong section (the same name elsewhere) or misspelt (the most similar key)."""
    leaf, depth = field.rpartition(".")[2], field.count(".")
    names = list(known)
    elsewhere = [name for name in names if name.rpartition(".")[2] == leaf]
    alike = get_close_matches(field, [name for name in names if name.count(".") == depth], n=1)
    found = elsewhere or alike
    return f"; did you mean '{found[0]}'?" if found else ""


def _want(item: ErrorDetails, inside: tuple[int | str, ...]) -> _Want:
    """What one finding asks for; `inside` is its place within the value: list entries, members of a union."""
    context = item.get("ctx", {})
    entry = next((place for place in inside if isinstance(place, int)), None)
    if item["type"] == "missing" and entry is not None:
        return _Want(None, f"a list of at least {entry + 1}")
    if item["type"] == "value_error":
        return _Want(entry, str(context["error"]).removeprefix("must be "))
    if item["type"] in _VALID:
        return _Want(entry, _VALID[item["type"]].format_map(context))
    return _Want(entry, item["msg"].removeprefix("Input should be "))


def _must_be(wants: list[_Want]) -> str:
    """One of what is asked for of the value, or of each of its entries."""
    by_entry: dict[int | None, list[str]] = {}
    for want in wants:
        by_entry.setdefault(want.entry, []).append(want.text)
    either = {entry: " or ".join(dict.fromkeys(texts)) for entry, texts in by_entry.items()}
    whole = [either[None]] if None in either else []
    if entries := [f"entry {entry} is {text}" for entry, text in either.items() if entry is not None]:
        whole.append(f"a list whose {' and '.join(entries)}")
    return f"must be {' or '.join(whole)}"


def _lookup(given: Mapping[str, Any], field: str) -> object:
    value: Any = given
    for key in field.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
