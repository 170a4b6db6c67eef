"""What a token or a password looks like, and stars in its place: no record, log or message repeats
one.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import Any

MASK = "***"
_WORDS = r"token|secret|passw(?:or)?d|passphrase|pwd|credentials?|(?:api|access|private|secret|ssh|signing|encryption)[_-]?key"  # noqa: E501
_NAME = re.compile(
    rf"(?:{_WORDS}|(?:^|[_.-])(?:pass|auth|authorization|cookie)|(?-i:_KEY))[_-]?\d*$",
    re.IGNORECASE,
)
_TOKENIZER_NAME = re.compile(
    r"(?:^|[_.-])(?:eos|bos|pad|unk|sep|cls|mask|image|audio|video|special|stop)_token$",
    re.IGNORECASE,
)
_SHAPES = "|".join(
    (
        # a user, with or without a password, before the host
        r"(?:https?|ftp)://[^/\s?#'\"@]+(?:@[^/\s?#'\"@]+)*(?=@)",
        r"(?<=://)[^/\s:?#'\"@]*:[^/\s?#'\"]+(?=@)",
        # parameters of a URL
        rf"(?<=[?&;])(?i:[\w.%-]*(?:{_WORDS}|key|auth|sig|signature))=[^&;\s#'\"]+",
        r"\bBearer\s+[\w.~+/-]{12,}=*",
        r"-----BEGIN [A-Z ]*PRIVATE KEY(?:-----[\s\S]*?-----END [A-Z ]*PRIVATE KEY-----)?",
        r"\bhf_[A-Za-z0-9]{12,}",  # Hugging Face
        r"\bsk-[A-Za-z0-9_-]{12,}|\bgsk_[A-Za-z0-9]{16,}|\bxai-[A-Za-z0-9]{20,}|\br8_[A-Za-z0-9]{20,}|\btgp_v1_[\w-]{16,}|\bnvapi-[\w-]{16,}",
        r"\bgh[pousr]_[A-Za-z0-9]{16,}|\bgithub_pat_\w{16,}|\bglpat-[\w-]{16,}|\bpypi-[\w-]{24,}|\bnpm_[A-Za-z0-9]{24,}",
        r"\b(?:AKIA|ASIA)[0-9A-Z]{12,}\b|\bAIza[\w-]{30,}|\bya29\.[\w-]{16,}|\bxox[abprs]-[\w-]{10,}|\bSG\.[\w-]{16,}\.[\w-]{16,}",
        r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}(?:\.[\w-]*)?",  # a JSON web token
    )
)
_SECRET = re.compile(_SHAPES)


def is_secret_name(name: str) -> bool:
    """Return whether a key, variable or option of this name holds a secret.

    Example:
        >>> [is_secret_name(name) for name in ("HF_TOKEN", "hub_token", "WANDB_API_KEY", "SSH_KEY", "eos_token", "max_new_tokens")]
        [True, True, True, True, False, False]
    """  # noqa: E501
    return bool(_NAME.search(name)) and not _TOKENIZER_NAME.search(name)


def holds_secret(text: str) -> bool:
    """Return whether a text has something in it that looks like a secret."""
    return bool(_SECRET.search(text))


def mask_secrets(text: str) -> str:
    """Return a text with stars for whatever in it looks like a secret.

    Example:
        >>> mask_secrets("GET https://me:pw@host/x?api_key=12&n=3")
        'GET https://***@host/x?api_key=***&n=3'
    """
    return _SECRET.sub(_stars, text)


def _stars(match: re.Match[str]) -> str:
    """Stars for one secret; a URL keeps its scheme and a parameter its name."""
    found = match.group()
    if "://" in found:
        return f"{found.partition('://')[0]}://{MASK}"
    before = match.string[match.start() - 1 : match.start()]
    return (
        f"{found.partition('=')[0]}={MASK}" if before in ("?", "&", ";") and "=" in found else MASK
    )


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
    shown, option = [], ""
    for word in words:
        name, separator, value = word.partition("=")
        if option and not word.startswith("-"):
            shown.append(MASK)
        else:
            shown.append(
                f"{name}={masked(value, name)}"
                if separator and "://" not in name
                else mask_secrets(word)
            )
        option = (
            word
            if word.startswith("-")
            and not separator
            and is_secret_name(word.lstrip("-").replace("-", "_"))
            else ""
        )
    return shlex.join(shown)
