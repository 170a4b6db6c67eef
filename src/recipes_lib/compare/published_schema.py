"""The JSON Schema of files with published numbers. Written by `make schema`."""

from __future__ import annotations

from typing import Any

from recipes_lib.config.schema import file_schema

_TEXTS = {"type": "array", "items": {"type": "string"}}


def published_schema() -> dict[str, Any]:
    """Return the schema; a bare number in a table is short for `{value: number}`."""
    number = {
        "type": "object",
        "description": "One published number.",
        "additionalProperties": False,
        "required": ["value"],
        "properties": {
            "value": {"type": "number", "description": "As it was published."},
            "interval": {
                "type": "array",
                "items": {"type": "number"},
                "minItems": 2,
                "maxItems": 2,
                "description": "[low, high], where one was published.",
            },
            "n": {
                "type": "integer",
                "minimum": 1,
                "description": "Items behind it, where they are not the table's n.",
            },
            "note": {"type": "string", "description": "What must be known about this number."},
        },
    }
    metric = {
        "type": "object",
        "description": "One column of the table.",
        "additionalProperties": False,
        "required": ["label"],
        "properties": {
            "label": {"type": "string", "description": "The name it was published under."},
            "beside": {
                "type": "string",
                "description": (
                    "Our metric it stands beside: EVAL/METRIC, or EVAL/TASK/METRIC for lm-eval."
                ),
            },
            "factor": {
                "type": "number",
                "description": "Our metric's value is this times the published one. Absent: 1.",
                "default": 1,
            },
            "places": {
                "type": "integer",
                "minimum": 0,
                "description": "Decimal places it was published with.",
            },
            "n": {
                "type": "integer",
                "minimum": 1,
                "description": "Items behind each number, where they are not the table's n.",
            },
            "note": {"type": "string", "description": "How the metric differs from ours."},
        },
    }
    table = {
        "type": "object",
        "description": "One table of the publication.",
        "additionalProperties": False,
        "required": ["title", "metrics", "arms"],
        "properties": {
            "title": {"type": "string", "description": "What was measured."},
            "n": {
                "type": "integer",
                "minimum": 1,
                "description": "Items behind each number; absent where it was not published.",
            },
            "protocol": {
                **_TEXTS,
                "description": (
                    "How it was measured, a note each: shown as flags beside the numbers."
                ),
            },
            "circumstances": {
                "type": "object",
                "additionalProperties": {
                    "type": "object",
                    "additionalProperties": {"type": "string"},
                },
                "description": (
                    "Arm -> what -> how it was there, where no recipe can say it (hardware). Arms"
                    " that differ are confounded."
                ),
            },
            "metrics": {
                "type": "object",
                "minProperties": 1,
                "additionalProperties": metric,
                "description": "Columns by short name.",
            },
            "arms": {
                "type": "object",
                "minProperties": 1,
                "additionalProperties": {
                    "type": "object",
                    "additionalProperties": {"anyOf": [{"type": "number"}, number]},
                },
                "description": (
                    "Rows by arm, as studies call the arm: short name of the metric -> number."
                ),
            },
        },
    }
    properties = {
        "publication": {"type": "string", "description": "What was published."},
        "source": {"type": "string", "description": "Where."},
        "tables": {
            "type": "object",
            "minProperties": 1,
            "additionalProperties": table,
            "description": "Tables by short name.",
        },
    }
    return file_schema(
        "published", "Published numbers", required=list(properties), properties=properties
    )
