"""The words of JSON Schema that our schemas use, as a type: a word that is misspelt, or has a value
of another kind, is found by the type checker and not by an editor that checks nothing.
"""

from __future__ import annotations

from typing import Any, TypedDict

_Reserved = TypedDict(
    "_Reserved",
    {
        "$schema": str,
        "$comment": str,
        "$ref": str,
        "$defs": "dict[str, JsonSchema]",
        "if": "JsonSchema",
        "then": "JsonSchema",
        "not": "JsonSchema",
    },
    total=False,
)


class JsonSchema(_Reserved, total=False):
    """A JSON Schema (draft 2020-12), or the part of one that stands at a key."""

    title: str
    description: str
    type: str | list[str]
    enum: list[Any]
    const: Any
    default: Any
    properties: dict[str, JsonSchema]
    required: list[str]
    additionalProperties: bool | JsonSchema
    minProperties: int
    items: JsonSchema
    minItems: int
    maxItems: int
    minimum: float
    maximum: float
    exclusiveMinimum: float
    exclusiveMaximum: float
    pattern: str
    anyOf: list[JsonSchema]
    oneOf: list[JsonSchema]
    allOf: list[JsonSchema]


def types_of(schema: JsonSchema) -> list[str]:
    """Return the types that a schema names."""
    types = schema.get("type", [])
    return [types] if isinstance(types, str) else types
