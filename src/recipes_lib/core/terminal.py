"""Text that people read and records that stay: no secrets and no control characters in them.

Masked are tokens by their form, passwords in URLs, and values whose names say that they are secret.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MASK = "***"
_SHORTEST_SECRET = 8  # a shorter value may be a word of any sentence
_SECRET_NAME = re.compile(
    r"(?:^|[_.-])(?:token|secret|password|passwd|(?:api|access|private)[_-]?key|(?-i:KEY))$",
    re.IGNORECASE,
)
_VOCABULARY = re.compile(r"(?:^|[_.-])(?:eos|bos|pad|unk|sep|cls|mask|image|audio|video)_token$")
_SECRETS = re.compile(
    r"\bhf_[A-Za-z0-9]{12,}"
    r"|\bsk-[\w-]*[A-Za-z0-9]{20,}[\w-]*"  # and not a run named sk-baseline-lora-r8
    r"|\bBearer\s+[\w.~+/-]{12,}=*"
    r"|(?<=://)[^/\s:?#'\"@]*:[^/\s?#'\"]+(?=@)"  # user:password@host
    r"|(?:(?<=http://)|(?<=https://))[^/\s?#'\"@]+(?=@)"  # token@host
    r"|(?P<name>[?&](?i:[\w.-]*(?:token|secret|password)|(?:api_?|access_)?key)=)[^&\s#'\"]+"
)
_SPACES_AND_JOINERS = "\n\t\u200c\u200d"  # the joiners of Persian, Hindi and emoji
_remembered: set[str] = set()


def is_secret_name(name: str) -> bool:
    """Return whether a key, variable or option of this name holds a secret."""
    return bool(_SECRET_NAME.search(name)) and not _VOCABULARY.search(name)


def remember_secret(value: str) -> str:
    """Mask this value from now on, and return it: a server may repeat the key it was sent."""
    _remembered.add(value)
    return value


def holds_secret(text: str) -> bool:
    """Return whether a text has something in it that looks like a secret."""
    return bool(_SECRETS.search(text))


def mask_secrets(text: str) -> str:
    """Return a text with stars for each secret in it.

    Example:
        >>> mask_secrets("GET https://me:pw@host/x?api_key=12&n=3")
        'GET https://***@host/x?api_key=***&n=3'
    """
    values = {value for name, value in os.environ.items() if is_secret_name(name)} | _remembered
    for value in sorted(values, key=len, reverse=True):  # so that none hides a part of another
        if len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, MASK)
    return _SECRETS.sub(rf"\g<name>{MASK}", text)


def masked(value: Any, name: str = "") -> Any:
    """Return the JSON-ready value of a key or variable `name` with stars for secrets."""
    if isinstance(value, dict):
        return {key: masked(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [masked(item, name) for item in value]
    if isinstance(value, str):
        return MASK if value and is_secret_name(name) else mask_secrets(value)
    return value


def masked_command(words: Sequence[str]) -> str:
    """Return a command, quoted for a shell, with stars for secrets."""
    shown, last = [], ""
    for word in words:
        name, separator, value = word.partition("=")
        word = f"{name}={masked(value, name)}" if separator else masked(word, last)
        shown.append(mask_secrets(word))
        last = name if name.startswith("--") and not separator else ""
    return shlex.join(shown)


def printable(text: str) -> str:
    """Return `text` with stars for secrets and control characters shown instead of obeyed.

    Example:
        >>> printable("a\\x1b[31mb\\tc")
        'a\\\\x1b[31mb\\tc'
    """
    return "".join(
        char
        if char in _SPACES_AND_JOINERS or unicodedata.category(char) not in {"Cc", "Cf", "Cs"}
        else char.encode("unicode_escape").decode()
        for char in mask_secrets(text)
    )


def count(n: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun: 1 item, 1,200 items."""
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"


def shown_size(num_bytes: float) -> str:
    """Return a size as text."""
    return f"{num_bytes / 2**20:,.1f} MiB"


def shown_duration(seconds: float) -> str:
    """Return a time in seconds, minutes, or hours and minutes."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def say(text: str = "") -> None:
    """Print on stdout at once; when nobody reads any more (`| head`), the rest is dropped."""
    try:
        print(printable(text), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_json(value: object) -> int:
    """Print what `--json` asks for, and return the exit code of a verb that is done."""
    print(mask_secrets(json.dumps(value, indent=2, ensure_ascii=False)), flush=True)
    return 0


def warn(text: str) -> None:
    """Print a warning on stderr, where it does not get into what --json prints."""
    print(printable(f"warning: {text}"), file=sys.stderr, flush=True)


def next_step(*words: str | Path) -> int:
    """Name the next command (one text as it stands, several words quoted); return exit code 0."""
    say(f"next: {words[0] if len(words) == 1 else shlex.join(map(str, words))}")
    return 0
