"""The verbs of the command line: one module per verb."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable


def flag_words(args: argparse.Namespace, names: Iterable[str]) -> list[str]:
    """Return the flags of these names that were given, as they are typed."""
    return [f"--{name.replace('_', '-')}" for name in names if getattr(args, name, False)]


def at_least(least: int) -> Callable[[str], int]:
    """Return a reader of whole numbers for argparse that says what it expected.

    Example:
        >>> at_least(1)("12")
        12
    """

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number >= {least}, got {text!r}")
        return int(text)

    return number
