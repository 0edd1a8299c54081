"""Conditions on the columns of a dataset, by which rows are kept."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mlem_dist.errors import UsageError
from mlem_dist.files import listing

COMPARISONS: Mapping[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}

ARITHMETIC: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}

EXPECTED = 'a condition such as "score > 0.5 and label in (1, 2)", of columns, numbers, texts and comparisons'


@dataclass(frozen=True)
class Condition:
    """A condition on columns, in the syntax of Python: comparisons, and, or, not, in, is None, and arithmetic.

    Raises:
        UsageError: if the text is no such condition.
    """

    text: str

    def __post_init__(self) -> None:
        _ = self.expression

    @cached_property
    def _tree(self) -> ast.expr:
        try:
            return ast.parse(self.text, mode="eval").body
        except (SyntaxError, ValueError) as error:
            raise UsageError(f"`keep` {self.text!r}: {error.args[0]}; expected {EXPECTED}") from None

    @cached_property
    def expression(self) -> pc.Expression:
        """The condition as an expression of pyarrow."""
        try:
            expression = _expression(self._tree, self.text)
        # Operators and methods that constants lack.
        except (TypeError, AttributeError, ZeroDivisionError) as error:
            raise UsageError(f"`keep` {self.text!r}: {error}; expected {EXPECTED}") from None
        if not isinstance(expression, pc.Expression):
            raise UsageError(f"`keep` {self.text!r} names no column; expected {EXPECTED}")
        return expression

    def check(self, schema: pa.Schema) -> None:
        """Refuse a condition that does not fit the columns of a dataset.

        Raises:
            UsageError: if it names a column that is not there, or compares what cannot be compared.
        """
        names = [name for name in schema.names if name != "image"]
        named = sorted({node.id for node in ast.walk(self._tree) if isinstance(node, ast.Name)})
        if missing := [name for name in named if name not in names]:
            raise UsageError(f"`keep`: there is no column {missing[0]!r}; expected one of {listing(names)}")
        try:
            schema.empty_table().filter(self.expression)
        except pa.ArrowException as error:
            raise UsageError(f"`keep` {self.text!r}: {str(error).splitlines()[0]}; expected {EXPECTED}") from None

    def rows(self, columns: pa.Table) -> list[int]:
        """The numbers of the rows for which the condition holds; it does not where it is null."""
        numbered = columns.append_column("", pa.array(range(len(columns)), pa.int64()))
        kept: list[int] = numbered.filter(self.expression)[""].to_pylist()
        return kept


def _expression(node: ast.expr, text: str) -> Any:
    """A part of a condition: an expression of pyarrow, or a constant."""

    def part(inner: ast.expr) -> Any:
        return _expression(inner, text)

    match node:
        case ast.Name(id=name):
            return pc.field(name)
        case ast.Constant(value=value) if isinstance(value, bool | int | float | str):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -part(inner) if isinstance(inner, ast.Constant) else 0 - part(inner)
        case ast.UnaryOp(op=ast.Not(), operand=inner):
            return ~part(inner)
        case ast.BoolOp(op=ast.And(), values=values):
            return reduce(operator.and_, map(part, values))
        case ast.BoolOp(op=ast.Or(), values=values):
            return reduce(operator.or_, map(part, values))
        case ast.BinOp(op=op, left=left, right=right) if type(op) in ARITHMETIC:
            return ARITHMETIC[type(op)](part(left), part(right))
        case ast.Compare(left=left, ops=ops, comparators=others):
            pairs = zip([left, *others[:-1]], ops, others, strict=True)
            return reduce(operator.and_, [_comparison(part(left), op, other, text) for left, op, other in pairs])
    raise UsageError(f"`keep` {text!r}: {ast.unparse(node)!r} is not understood; expected {EXPECTED}")


def _comparison(left: Any, op: ast.cmpop, right: ast.expr, text: str) -> Any:
    if isinstance(op, ast.In | ast.NotIn) and isinstance(right, ast.Tuple | ast.List | ast.Set):
        inside = left.isin([_expression(value, text) for value in right.elts])
        return inside if isinstance(op, ast.In) else ~inside
    if isinstance(op, ast.Is | ast.IsNot) and isinstance(right, ast.Constant) and right.value is None:
        return left.is_null() if isinstance(op, ast.Is) else left.is_valid()
    if type(op) in COMPARISONS:
        return COMPARISONS[type(op)](left, _expression(right, text))
    raise UsageError(f"`keep` {text!r}: {ast.unparse(right)!r} is not understood there; expected {EXPECTED}")
