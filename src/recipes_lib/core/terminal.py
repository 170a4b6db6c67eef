"""Text for people and for records: no secrets and no control characters in it."""

import datetime
import json
import os
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TextIO
from urllib.parse import urlsplit, urlunsplit

_SECRET_NAME = re.compile(
    "(^|_)(TOKEN|KEY|SECRET|PASSWORD)$|^(hub_|hf_)?token$|(api_key|secret|password)$"
)
_SECRETS = re.compile(r"\bhf_[A-Za-z0-9]{12,}|(?<=://)[^/\s?#'\"]+(?=@)")  # user:password@host
# ?api_key=SECRET, as some servers take it
_SECRETS_OF_QUERIES = re.compile(
    r"([?&](?:api_?key|key|token|access_token|secret|password|sig)=)[^&\s#'\"]+", re.IGNORECASE
)
# all but \t, \n and the joiners of Persian, Hindi and emoji
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)

_PLAIN, _RED, _GREEN, _YELLOW, _BOLD = (f"\x1b[{number}m" for number in (0, 31, 32, 33, 1))
_ERASE_LINE = "\r\x1b[2K"
# How a line begins -> its colour.
_COLORS = (
    (("next: ",), _GREEN),
    (("warning: ", "! ", "error: ", "What cannot be said"), _YELLOW),
    (("note: ",), ""),
    (("finished", "report: "), _BOLD),
)
_NOT_FOLDED = ("next: ", "$ ")  # commands are copied whole


@cache
def is_secret_name(name: str) -> bool:
    """Return whether a key, variable, option or HTTP header of this name holds a secret."""
    is_header = name.lower() in ("authorization", "x-api-key")
    return is_header or bool(_SECRET_NAME.search(name))


def holds_secret(text: str) -> bool:
    """Return whether a text has something in it that looks like a secret."""
    return bool(_SECRETS.search(text) or _SECRETS_OF_QUERIES.search(text))


def mask_secrets(text: str) -> str:
    """Return a text with stars for each secret in it, and for values of secret variables."""
    values = {value for name, value in os.environ.items() if is_secret_name(name)}
    for value in sorted(values, key=len, reverse=True):  # so that none hides a part of another
        if len(value) >= 8:  # a shorter one may be a word of any sentence
            text = text.replace(value, "***")
    text = _SECRETS_OF_QUERIES.sub(r"\1***", text)
    return _SECRETS.sub("***", text)


def bare_address(url: str) -> str:
    """Return a URL without user info, query and fragment, the places where secrets stand."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


def printable(text: str) -> str:
    """Return `text` with stars for secrets and control characters shown (`\\x1b`), not obeyed."""
    masked = mask_secrets(text)
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), masked)


def count(n: int, noun: str) -> str:
    """Return a number with its noun: 1 item, 1,200 items."""
    if n == 1:
        return f"{n:,} {noun}"
    ending = "es" if noun.endswith("s") else "s"
    return f"{n:,} {noun}{ending}"


def shown_duration(seconds: float) -> str:
    """Return a time as hours, minutes and seconds: 0:48:10; above a day: 1 day, 2:00:00."""
    return str(datetime.timedelta(seconds=round(seconds)))


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def is_terminal(stream: TextIO) -> bool:
    """Return whether a stream is a terminal that obeys control characters."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def for_stream(text: str, stream: TextIO, fold: bool = True, is_result: bool = False) -> str:
    """Return a text as a stream shows it: in a pipe or a file as it is; a terminal replaces an
    updating line, folds lines at its width, and has colours unless NO_COLOR is set.
    """
    text = printable(text)
    if not is_terminal(stream):
        return text
    columns = shutil.get_terminal_size().columns
    shown: list[str] = []
    for line in text.split("\n"):
        is_result = is_result and line != ""  # its first paragraph is the answer
        color = _BOLD if is_result else _color_of(line, is_error=stream is sys.stderr)
        parts = [line]
        if fold and len(line) > columns and not line.startswith(_NOT_FOLDED):
            hang = " " * (len(line) - len(line.lstrip()) + 2)
            parts = textwrap.wrap(
                line,
                columns,
                subsequent_indent=hang,
                break_long_words=False,
                break_on_hyphens=False,
            )
        if color and not os.environ.get("NO_COLOR"):
            parts = [f"{color}{part}{_PLAIN}" for part in parts]
        shown += parts
    return _ERASE_LINE + "\n".join(shown)


def _color_of(line: str, is_error: bool) -> str:
    """Return the control characters that begin a line's colour; empty for a plain one."""
    for beginnings, color in _COLORS:
        if line.startswith(beginnings):
            return color
    # of an error the first line; its hints are indented
    return _RED if is_error and not line.startswith(" ") else ""


def say(*lines: str, fold: bool = True, is_result: bool = False) -> None:
    """Print on stdout and flush; if the reader has closed it (`| head`), drop the rest."""
    try:
        print(for_stream("\n".join(lines), sys.stdout, fold, is_result), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say_progress(text: str) -> None:
    """Print a line that the next one replaces on a terminal; elsewhere it stays."""
    if not is_terminal(sys.stdout):
        say(text)
        return
    cut = printable(text)[: shutil.get_terminal_size().columns - 1]  # a folded one would stay
    print(_ERASE_LINE + cut, end="", flush=True)


def print_json(value: object) -> int:
    """Print what `--json` asks for, and return the exit code of a verb that is done."""
    say(json.dumps(value, indent=2), fold=False)
    return 0


def next_step(*words: str | Path, program: str = "recipes") -> int:
    """Name the next command, and return exit code 0."""
    say(f"next: {shlex.join([program, *map(str, words)])}")
    return 0
