"""Values written as Python literals, read without evaluating anything."""

from __future__ import annotations

import ast
from typing import Any

from .errors import OptionError

# Elements that a repetition such as `[(512, 3)] * 4` may make; no network has more layers.
_MOST_ELEMENTS = 100_000
_SHOWN = 80


def literal(text: str, *_scopes: Any) -> Any:
    """Read a literal; it can stand where fairseq calls `eval`.

    Beside what `ast.literal_eval` takes, lists and tuples may be added and repeated, as fairseq's own
    defaults of convolutions are.

    Args:
        text: numbers, strings, True, False, None, and tuples, lists, sets and dictionaries of them.
        _scopes: the names that `eval` would see; no name is looked up.
    Returns:
        the value.
    Raises:
        TypeError: `text` is no string, as `eval` raises it.
        OptionError: it is no literal.
    """
    if not isinstance(text, str):
        raise TypeError(f"a literal must be a string, got {type(text).__name__}")
    try:
        return _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        shown = text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
        raise OptionError(
            f"{shown!r} is not a literal: an option that fairseq evaluates may hold numbers, strings, and "
            "lists, tuples and dictionaries of them, such as [1, 2]"
        ) from None


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Mult)):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Add) and type(left) is type(right) and isinstance(left, (list, tuple)):
            return left + right
        if isinstance(left, int):
            left, right = right, left
        if isinstance(node.op, ast.Mult) and isinstance(left, (list, tuple)) and type(right) is int:
            if len(left) * right > _MOST_ELEMENTS:
                raise ValueError("too many elements")
            return left * right
    return ast.literal_eval(node)
