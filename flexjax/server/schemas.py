"""Types of fields as JSON Schema, as OpenAPI 3.1 has it. It knows no fields."""

import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

Schema = dict[str, Any]

NAMES = {int: "integer", float: "number", str: "string", bool: "boolean"}


def schema_of(hint: Any) -> Schema:
    """Of what `flexjax.fields.convert` takes for a type."""
    if hint in NAMES:
        return {"type": NAMES[hint]}
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any_of(*(schema_of(each) for each in arguments if each is not type(None)))
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple:
        return {"type": "array", "items": schema_of(arguments[0])}
    if hint is list:
        return {"type": "array"}
    if (origin or hint) is Mapping:
        return {"type": "object"}
    raise TypeError(f"{hint} has no schema")


def any_of(*schemas: Schema) -> Schema:
    return schemas[0] if len(schemas) == 1 else {"anyOf": list(schemas)}


def nullable(schema: Schema) -> Schema:
    return {"anyOf": [*schema.get("anyOf", [schema]), {"type": "null"}]}


def object_of(properties: Mapping[str, Schema], required: Iterable[str] = ()) -> Schema:
    """An object of these fields and no others; those that are not required may be null."""
    needed = list(required)
    fields = {name: schema if name in needed else nullable(schema) for name, schema in properties.items()}
    return {"type": "object", "properties": fields, "additionalProperties": False, "required": needed}


def answer(kind: str | None, **properties: Schema) -> Schema:
    """An object that has at least these fields; ``kind`` is what it calls itself."""
    named = {} if kind is None else {"object": {"const": kind}}
    return {"type": "object", "properties": named | properties, "required": [*named, *properties]}
