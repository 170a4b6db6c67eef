"""Tokens and passwords do not belong in a recipe: it is committed, copied into runs and shown in reports."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from recipes_lib.errors import RecipeError
from recipes_lib.recipe.loader import Document
from recipes_lib.recipe.vocabulary import subschema
from recipes_lib.recipe.yaml_source import KeyPath

_SECRET_KEY = re.compile(r"(?:^|_)(?:token|secret|password|passwd|api_?key|access_?key|private_?key|credentials?|auth)$", re.IGNORECASE)
_SECRET_VALUE = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_-]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{16,}|\bAKIA[0-9A-Z]{16}\b"
    r"|\bAIza[\w-]{30,}|\bxox[abpr]-[\w-]{10,}|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}|-----BEGIN [A-Z ]*PRIVATE KEY|://[^/\s:@]+:[^/\s@]+@"
)
_HINT = "log in with 'hf auth login' or export the variable in the shell; if this was committed, revoke the token"


def find_credentials(document: Document) -> dict[KeyPath, RecipeError]:
    """Return an error for every key or value that looks like a secret; the value is never repeated in the message."""
    errors: dict[KeyPath, RecipeError] = {}
    for path, value in _walk(document.values, ()):
        key = str(path[-1]).replace("-", "_")
        named = (
            bool(_SECRET_KEY.search(key)) and value not in (None, "") and not isinstance(value, dict | list | bool) and not _is_known(path)
        )
        if named or (isinstance(value, str) and _SECRET_VALUE.search(value)):
            what = f"'{'.'.join(map(str, path))}' looks like a secret; a recipe must not hold one"
            errors[path] = document.error(path, what, _HINT)
    lines = {(error.file, error.line) for error in errors.values()}
    for number, line in enumerate(document.text.split("\n"), start=1):
        if _SECRET_VALUE.search(line) and (document.file, number) not in lines:
            errors[("", number)] = RecipeError("this line holds what looks like a secret", _HINT, file=document.file, line=number)
    return errors


def _is_known(path: KeyPath) -> bool:
    """Whether the schema has this key: `train.eos_token` is not a secret."""
    return subschema(*map(str, path)) is not None


def _walk(values: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    """Yield every key path with its value."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        yield (*path, key), value
        yield from _walk(value, (*path, key))
