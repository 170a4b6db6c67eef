"""Single values of a row: JSON, text, or nothing; a `BadRow` says what is wrong with one."""

import json
from typing import Any

from recipes_lib.data.errors import BadRow

NOT_UTF8 = "save the file as UTF-8, for example: iconv -f latin1 -t utf-8 OLD > NEW"


def parsed_json(value: Any, kind: type, what: str) -> Any:
    """Return a value of the kind (list or dict), or what it is as JSON text; or raise a BadRow."""
    try:
        if isinstance(value, str | bytes):
            value = json.loads(value)
    except UnicodeDecodeError as error:
        raise BadRow(f"{what}: not JSON ({error})", NOT_UTF8) from None
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{what}: not JSON ({error})") from None
    if not isinstance(value, kind):
        raise BadRow(f"{what}: expected {kind.__name__}, found {type(value).__name__}")
    return value


def checked_text(value: Any, what: str) -> str:
    """Return a text, or raise a BadRow where it is none or has half of a UTF-16 pair."""
    if not isinstance(value, str):
        raise BadRow(f"{what}: expected text, found {type(value).__name__.removesuffix('Type')}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{what}: {error}") from None
    return value


def is_blank(value: Any) -> bool:
    """Return whether a value says nothing: None, empty, or empty as JSON."""
    return not value or (isinstance(value, str) and value.strip() in ("", "[]", "{}", "null"))
