"""Conditions over the fields of a sample, such as `similarity > 0.28 and width >= 256`, for `data.where`.

The grammar is a part of Python's: names, numbers, texts, lists, comparisons, `in`, `and`, `or`, `not`, arithmetic and
`len`. It is evaluated on its syntax tree; nothing of it is executed as code.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip
ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip
LONGEST = 1000
"""Largest number of characters of a condition."""


class Lacking(ValueError):
    """Raised for a sample to which a condition does not apply, with the reason."""


class Condition:
    """A condition that is checked when it is made.

    Raises:
        ValueError: the text is no condition; the message has the part that is not understood.
    """

    def __init__(self, text: str) -> None:
        if len(text) > LONGEST:
            raise ValueError(f"the condition has more than {LONGEST} characters")
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError) as error:
            raise ValueError(f"'{text}' is not a condition such as similarity > 0.28 and width >= 256") from error
        self.names: frozenset[str] = frozenset()
        """The fields that it reads."""
        self._check(self._tree)

    def __call__(self, fields: Mapping[str, Any]) -> bool:
        """Whether the condition is true; raises `Lacking` if a field is missing or has another type."""
        try:
            return bool(self._value(self._tree, fields))
        except (TypeError, ZeroDivisionError, OverflowError, MemoryError) as error:
            raise Lacking(f"cannot be compared: {error}") from None

    def _check(self, node: ast.AST) -> None:
        """Raise ValueError unless every part of the tree belongs to the grammar; collect the names."""
        known = isinstance(node, ast.BoolOp | ast.List | ast.Tuple) or (
            (isinstance(node, ast.Compare) and all(type(op) in COMPARISONS for op in node.ops))
            or (isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC)
            or (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub))
            or (isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | None))
            or isinstance(node, ast.Name)
        )
        parts = [part for part in ast.iter_child_nodes(node) if isinstance(part, ast.expr)]
        if isinstance(node, ast.Call):
            known = isinstance(node.func, ast.Name) and node.func.id == "len" and len(node.args) == 1
            known, parts = known and not node.keywords, list(node.args)
        if not known:
            raise ValueError(
                f"'{ast.unparse(node)}' is not allowed in a condition: use fields, numbers, texts, lists, comparisons, "
                "in, and, or, not, + - * / and len()"
            )
        if isinstance(node, ast.Name):
            self.names |= {node.id}
        for part in parts:
            self._check(part)

    def _value(self, node: ast.expr, fields: Mapping[str, Any]) -> Any:
        value = self._value
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            if node.id not in fields:
                raise Lacking(f"it has no field '{node.id}'")
            return fields[node.id]
        if isinstance(node, ast.List | ast.Tuple):
            return [value(item, fields) for item in node.elts]
        if isinstance(node, ast.BoolOp):
            results = (value(item, fields) for item in node.values)
            return all(results) if isinstance(node.op, ast.And) else any(results)
        if isinstance(node, ast.UnaryOp):
            operand = value(node.operand, fields)
            return not operand if isinstance(node.op, ast.Not) else -operand
        if isinstance(node, ast.BinOp):
            left, right = value(node.left, fields), value(node.right, fields)
            if not all(isinstance(side, int | float) for side in (left, right)):
                raise Lacking("cannot be compared: arithmetic needs numbers")
            return ARITHMETIC[type(node.op)](left, right)
        if isinstance(node, ast.Call):
            return len(value(node.args[0], fields))
        assert isinstance(node, ast.Compare), node
        left = value(node.left, fields)
        for op, right_node in zip(node.ops, node.comparators, strict=True):
            right = value(right_node, fields)
            if not COMPARISONS[type(op)](left, right):
                return False
            left = right
        return True


@lru_cache(maxsize=64)
def condition(text: str) -> Condition:
    """The condition of a text, parsed once."""
    return Condition(text)
