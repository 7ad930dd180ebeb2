"""The fields of config classes and the constants of installed packages, read from their source.

Importing megatron.core or deepspeed takes seconds and pulls in torch; a misspelt key should be known before.
"""

from __future__ import annotations

import ast
import typing
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_TYPES = {kind.__name__: kind for kind in (bool, int, float, str, list, tuple, dict)} | {
    name: getattr(typing, name) for name in ("Any", "Dict", "List", "Literal", "Optional", "Tuple", "Union")
}


@cache
def class_fields(class_name: str, *modules: str) -> Mapping[str, str]:
    """The annotated fields of a class and its bases: name (and pydantic alias) to the annotation as written.

    `modules` are the dotted names of the modules that define the class and its bases; none is imported.
    Raises ModuleNotFoundError for a module that is not installed.
    """
    classes = {
        node.name: node
        for module in modules
        for node in ast.parse(_source_file(module).read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    }
    fields: dict[str, str] = {}
    pending = [class_name]
    while pending:
        definition = classes[pending.pop()]
        pending += [base.id for base in definition.bases if isinstance(base, ast.Name) and base.id in classes]
        for statement in definition.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                for name in (statement.target.id, *_alias(statement.value)):
                    fields.setdefault(name, ast.unparse(statement.annotation))
    return {name: annotation for name, annotation in fields.items() if not name.startswith("_")}


def annotated_type(annotation: str) -> Any | None:
    """The type that `annotation` names, if it is made of built-in types and `typing`; else None."""
    try:
        # It is the source of an installed package: importing that would evaluate the very same text.
        return eval(annotation, {"__builtins__": {}}, _TYPES)
    except (NameError, AttributeError):
        return None


def constants(module: str, *names: str) -> dict[str, Any]:
    """The literals that a module binds to `names`, read from its source.

    Raises ModuleNotFoundError if it is not installed, and KeyError for a name without a literal.
    """
    bound = {
        target.id: node.value
        for node in ast.parse(_source_file(module).read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    return {name: ast.literal_eval(bound[name]) for name in names}


def _source_file(module: str) -> Path:
    # find_spec imports the parents of a dotted name, so only the top-level package is asked for.
    package, *parts = module.split(".")
    spec = find_spec(package)
    for root in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(root, *parts).with_suffix(".py")
        if path.is_file():
            return path
    raise ModuleNotFoundError(f"{module} is not installed", name=module)


def _alias(default: ast.expr | None) -> list[str]:
    """The `alias` of `name: type = Field(..., alias="...")`, if there is one."""
    keywords = default.keywords if isinstance(default, ast.Call) else []
    aliases = [keyword.value for keyword in keywords if keyword.arg == "alias"]
    return [alias.value for alias in aliases if isinstance(alias, ast.Constant) and isinstance(alias.value, str)]
