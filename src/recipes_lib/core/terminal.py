"""Text for the terminal: no control characters from model or data, the closing line that names the
next command; numbers typed there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence

from recipes_lib.core.redaction import mask_secrets

PLAIN = "\n\t\u200c\u200d"  # the last two: zero width non-joiner and joiner


def printable(text: str) -> str:
    """Return `text` with control characters (ANSI escapes among them) shown instead of obeyed, and
    stars for secrets. The joiners of Persian, Hindi and emoji stay.

    Example:
        >>> printable("a\\x1b[31mb\\tc")
        'a\\\\x1b[31mb\\tc'
    """
    return "".join(
        char
        if char in PLAIN or unicodedata.category(char) not in {"Cc", "Cf", "Cs"}
        else char.encode("unicode_escape").decode()
        for char in mask_secrets(text)
    )


def shown_size(num_bytes: float) -> str:
    """Return a size with a unit that leaves something of it to see.

    Example:
        >>> shown_size(1_234_567), shown_size(310_000), shown_size(5e9)
        ('1.2 MiB', '303 KiB', '4.7 GiB')
    """
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.{1 if num_bytes < 10 * size else 0}f} {unit}"
    return f"{num_bytes / 2**10:,.0f} KiB"


def first_of(names: Sequence[str], most: int = 3) -> str:
    """Return the first names, and how many more there are.

    Example:
        >>> first_of(["a", "b", "c"], 2)
        'a, b and 1 more'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines with aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def use_color() -> bool:
    """Whether colour escapes may be written: a terminal, and NO_COLOR is not set (no-color.org)."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return not plain and sys.stdout.isatty()


def say(text: str = "") -> None:
    """Print one line (or several) on stdout at once, control characters shown.

    Where nobody reads any more (`| head`), the rest is dropped: a training must not end because its
    log is not read.
    """
    try:
        print(printable(text), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_json(value: object) -> int:
    """Print one JSON value, what `--json` asks for, with the letters of every language as they are;
    return the exit code of a verb that is done.
    """
    print(mask_secrets(json.dumps(value, indent=2, ensure_ascii=False)), flush=True)
    return 0


def warn(text: str) -> None:
    """Print a warning on stderr, where it does not get into what --json prints."""
    print(printable(f"warning: {text}"), file=sys.stderr, flush=True)


def next_step(command: str) -> None:
    """Print the closing line that names the next command to type."""
    say(f"next: {command}")


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
