"""Plain values -> YAML text with a comment behind each value: what `recipes show` and `recipes new`
print.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import yaml

from recipes_lib.config.documents import KeyPath


def value_text(value: Any) -> str:
    """Return a value as YAML on one line.

    Example:
        >>> value_text({"r": 8, "names": ["a", "no"]})
        "{r: 8, names: [a, 'no']}"
    """
    text = yaml.safe_dump(
        value, default_flow_style=True, width=10**9, sort_keys=False, allow_unicode=True
    )
    return text.strip("\n").removesuffix(
        "\n..."
    )  # not other white space: a value may begin or end with it


def yaml_lines(
    values: dict[str, Any], comment: Callable[[KeyPath], str], path: KeyPath = ()
) -> list[tuple[str, str]]:
    """Return one (text, comment) pair per line; mappings are indented, lists stay on one line.

    Args:
        comment: the comment of the value at a key path, empty for none.
    """
    indent = "  " * len(path)
    lines: list[tuple[str, str]] = []
    for key, value in values.items():
        here = (*path, key)
        if isinstance(value, dict) and value:
            lines += [(f"{indent}{key}:", ""), *yaml_lines(value, comment, here)]
        else:
            lines.append((f"{indent}{key}: {value_text(value)}", comment(here)))
    return lines


def join_lines(lines: list[tuple[str, str]], widest: int = 60) -> str:
    """Return the lines as text with aligned comments; texts longer than `widest` push their comment
    to the right.
    """
    width = max(
        (len(text) for text, comment in lines if comment and len(text) <= widest), default=0
    )
    return "\n".join(
        f"{text:<{width}}  # {comment}" if comment else text for text, comment in lines
    )
