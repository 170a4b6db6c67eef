"""Secrets are masked in whatever is recorded or printed: what has the form of a token, passwords in
URLs, and the values of variables whose names say that they are secret.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from typing import Any

MASK = "***"
SHORTEST_SECRET = 8  # a shorter value may be a word of any sentence
_NAME = re.compile(
    r"(?:^|[_.-])(?:token|secret|password|passwd|(?:api|access|private)[_-]?key|(?-i:KEY))$",
    re.IGNORECASE,
)
# train.eos_token, train.pad_token and their kind name a word of the vocabulary
_VOCABULARY = re.compile(r"(?:^|[_.-])(?:eos|bos|pad|unk|sep|cls|mask|image|audio|video)_token$")
_SHAPES = re.compile(
    "|".join(
        (
            r"\bhf_[A-Za-z0-9]{12,}",
            r"\bgithub_pat_\w{16,}|\bgh[pousr]_[A-Za-z0-9]{16,}",
            r"\bsk-[\w-]*[A-Za-z0-9]{20,}[\w-]*",  # a run named sk-baseline-lora-r8 is none
            r"\bBearer\s+[\w.~+/-]{12,}=*",
            r"(?<=://)[^/\s:?#'\"@]*:[^/\s?#'\"]+(?=@)",  # user:password@host
            r"(?:(?<=http://)|(?<=https://))[^/\s?#'\"@]+(?=@)",  # token@host
            r"(?<=[?&])(?i:[\w.-]*(?:token|secret|password|signature)|(?:api_?|access_)?key)"
            r"=[^&\s#'\"]+",
        )
    )
)
_remembered: set[str] = set()


def is_secret_name(name: str) -> bool:
    """Return whether a key, variable or option of this name holds a secret.

    Example:
        >>> [is_secret_name(name) for name in ("HF_TOKEN", "hub_token", "SSH_KEY", "eos_token")]
        [True, True, True, False]
    """
    return bool(_NAME.search(name)) and not _VOCABULARY.search(name)


def remember_secret(value: str) -> str:
    """Mask this value from now on, whatever form it has, and return it: a server may repeat the key
    that it was sent.
    """
    if _is_long_enough(value):
        _remembered.add(value)
    return value


def holds_secret(text: str) -> bool:
    """Return whether a text has something in it that looks like a secret."""
    return bool(_SHAPES.search(text))


def mask_secrets(text: str) -> str:
    """Return a text with stars for each secret in it.

    Example:
        >>> mask_secrets("GET https://me:pw@host/x?api_key=12&n=3")
        'GET https://***@host/x?api_key=***&n=3'
    """
    for value in _known_values():
        text = text.replace(value, MASK)
    return _SHAPES.sub(_stars, text)


def _known_values() -> list[str]:
    """Secrets of this process, the longest first, so that none hides a part of another."""
    names = [name for name in os.environ if is_secret_name(name)]
    values = {os.environ[name] for name in names} | _remembered
    return sorted(filter(_is_long_enough, values), key=len, reverse=True)


def _is_long_enough(value: str) -> bool:
    return len(value) >= SHORTEST_SECRET


def _stars(match: re.Match[str]) -> str:
    """Stars for one secret; a parameter of a URL keeps its name."""
    before = match.string[match.start() - 1 : match.start()]
    name, separator, _ = match.group().partition("=")
    return f"{name}={MASK}" if separator and before in ("?", "&") else MASK


def masked(value: Any, name: str = "") -> Any:
    """Return a JSON-ready value with stars for secrets: what looks like one, and what a name says
    is one.

    Args:
        name: the key or variable that holds the value.
    """
    if isinstance(value, dict):
        return {key: masked(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [masked(item, name) for item in value]
    if isinstance(value, str):
        return MASK if value and is_secret_name(name) else mask_secrets(value)
    return value


def masked_command(words: Sequence[str]) -> str:
    """Return a command, quoted for a shell, with stars for secrets: in `name=value`, after
    `--name`, and wherever they stand.

    Example:
        >>> masked_command(["run", "--token", "abc", "train.api_key=abc", "train.eos_token=<end>"])
        "run --token '***' 'train.api_key=***' 'train.eos_token=<end>'"
    """
    shown = []
    after_secret_option = False
    for word in words:
        name, separator, value = word.partition("=")
        is_option = word.startswith("-")
        if after_secret_option and not is_option:
            shown.append(MASK)
        elif separator and "://" not in name:
            shown.append(f"{name}={masked(value, name)}")
        else:
            shown.append(mask_secrets(word))
        after_secret_option = is_option and not separator and is_secret_name(word.lstrip("-"))
    return shlex.join(shown)
