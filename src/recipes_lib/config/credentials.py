"""Tokens and passwords do not belong in a recipe: checks refuse what looks like one (see
`redaction`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from recipes_lib.config.vocabulary import subschema
from recipes_lib.core.errors import RecipeError
from recipes_lib.core.redaction import holds_secret, is_secret_name, mask_secrets

if TYPE_CHECKING:
    from recipes_lib.config.loader import Document
    from recipes_lib.config.yaml_source import KeyPath

_HINT = (
    "log in with 'hf auth login' or export the variable in the shell; if this was committed, revoke"
    " the token"
)


def find_credentials(source: Document) -> dict[KeyPath, RecipeError]:
    """Return an error for every key or value that looks like a secret; the value is never repeated
    in the message.
    """
    errors: dict[KeyPath, RecipeError] = {}
    for path, value in _walk(source.values, ()):
        key = str(path[-1]).replace("-", "_")
        holds = value not in (None, "") and not isinstance(value, dict | list | bool)
        named = (
            is_secret_name(key) and holds and subschema(*map(str, path)) is None
        )  # the schema has train.eos_token
        if named or (isinstance(value, str) and holds_secret(value)):
            errors[path] = source.error(
                path,
                f"'{mask_secrets('.'.join(map(str, path)))}' looks like a secret; a recipe must not"
                " hold one",
                _HINT,
            )
    lines = {(found.file, found.line) for found in errors.values()}
    for number, line in enumerate(source.text.split("\n"), start=1):
        if holds_secret(line) and (source.file, number) not in lines:
            errors[("", number)] = RecipeError(
                "this line holds what looks like a secret", _HINT, file=source.file, line=number
            )
    return errors


def _walk(values: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    """Yield every key path with its value."""
    items = (
        values.items()
        if isinstance(values, dict)
        else enumerate(values)
        if isinstance(values, list)
        else ()
    )
    for key, value in items:
        yield (*path, key), value
        yield from _walk(value, (*path, key))
