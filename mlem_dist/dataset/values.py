"""Values of Parquet columns as JSON has them."""

from __future__ import annotations

import json
import math
from typing import Any

import pyarrow as pa
from pyarrow import types


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The Arrow type of values that JSON has, to which values of the type `kind` are cast.

    Times and decimal numbers become texts, values of dictionaries themselves.

    Raises:
        TypeError: if JSON has no such values, as for binary ones; the message names the type.
    """
    if types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return pa.list_(plain_type(kind.value_type))
    if types.is_struct(kind):
        return pa.struct([pa.field(field.name, plain_type(field.type)) for field in kind])
    if types.is_timestamp(kind) or types.is_date(kind) or types.is_time(kind) or types.is_decimal(kind):
        return pa.string()
    if types.is_float16(kind):
        return pa.float32()
    if types.is_floating(kind) or types.is_integer(kind) or types.is_boolean(kind) or types.is_null(kind):
        return kind
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return pa.string()
    raise TypeError(str(kind))


def member_names(kind: pa.DataType) -> set[str]:
    """The names of the members of all structs in a type."""
    names = {field.name for field in kind} if types.is_struct(kind) else set()
    return names.union(*(member_names(kind.field(i).type) for i in range(kind.num_fields)))


def json_line(values: Any) -> str:
    """Values of types that `plain_type` returns as JSON on one line; a number that is not finite becomes null."""
    try:
        # In ASCII, as some readers also end lines at characters that texts may hold.
        return json.dumps(values, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(values), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(member) for name, member in value.items()}
    if isinstance(value, list):
        return [_finite(member) for member in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
