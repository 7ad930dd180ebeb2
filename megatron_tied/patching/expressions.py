"""Arithmetic and list expressions as scripts and Megatron-LM's arguments have them, read without running anything."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from typing import Any

_OPERATIONS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.floordiv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_LONGEST = 100_000  # of a list; a layer has one entry


def integer(expression: str) -> int | None:
    """The value of a sum or product of integers, divided as a shell divides; None for anything else."""
    value = _value(expression)
    return value if isinstance(value, int) else None


def integers(expression: str) -> list[int] | None:
    """The value of a list such as `([0]*3+[1]*58)`; None for anything else."""
    # Quotes and backslashes are a shell's.
    value = _value(re.sub(r"[\\'\"]", "", expression))
    return value if isinstance(value, list) and all(isinstance(item, int) for item in value) else None


def _value(expression: str) -> Any:
    try:
        return _of(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, TypeError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _of(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=int() as value) if not isinstance(value, bool):
            return value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_of(item) for item in items]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_of(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
            return _combined(_OPERATIONS[type(op)], _of(left), _of(right))
    raise ValueError(f"{ast.dump(node)} is no sum, product or list of integers")


def _combined(operation: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
    if operation is operator.mul and any(isinstance(side, list) for side in (left, right)):
        count, items = (left, right) if isinstance(left, int) else (right, left)
        if not isinstance(count, int) or len(items) * count > _LONGEST:
            raise ValueError("the list is too long")
    return operation(left, right)
