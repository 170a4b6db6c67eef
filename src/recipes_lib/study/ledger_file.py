"""The file in which the looks at a study are written down: what stands there, and whether that is
what was written. What a look counts for is told in `study/ledger.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes_lib.core.json_files import object_or_none
from recipes_lib.study.arms import LEDGER_HEAD

LEDGER_FORMAT = 1
LedgerLine = Mapping[str, Any]  # a line of the ledger, or one of its comparisons


@dataclass(frozen=True)
class LedgerFile:
    """The lines of a ledger.

    Args:
        entries: none where the file is damaged.
        hashes: of its lines, up to one that is damaged.
        size: bytes of whole lines.
        looks: how many looks there were when a line was last written.
        damage: what is wrong with it; nothing of it is used then.
    """

    entries: tuple[LedgerLine, ...]
    hashes: tuple[str, ...]
    size: int
    looks: int
    damage: str


def ledger_place(folder: Path) -> Path:
    """Return the ledger of the study whose folder this is."""
    return folder / "ledger.jsonl"


def read_ledger(folder: Path) -> LedgerFile:
    """Return what stands in a study's ledger."""
    file, head = ledger_place(folder), object_or_none(folder / LEDGER_HEAD) or {}
    entries: list[LedgerLine] = []
    hashes: list[str] = []
    size = 0

    def damage() -> str:
        nonlocal size
        try:
            lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
        except OSError as error:
            return f"it cannot be read, {error.strerror}"
        for number, line in enumerate(lines, 1):
            entry = _entry_of(line)
            if entry is None:
                return f"line {number} is damaged"
            if entry["previous"] != (hashes[-1] if hashes else ""):
                return f"line {number} does not follow from the one before it"
            entries.append(entry)
            hashes.append(hashlib.sha256(line).hexdigest())
            size += len(line) + 1
        number = head.get("lines", 0)
        if number > len(lines):
            return f"{len(lines)} of its {number} lines are there"
        changed = number and hashes[number - 1] != head.get("last")
        return f"line {number} is not what was written" if changed else ""

    wrong = damage()
    known = () if wrong else tuple(entries)
    return LedgerFile(known, tuple(hashes), size, int(head.get("looks") or 0), wrong)


def _entry_of(line: bytes) -> LedgerLine | None:
    """A line of the ledger; None where it is none."""
    with suppress(ValueError, RecursionError):
        entry = json.loads(line)
        known = isinstance(entry, dict) and entry.get("format_version") == LEDGER_FORMAT
        if known and entry.keys() >= {"previous", "planned", "arms", "evals", "comparisons"}:
            return entry
    return None
